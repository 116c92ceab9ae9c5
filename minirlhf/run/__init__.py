"""What surrounds the algorithm: command line, run folder, checkpoints, metrics, processes, devices.

Nothing in this package knows about language models or rewards.
"""
