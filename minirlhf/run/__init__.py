"""What surrounds the algorithm: command line, run folder, checkpoints, metrics, processes, devices.

Nothing in this package depends on language models or rewards.
"""
