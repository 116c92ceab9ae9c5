"""The two computations that every trainer spends its time in: log-probs of tokens and discounted sums of rewards.

Each exists as a PyTorch version that runs anywhere and as a Triton version for CUDA, with one signature and one set of
tests. CUDA tensors go to Triton where it is installed, all others to PyTorch; `impl` forces one of the two.
"""

from minirlhf.kernels.logprob import token_logprobs
from minirlhf.kernels.returns import discounted_returns

__all__ = ["discounted_returns", "token_logprobs"]
