"""Log-prob and entropy of the LM head, tile by tile: the [N, V] logits never exist at once.

The forward pass keeps two numbers per row, log-sum-exp and entropy. The backward pass computes each
tile of logits again. That is a third more arithmetic than keeping the probabilities. On small
models it is still faster than plain PyTorch, because a tile fits in the processor's cache.
"""

import importlib.util
import math

import torch

# One tile of logits is ROWS x COLUMNS float32 = 4 MiB, about one core's share of cache. On CPU this
# tile was the best, or within 3% of it, for (N, D, V) from (6144, 128, 2048) to (2048, 768, 50257).
# The outer loop runs over the vocabulary, so that the largest arrays here, the weight and its
# gradient, pass through memory only once.
ROWS, COLUMNS = 512, 2048

HAS_TRITON = importlib.util.find_spec("triton") is not None  # importing it takes a second
LOG2_E, LN_2 = math.log2(math.e), math.log(2)


def token_logprobs(hidden, weight, targets, temperature=1.0, entropy=False, impl="auto",
                   vocab_size=None):
    """Log-prob of each target token under softmax(hidden @ weight.T / temperature).

    z = hidden @ weight.T / temperature,  logp_i = z[i, targets_i] - log sum_v exp z[i, v]   (nats)
    H_i = -sum_v p[i, v] log p[i, v],  p = softmax(z)                                        (nats)

    hidden [N, D], weight [V, D], targets [N] int64 in [0, V); temperature > 0.
    vocab_size: V, only needed if the weight has more rows; those after V are ignored. (A slice of
    the weight as the argument would need one more gradient, of the size of the whole weight.)
    Returns logp [N], or (logp [N], H [N]) with entropy=True: float64 for float64 inputs, otherwise
    float32.

    Differentiable once, in hidden and weight, for any upstream gradient of both results. Nothing is
    approximated. Extra memory: one tile of logits and, in backward, float32 sums of the size of the
    two gradients. Without gradients nothing is saved.

    Half precision: products are summed in float32. Under torch.autocast both operands are rounded
    to its dtype, as in torch.mm, but a float32 weight still gets a float32 gradient. float16 needs
    the usual loss scaling.

    impl: "auto" is Triton for CUDA tensors if it is installed, otherwise PyTorch; "torch" and
    "triton" force one.
    Raises ValueError that names the argument if a shape, dtype, device or value is wrong. On CUDA a
    target out of range stops the device later instead, because reading the targets would stall it.

    >>> import math, torch
    >>> logp, h = token_logprobs(torch.zeros(1, 3), torch.ones(4, 3), torch.tensor([2]),
    ...                          entropy=True)
    >>> round(math.exp(logp), 4), round(math.exp(h), 4)
    (0.25, 4.0)
    """
    vocab_size = len(weight) if vocab_size is None else vocab_size
    dtype = _check(hidden, weight, targets, temperature, vocab_size)
    statistics = _statistics
    logit_gradients = _logit_gradients
    if use_triton(impl, hidden, dtype):
        from minirlhf.kernels.logprob_triton import logit_gradients, statistics
    logp, entropies = _TokenLogprobs.apply(hidden, weight, targets, vocab_size, 1 / temperature,
                                           entropy, dtype, statistics, logit_gradients)
    return (logp, entropies) if entropy else logp


# ---- checks --------------------------------------------------------------------------------------


def use_triton(impl, tensor, dtype):
    """Whether `impl` means Triton for this tensor and dtype. ValueError if Triton is impossible."""
    if impl not in ("auto", "torch", "triton"):
        raise ValueError(f'impl must be "auto", "torch" or "triton", got {impl!r}')
    is_supported = HAS_TRITON and dtype != torch.float64
    if impl != "triton":
        return impl == "auto" and tensor.is_cuda and is_supported
    if not is_supported:
        raise ValueError('impl="triton" needs the triton package and at most float32, '
                         f"got {dtype}")
    import triton

    if triton.knobs.runtime.interpret and dtype == torch.bfloat16:
        raise ValueError('impl="triton": its interpreter multiplies bfloat16 incorrectly; '
                         "use float32")
    if not (tensor.is_cuda or triton.knobs.runtime.interpret):
        raise ValueError('impl="triton" needs CUDA tensors, or TRITON_INTERPRET=1 for tests; '
                         f"got {tensor.device}")
    return True


