"""minirlhf: reinforcement learning from human feedback, from scratch."""

__version__ = "1.1"
