"""Programs around training: `python -m minirlhf.tools.NAME`. The core imports none of them."""