def describe(tensor):
    """dtype, shape and device of a tensor, for error messages."""
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"


def require(conditions, message):
    """Raise ValueError(message) unless every element is true.

    On CUDA the device checks it asynchronously: the CPU does not wait, and the error comes later.
    """
    all_true = conditions.view(torch.uint8).amin()  # 20 times as fast as conditions.all() on CPU
    if all_true.is_cuda:
        torch._assert_async(all_true.bool(), message)
    elif not all_true:
        raise ValueError(message)


def _check(hidden, weight, targets, temperature, vocab_size):
    """Raise ValueError for a bad argument; return the dtype of the product hidden @ weight.T."""
    for name, x, shape in (("hidden", hidden, "[N, D]"), ("weight", weight, "[V, D]")):
        if x.ndim != 2 or x.numel() == 0 or not x.is_floating_point():
            raise ValueError(f"{name} must be a non-empty floating-point {shape}, "
                             f"got {describe(x)}")
    if weight.shape[1] != hidden.shape[1] or weight.device != hidden.device:
        raise ValueError(f"weight must be [V, {hidden.shape[1]}] on {hidden.device}, "
                         f"got {describe(weight)}")
    if (targets.shape != hidden.shape[:1] or targets.dtype != torch.int64
            or targets.device != hidden.device):
        raise ValueError(f"targets must be int64 [{len(hidden)}] on {hidden.device}, "
                         f"got {describe(targets)}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a positive finite number, got {temperature}")
    device = hidden.device.type
    is_float64 = torch.float64 in (hidden.dtype, weight.dtype)  # autocast does not change it
    autocast = torch.is_autocast_enabled(device) and not is_float64
    if weight.dtype != hidden.dtype and not autocast:
        raise ValueError(f"weight must have hidden's dtype {hidden.dtype} outside autocast, "
                         f"got {describe(weight)}")
    if not 0 < vocab_size <= len(weight):
        raise ValueError(f"vocab_size must be from 1 to {len(weight)}, the rows of weight, "
                         f"got {vocab_size}")
    in_range = (targets >= 0) & (targets < vocab_size)
    require(in_range, f"targets must be in [0, {vocab_size}), the vocabulary; "
                      f"got {describe(targets)}")
    return torch.get_autocast_dtype(device) if autocast else hidden.dtype


# ---- autograd ------------------------------------------------------------------------------------


class _TokenLogprobs(torch.autograd.Function):
    """Shared by both versions, which differ only in `statistics` and `logit_gradients`.

    Under autocast the dtypes stay as chosen here, because autocast does not change products that
    are written in place or to `out`.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, vocab_size, inv_temperature, entropy, dtype,
                statistics, logit_gradients):
        h = hidden.to(dtype)
        w = weight[:vocab_size].to(dtype)
        target_logit, lse_parts, entropy_parts = statistics(h, w, targets, inv_temperature, entropy)
        lse = lse_parts.logsumexp(0)
        entropies = None
        if entropy:
            # A part covers one slab, a range of the vocabulary. Shannon's grouping rule: the
            # entropy of the choice of a slab, plus the mean of the entropies inside the slabs.
            log_share = lse_parts - lse
            entropies = (log_share.exp() * (entropy_parts - log_share)).sum(0)
        ctx.save_for_backward(hidden, weight, targets, lse, entropies)
        ctx.settings = vocab_size, inv_temperature, dtype, logit_gradients
        ctx.set_materialize_grads(False)  # an entropy that is only logged costs no backward pass
        return target_logit - lse, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logp, grad_entropy):
        """dz = g (onehot - p) - g_H p (log p + H), with upstream gradients g and g_H.

        Written as dz = g onehot + p (constant + slope log p), where the three coefficients belong
        to a row. Then d_hidden and d_weight are products with dz.
        """
        hidden, weight, targets, lse, entropies = ctx.saved_tensors
        vocab_size, inv_temperature, dtype, logit_gradients = ctx.settings
        # contiguous, because the gradient of a sum arrives expanded
        g = torch.zeros_like(lse) if grad_logp is None else grad_logp.contiguous()
        constant = -g
        slope = None
        if grad_entropy is not None:
            constant = -g - grad_entropy * entropies
            slope = -grad_entropy
        d_hidden = torch.zeros_like(hidden, dtype=lse.dtype)
        d_weight = torch.zeros_like(weight, dtype=lse.dtype)
        h = hidden.to(dtype)
        w = weight[:vocab_size].to(dtype)
        for rows, columns, dz in logit_gradients(h, w, inv_temperature, targets, lse, g, constant,
                                                 slope):
            _add_product(d_hidden[rows], dz, w[columns], inv_temperature)
            _add_product(d_weight[columns], dz.T, h[rows], inv_temperature)
            del dz  # its buffer would otherwise stay alive during the casts below
        return d_hidden.to(hidden.dtype), d_weight.to(weight.dtype), *[None] * 7


def _add_product(out, a, b, scale):
    """out += scale * a @ b in place, summed in out's dtype whatever the dtype of a and b."""
    # only CUDA multiplies half precision into float32 sums
    if a.is_cuda and a.dtype == b.dtype != out.dtype:
        out.add_(torch.mm(a, b, out_dtype=out.dtype), alpha=scale)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype), alpha=scale)


