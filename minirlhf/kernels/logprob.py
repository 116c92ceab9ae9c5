"""Log-prob and entropy of the language-model head, tile by tile: the [N, V] logits never exist at once.

The forward pass keeps two numbers per row, log-sum-exp and entropy; the backward pass computes each tile of logits
again. That is a third more arithmetic than keeping the probabilities, and on small models still faster than naive
PyTorch, because a tile stays in the processor's cache and [N, V] floats do not.
"""

import importlib.util
import math

import torch

# One tile of logits is ROWS x COLUMNS float32 = 4 MiB, about one core's share of cache. Measured on CPU at (N, D, V)
# from (6144, 128, 2048) to (2048, 768, 50257): the best tile, or within 3% of it. The vocabulary is the outer loop, so
# that the largest arrays here, the weight and its gradient, pass through memory only once.
ROWS, COLUMNS = 512, 2048

HAS_TRITON = importlib.util.find_spec("triton") is not None  # looked up, not imported: importing takes a second
LOG2_E, LN_2 = math.log2(math.e), math.log(2)


def token_logprobs(hidden, weight, targets, temperature=1.0, entropy=False, impl="auto", vocab_size=None):
    """Log-prob of each target token under softmax(hidden @ weight.T / temperature), and the entropy of that softmax.

    z = hidden @ weight.T / temperature,  logp_i = z[i, targets_i] - log sum_v exp z[i, v]        (nats)
    H_i = -sum_v p[i, v] log p[i, v],  p = softmax(z)                                              (nats)

    hidden [N, D], weight [V, D], targets [N] int64 in [0, V); temperature > 0. With vocab_size, V is that and weight may
    have more rows, which take no part: autograd would answer a slice of the table with one more gradient of its size.
    Returns logp [N], or (logp [N], H [N]) with entropy=True: float64 for float64 inputs, float32 for all others.

    Differentiable, once, in hidden and weight, for any upstream gradient of either result; nothing is approximated.
    Extra memory is a tile of logits and, in backward, float32 sums of the size of the two gradients; without gradients
    nothing is saved. Half precision: products are summed in float32 (on CPU a tile's operands are converted to float32
    first, which is exact). Under torch.autocast both operands are rounded to its dtype, as in torch.mm, yet a float32
    weight still receives a float32 gradient. float16 needs the usual loss scaling.

    impl: "auto" is Triton for CUDA tensors where it is installed, else PyTorch; "torch" and "triton" force one.
    Raises ValueError that names the argument if a shape, dtype, device or value is wrong (on CUDA a target out of range
    stops the device asynchronously instead, as reading the targets back would stall it).

    >>> import math, torch
    >>> logp, h = token_logprobs(torch.zeros(1, 3), torch.ones(4, 3), torch.tensor([2]), entropy=True)
    >>> round(math.exp(logp), 4), round(math.exp(h), 4)
    (0.25, 4.0)
    """
    vocab_size = len(weight) if vocab_size is None else vocab_size
    dtype = _check(hidden, weight, targets, temperature, vocab_size)
    statistics, logit_gradients = _statistics, _logit_gradients
    if use_triton(impl, hidden, dtype):
        from minirlhf.kernels.logprob_triton import logit_gradients, statistics
    logp, entropies = _TokenLogprobs.apply(
        hidden, weight, targets, vocab_size, 1 / temperature, entropy, dtype, statistics, logit_gradients)
    return (logp, entropies) if entropy else logp


def use_triton(impl, tensor, dtype):
    """Whether `impl` means Triton for work on `tensor` in `dtype`; ValueError where Triton is asked for and cannot."""
    if impl not in ("auto", "torch", "triton"):
        raise ValueError(f'impl must be "auto", "torch" or "triton", got {impl!r}')
    supported = HAS_TRITON and dtype != torch.float64
    if impl != "triton":
        return impl == "auto" and tensor.is_cuda and supported
    if not supported:
        raise ValueError(f'impl="triton" needs the triton package and at most float32, got {dtype}')
    import triton

    if triton.knobs.runtime.interpret and dtype == torch.bfloat16:
        raise ValueError('impl="triton": its interpreter multiplies bfloat16 wrongly, without a word; use float32')
    if not (tensor.is_cuda or triton.knobs.runtime.interpret):
        raise ValueError(f'impl="triton" needs CUDA tensors, or TRITON_INTERPRET=1 for tests; got {tensor.device}')
    return True


