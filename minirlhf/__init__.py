"""minirlhf: reinforcement learning from human feedback, from scratch, in the order in which one learns it."""