# ---- the PyTorch version -------------------------------------------------------------------------


def _statistics(hidden, weight, targets, inv_temperature, entropy):
    """(target logit [N], log-sum-exp [slabs, N], entropy [slabs, N] or None).

    A slab is COLUMNS entries of the vocabulary. bits: logits divided by log 2, for exp2.
    """
    target_logit = hidden.new_empty(len(hidden), dtype=_sum_dtype(hidden))
    lse = target_logit.new_empty(-(-len(weight) // COLUMNS), len(hidden))
    entropies = torch.empty_like(lse) if entropy else None
    for rows, columns, bits in _logit_tiles(hidden, weight, inv_temperature):
        slab = columns.start // COLUMNS
        column, inside = _target_column(targets[rows], columns)
        at_target = LN_2 * bits.gather(1, column)[:, 0]
        target_logit[rows] = torch.where(inside, at_target, target_logit[rows])
        top = bits.amax(1)
        bits -= top[:, None]
        p = torch.exp2(bits) if entropy else bits.exp2_()
        total = p.sum(1)
        lse[slab, rows] = LN_2 * (top + total.log2())
        if entropy:
            entropies[slab, rows] = LN_2 * (total.log2() - p.mul_(bits).sum(1) / total)
    return target_logit, lse, entropies


def _logit_gradients(hidden, weight, inv_temperature, targets, lse, g, constant, slope):
    """Yield (rows, columns, dz) for each tile: dz = g onehot + p (constant + slope log p)."""
    for rows, columns, bits in _logit_tiles(hidden, weight, inv_temperature):
        log2_p = bits.sub_(LOG2_E * lse[rows, None])
        if slope is None:
            dz = log2_p.exp2_().mul_(constant[rows, None])
        else:
            factor = torch.addcmul(constant[rows, None], LN_2 * slope[rows, None], log2_p)
            dz = log2_p.exp2_().mul_(factor)
        column, inside = _target_column(targets[rows], columns)
        at_target = torch.where(inside, g[rows], 0)[:, None]
        yield rows, columns, dz.scatter_add_(1, column, at_target)


def _logit_tiles(hidden, weight, inv_temperature):
    """Yield (rows, columns, z in bits). The next tile overwrites the buffer of this one.

    z log2(e), because exp2 is up to three times as fast as exp; the factor costs nothing inside the
    matrix product.
    """
    dtype = _sum_dtype(hidden)
    size = min(ROWS, len(hidden)) * min(COLUMNS, len(weight))
    buffer = hidden.new_empty(size, dtype=dtype)
    for v in range(0, len(weight), COLUMNS):
        slab = weight[v:v + COLUMNS].to(dtype)
        for n in range(0, len(hidden), ROWS):
            block = hidden[n:n + ROWS].to(dtype)
            tile = buffer[:len(block) * len(slab)].view(len(block), len(slab))
            torch.addmm(tile, block, slab.T, beta=0, alpha=LOG2_E * inv_temperature, out=tile)
            yield slice(n, n + len(block)), slice(v, v + len(slab)), tile


def _target_column(targets, columns):
    """Each row's target relative to the tile [rows, 1], and whether it is inside it [rows]."""
    inside = (targets >= columns.start) & (targets < columns.stop)
    return torch.where(inside, targets - columns.start, 0)[:, None], inside


def _sum_dtype(operand):
    return torch.promote_types(operand.dtype, torch.float32)
