"""Experiments that teach or measure, one file each: `python -m minirlhf.lab.NAME`. The core imports none of them."""
