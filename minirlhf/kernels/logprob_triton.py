"""`statistics` and `logit_gradients` of logprob.py in Triton: the logits never leave the registers.

Each program owns one tile and every element of its output: no atomics, no locks, the same bits in
every run.
"""

import torch
import triton
import triton.language as tl

# A tile of dz is an operand of two cuBLAS products: large enough for their full speed, and 128 MiB
# in bfloat16.
ROWS, COLUMNS = 8192, 8192

# The tile of one program: rows, vocabulary, step along D. In half precision two programs fit on one
# multiprocessor of an H200 (128 registers per thread, except for the gradient of the entropy;
# 96 KiB), so that one multiplies while the other computes exponentials. float32 has no exact matrix
# unit, and its products need registers: smaller tiles.
HALF = dict(BLOCK_N=128, BLOCK_V=128, BLOCK_D=64, num_warps=8, num_stages=3)
FLOAT32 = dict(BLOCK_N=64, BLOCK_V=64, BLOCK_D=32, num_warps=4, num_stages=3)


def statistics(hidden, weight, targets, inv_temperature, entropy):
    """(target logit [N]; of each vocabulary tile: log-sum-exp, and entropy or None, [tiles, N])."""
    config = _config(hidden)
    hidden, weight = _row_major(hidden), _row_major(weight)
    grid = triton.cdiv(len(weight), config["BLOCK_V"]), triton.cdiv(len(hidden), config["BLOCK_N"])
    target_logit = hidden.new_empty(len(hidden), dtype=torch.float32)
    lse = target_logit.new_empty(grid[0], len(hidden))
    entropies = torch.empty_like(lse) if entropy else None
    with torch.cuda.device_of(hidden):
        statistics_kernel[grid](
            hidden, weight, targets.contiguous(), target_logit, lse, entropies,
            *hidden.shape, len(weight), hidden.stride(0), weight.stride(0), inv_temperature,
            **config)
    return target_logit, lse, entropies


def logit_gradients(hidden, weight, inv_temperature, targets, lse, g, constant, slope):
    """Yield (rows, columns, dz) for each tile, in the operands' dtype.

    dz = g onehot + p (constant + slope log p)
    """
    config = _config(hidden)
    hidden, weight = _row_major(hidden), _row_major(weight)
    # rows start at multiples of 16 bytes, for cuBLAS's fast kernels
    width = triton.cdiv(min(COLUMNS, len(weight)), 8) * 8
    buffer = hidden.new_empty(min(ROWS, len(hidden)), width)
    for v in range(0, len(weight), COLUMNS):
        slab = weight[v:v + COLUMNS]
        for n in range(0, len(hidden), ROWS):
            block = hidden[n:n + ROWS]
            rows = slice(n, n + len(block))
            columns = slice(v, v + len(slab))
            dz = buffer[:len(block), :len(slab)]
            grid = (triton.cdiv(len(slab), config["BLOCK_V"]),
                    triton.cdiv(len(block), config["BLOCK_N"]))
            with torch.cuda.device_of(hidden):
                gradient_kernel[grid](
                    block, slab, targets[rows] - v, lse[rows], g[rows], constant[rows],
                    None if slope is None else slope[rows], dz,
                    *block.shape, len(slab), hidden.stride(0), weight.stride(0), width,
                    inv_temperature, **config)
            yield rows, columns, dz


@triton.jit(do_not_specialize=["N"])  # N changes in every step; do not compile again
def statistics_kernel(
    hidden, weight, targets, target_logit, lse, entropies,
    N, D, V, hidden_stride, weight_stride, inv_temperature,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Target logit, lse = log sum_v exp z and, unless None, H = -sum_v p log p, all over one tile.

    p is the softmax over the tile.
    """
    row_tile, column_tile = _position()
    rows = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = column_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    z = _logits(hidden, weight, rows, columns, N, D, V, hidden_stride, weight_stride,
                inv_temperature, BLOCK_D)

    z_max = tl.max(z, 1)
    shifted = z - z_max[:, None]
    e = tl.exp(shifted)
    total = tl.sum(e, 1)
    tl.store(lse + column_tile * N + rows, z_max + tl.log(total), mask=rows < N)
    if entropies is not None:
        h = tl.log(total) - tl.sum(e * shifted, 1) / total
        tl.store(entropies + column_tile * N + rows, h, mask=rows < N)

    target = tl.load(targets + rows, mask=rows < N, other=0)
    z_target = tl.sum(tl.where(columns[None, :] == target[:, None], z, 0.0), 1)
    tl.store(target_logit + rows, z_target, mask=(rows < N) & (target // BLOCK_V == column_tile))


@triton.jit(do_not_specialize=["N"])
def gradient_kernel(
    hidden, weight, targets, lse, g, constant, slope, dz,
    N, D, V, hidden_stride, weight_stride, dz_stride, inv_temperature,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """dz = g onehot + p (constant + slope log p) on a tile; log p = z - lse; slope or None."""
    row_tile, column_tile = _position()
    rows = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = column_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    z = _logits(hidden, weight, rows, columns, N, D, V, hidden_stride, weight_stride,
                inv_temperature, BLOCK_D)

    log_p = z - tl.load(lse + rows, mask=rows < N, other=0.0)[:, None]
    factor = tl.load(constant + rows, mask=rows < N, other=0.0)[:, None]
    if slope is not None:
        factor += tl.load(slope + rows, mask=rows < N, other=0.0)[:, None] * log_p
    gradient = tl.exp(log_p) * factor

    target = tl.load(targets + rows, mask=rows < N, other=0)
    g_row = tl.load(g + rows, mask=rows < N, other=0.0)
    gradient += tl.where(columns[None, :] == target[:, None], g_row[:, None], 0.0)

    inside = (rows < N)[:, None] & (columns < V)[None, :]
    tl.store(dz + rows[:, None] * dz_stride + columns[None, :],
             gradient.to(dz.dtype.element_ty), mask=inside)


@triton.jit
def _position():
    """(row tile, vocabulary tile) of this program.

    Consecutive programs cover 8 row tiles of one vocabulary tile, then the same 8 of the next, so
    they find their operands in the L2 cache.
    """
    return tl.swizzle2d(tl.program_id(1), tl.program_id(0), tl.num_programs(1),
                        tl.num_programs(0), 8)


@triton.jit
def _logits(
    hidden, weight, rows, columns,
    N, D, V, hidden_stride, weight_stride, inv_temperature, BLOCK_D: tl.constexpr,
):
    """z = hidden[rows] @ weight[columns].T * inv_temperature in float32; -1e30 beyond V."""
    # 64 bits, because a large table has more than 2^31 elements
    h_rows = hidden + rows.to(tl.int64)[:, None] * hidden_stride
    w_rows = weight + columns.to(tl.int64)[None, :] * weight_stride
    z = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    for d_start in range(0, D, BLOCK_D):
        d = d_start + tl.arange(0, BLOCK_D)
        h = tl.load(h_rows + d[None, :], mask=(rows < N)[:, None] & (d < D)[None, :], other=0.0)
        w = tl.load(w_rows + d[:, None], mask=(columns < V)[None, :] & (d < D)[:, None], other=0.0)
        z = tl.dot(h, w, z, input_precision="ieee")  # float32 operands stay float32: no TF32
    return tl.where(columns[None, :] < V, z * inv_temperature, -1e30)


def _config(operand):
    return FLOAT32 if operand.dtype == torch.float32 else HALF


def _row_major(matrix):
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
