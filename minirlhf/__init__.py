"""minirlhf: reinforcement learning from human feedback, from scratch.

Import it before torch, as the scripts do, so that the setting of the threads has an effect.
"""

import os
import signal
import sys

__version__ = "1.1"

# How often an OpenMP thread checks for work before it sleeps; libgomp reads it when torch is
# imported. With the default, waiting threads take the cores from each other if other programs run.
# On two cores, a short run of train_reward.py beside one and two busy processes took 2.4 and 6.4
# times as long as on an idle machine; with 1000 it took 1.7 and 2.5 times as long. On an idle
# machine 1000 makes a step about 4% slower.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# The other imports take seconds. If one of this project's programs was started, Ctrl-C ends it
# during that time without a traceback. (sys.argv[0] is "-m" while Python looks for the module.)
if os.path.basename(sys.argv[0]) in ("-m", "train_reward.py", "train_policy.py"):
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