def describe(tensor):
    """dtype, shape and device of a tensor, for error messages."""
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"


def require(conditions, message):
    """Raise ValueError(message) unless every element is true; on CUDA assert on the device instead, without waiting."""
    met = conditions.view(torch.uint8).amin()  # 20 times as fast as conditions.all() on CPU
    if met.is_cuda:
        torch._assert_async(met.bool(), message)
    elif not met:
        raise ValueError(message)


def _check(hidden, weight, targets, temperature, vocab_size):
    """Raise ValueError for a bad argument; return the dtype in which hidden and weight are multiplied."""
    for name, x, shape in (("hidden", hidden, "[N, D]"), ("weight", weight, "[V, D]")):
        if x.ndim != 2 or x.numel() == 0 or not x.is_floating_point():
            raise ValueError(f"{name} must be a non-empty floating-point {shape}, got {describe(x)}")
    if weight.shape[1] != hidden.shape[1] or weight.device != hidden.device:
        raise ValueError(f"weight must be [V, {hidden.shape[1]}] on {hidden.device}, got {describe(weight)}")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64 or targets.device != hidden.device:
        raise ValueError(f"targets must be int64 [{len(hidden)}] on {hidden.device}, got {describe(targets)}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a positive finite number, got {temperature}")
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device) and torch.float64 not in (hidden.dtype, weight.dtype)
    if weight.dtype != hidden.dtype and not autocast:
        raise ValueError(f"weight must have hidden's dtype {hidden.dtype} outside autocast, got {describe(weight)}")
    if not 0 < vocab_size <= len(weight):
        raise ValueError(f"vocab_size must be from 1 to {len(weight)}, the rows of weight, got {vocab_size}")
    in_range = (targets >= 0) & (targets < vocab_size)
    require(in_range, f"targets must lie in [0, {vocab_size}), the vocabulary; got {describe(targets)}")
    return torch.get_autocast_dtype(device) if autocast else hidden.dtype


class _TokenLogprobs(torch.autograd.Function):
    """What the PyTorch and the Triton version share: they differ only in `statistics` and `logit_gradients`.

    Under autocast dtypes stay as chosen here: it changes no product that is written in place or through `out`.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, vocab_size, inv_temperature, entropy, dtype, statistics, logit_gradients):
        operands = hidden.to(dtype), weight[:vocab_size].to(dtype)
        target_logit, lse_parts, entropy_parts = statistics(*operands, targets, inv_temperature, entropy)
        lse = lse_parts.logsumexp(0)
        # Shannon's grouping rule: the entropy of the choice of a slab, plus the mean of the entropies inside the slabs.
        log_share = lse_parts - lse
        entropies = (log_share.exp() * (entropy_parts - log_share)).sum(0) if entropy else None
        ctx.save_for_backward(hidden, weight, targets, lse, entropies)
        ctx.settings = vocab_size, inv_temperature, dtype, logit_gradients
        ctx.set_materialize_grads(False)  # so an entropy that is only logged costs nothing in backward
        return target_logit - lse, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logp, grad_entropy):
        """dz = g (onehot - p) - g_H p (log p + H), with upstream gradients g and g_H; then d_hidden, d_weight from dz.

        Written as dz = g onehot + p (constant + slope log p), where all three coefficients belong to a row.
        """
        hidden, weight, targets, lse, entropies = ctx.saved_tensors
        vocab_size, inv_temperature, dtype, logit_gradients = ctx.settings
        g = torch.zeros_like(lse) if grad_logp is None else grad_logp.contiguous()  # that of a sum arrives expanded
        constant, slope = (-g, None) if grad_entropy is None else (-g - grad_entropy * entropies, -grad_entropy)
        per_row = targets, lse, g, constant, slope
        d_hidden = torch.zeros_like(hidden, dtype=lse.dtype)
        d_weight = torch.zeros_like(weight, dtype=lse.dtype)
        h, w = hidden.to(dtype), weight[:vocab_size].to(dtype)
        for rows, columns, dz in logit_gradients(h, w, inv_temperature, *per_row):
            _add_product(d_hidden[rows], dz, w[columns], inv_temperature)
            _add_product(d_weight[columns], dz.T, h[rows], inv_temperature)
        return d_hidden.to(hidden.dtype), d_weight.to(weight.dtype), *[None] * 7


def _add_product(out, a, b, scale):
    """out += scale * a @ b in place, summed in out's dtype whatever the dtype of a and b."""
    if a.is_cuda and a.dtype == b.dtype != out.dtype:  # CUDA alone multiplies half precision into float32 sums
        out.add_(torch.mm(a, b, out_dtype=out.dtype), alpha=scale)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype), alpha=scale)


