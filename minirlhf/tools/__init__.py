"""Programs around training, one file each: `python -m minirlhf.tools.NAME`. The core imports none of them."""
