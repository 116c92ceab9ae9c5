"""The scan of returns.py in Triton: each program scans a tile of rows from the right."""

import torch
import triton
import triton.language as tl

TILE = 2048  # elements per program: 16 per thread with 4 warps, four 128-bit loads
MAX_BLOCK_R = 1024  # columns; a longer row is scanned in blocks, from the last to the first


def scan(rewards, valid, gamma):
    """x_t = r_t + gamma x_{t+1} with r = 0 where not valid: [B, R] in float32."""
    batch, length = rewards.shape
    block_r = max(16, min(MAX_BLOCK_R, triton.next_power_of_2(length)))
    block_b = TILE // block_r
    returns = torch.empty(batch, length, dtype=torch.float32, device=rewards.device)
    with torch.cuda.device_of(rewards):
        scan_kernel[(triton.cdiv(batch, block_b),)](
            rewards.contiguous(), valid.contiguous(), returns, batch, length, float(gamma),
            BLOCK_B=block_b, BLOCK_R=block_r, num_warps=4)
    return returns


@triton.jit(do_not_specialize=["B"])  # B may change; do not compile again
def scan_kernel(rewards, valid, returns, B, R, gamma, BLOCK_B: tl.constexpr, BLOCK_R: tl.constexpr):
    """The returns of BLOCK_B rows, in blocks of BLOCK_R columns from the last to the first."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    after = tl.zeros([BLOCK_B], tl.float32)  # x in the first column after the block
    blocks = tl.cdiv(R, BLOCK_R)
    for i in range(blocks):
        start = (blocks - 1 - i) * BLOCK_R
        t = start + tl.arange(0, BLOCK_R)
        at = rows[:, None] * R + t[None, :]
        inside = (rows < B)[:, None] & (t < R)[None, :]
        r = tl.load(rewards + at, mask=inside, other=0.0).to(tl.float32)
        r = tl.where(tl.load(valid + at, mask=inside, other=0) != 0, r, 0.0)
        # x: discounted sum from t to the block's end.  power: gamma^(columns from t to that end),
        # the weight of what follows the block.
        power, x = tl.associative_scan((tl.zeros_like(r) + gamma, r), 1, _then, reverse=True)
        x += power * after[:, None]
        tl.store(returns + at, x, mask=inside)
        after = tl.sum(tl.where(t[None, :] == start, x, 0.0), 1)


@triton.jit
def _then(later_coefficient, later_value, coefficient, value):
    """Compose two steps x -> coefficient x + value; the one later in time is applied first."""
    return coefficient * later_coefficient, coefficient * later_value + value
