"""Experiments and measurements: `python -m minirlhf.lab.NAME`. The core imports none of them."""
