"""The algorithm: sampling, rewards, rollouts, advantages, losses, and the table of algorithms."""
