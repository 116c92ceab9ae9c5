"""Two computations that take much of the training time: log-probs and discounted returns.

Each has a PyTorch version that runs anywhere and a Triton version for CUDA, with one signature and
one set of tests. CUDA tensors use Triton if it is installed, all others PyTorch; `impl` forces one
of them.
"""

from minirlhf.kernels.logprob import token_logprobs
from minirlhf.kernels.returns import discounted_returns

__all__ = ["discounted_returns", "token_logprobs"]
