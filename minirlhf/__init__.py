"""minirlhf: reinforcement learning from human feedback, from scratch.

Import it before torch, as the scripts do, so that the setting of the threads has an effect.
"""

import os

__version__ = "1.1"

# How often an OpenMP thread checks for work before it sleeps; libgomp reads it when torch is
# imported. With the default, waiting threads take the cores from each other if other programs run.
# On two cores, a short run of train_reward.py beside one and two busy processes took 2.4 and 6.4
# times as long as on an idle machine; with 1000 it took 1.7 and 2.5 times as long. On an idle
# machine 1000 makes a step about 4% slower.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