def _statistics(hidden, weight, targets, inv_temperature, entropy):
    """Logit of each row's target [N], and per slab of the vocabulary log-sum-exp and entropy (or None), [slabs, N]."""
    target_logit = hidden.new_empty(len(hidden), dtype=_sum_dtype(hidden))
    lse = target_logit.new_empty(-(-len(weight) // COLUMNS), len(hidden))
    entropies = torch.empty_like(lse) if entropy else None
    for rows, columns, bits in _logit_tiles(hidden, weight, inv_temperature):
        slab = columns.start // COLUMNS
        column, inside = _target_column(targets[rows], columns)
        target_logit[rows] = torch.where(inside, LN_2 * bits.gather(1, column)[:, 0], target_logit[rows])
        top = bits.amax(1)
        bits -= top[:, None]
        p = torch.exp2(bits) if entropy else bits.exp2_()
        total = p.sum(1)
        lse[slab, rows] = LN_2 * (top + total.log2())
        if entropy:
            entropies[slab, rows] = LN_2 * (total.log2() - p.mul_(bits).sum(1) / total)
    return target_logit, lse, entropies


def _logit_gradients(hidden, weight, inv_temperature, targets, lse, g, constant, slope):
    """Yield (rows, columns, dz), a tile at a time: dz = g onehot + p (constant + slope log p)."""
    for rows, columns, bits in _logit_tiles(hidden, weight, inv_temperature):
        log2_p = bits.sub_(LOG2_E * lse[rows, None])
        if slope is None:
            dz = log2_p.exp2_().mul_(constant[rows, None])
        else:
            factor = torch.addcmul(constant[rows, None], LN_2 * slope[rows, None], log2_p)
            dz = log2_p.exp2_().mul_(factor)
        column, inside = _target_column(targets[rows], columns)
        yield rows, columns, dz.scatter_add_(1, column, torch.where(inside, g[rows], 0)[:, None])


def _logit_tiles(hidden, weight, inv_temperature):
    """Yield (rows, columns, z in bits), the tile lying in one buffer that the next tile overwrites.

    In bits, z log2(e), as exp2 is up to three times as fast as exp; the factor is free inside the matrix product.
    """
    dtype = _sum_dtype(hidden)
    buffer = hidden.new_empty(min(ROWS, len(hidden)) * min(COLUMNS, len(weight)), dtype=dtype)
    for v in range(0, len(weight), COLUMNS):
        slab = weight[v:v + COLUMNS].to(dtype)
        for n in range(0, len(hidden), ROWS):
            block = hidden[n:n + ROWS].to(dtype)
            tile = buffer[:len(block) * len(slab)].view(len(block), len(slab))
            torch.addmm(tile, block, slab.T, beta=0, alpha=LOG2_E * inv_temperature, out=tile)
            yield slice(n, n + len(block)), slice(v, v + len(slab)), tile


def _target_column(targets, columns):
    """Each row's target counted from the tile's first column [rows, 1], and whether it lies in the tile [rows]."""
    inside = (targets >= columns.start) & (targets < columns.stop)
    return torch.where(inside, targets - columns.start, 0)[:, None], inside


def _sum_dtype(operand):
    return torch.promote_types(operand.dtype, torch.float32)
