"""Token log-probs and discounted returns of the PyTorch version, against simple float64 code."""

import contextlib
import importlib.util
import math
import sys
import weakref
from types import SimpleNamespace

from minirlhf.kernels import discounted_returns, logprob, token_logprobs

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

# (N, D, V): single rows and columns, tiny vocabularies, and sizes that are no multiple of a tile
SHAPES = [
    (1, 1, 1),
    (1, 5, 2),
    (4, 3, 3),
    (7, 16, 4),
    (9, 8, 5),
    (70, 33, 130),
    (33, 64, 64),
    (129, 40, 301),
]


def reference_logprobs(hidden, weight, targets, temperature):
    logp = (hidden.double() @ weight.double().T / temperature).log_softmax(1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(1)


def reference_returns(rewards, mask, gamma):
    returns = torch.zeros(rewards.shape, dtype=torch.float64)
    later = torch.zeros(len(rewards), dtype=torch.float64)
    for t in reversed(range(rewards.shape[1])):
        later = torch.where(mask[:, t].bool(), rewards[:, t].double() + gamma * later, 0)
        returns[:, t] = later
    return returns


def example(n, d, v, dtype, device="cpu", seed=0):
    """hidden, weight, targets and upstream gradients of log-prob and entropy.

    Targets repeat; upstream gradients have both signs.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator, dtype=torch.float64)
    weight = torch.randn(v, d, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, v, (n,), generator=generator)
    targets[n // 2 :] = targets[0]
    upstream = torch.randn(2, n, generator=generator, dtype=torch.float64)
    leaves = ((x / d**0.25).to(device, dtype).requires_grad_() for x in (hidden, weight))
    return *leaves, targets.to(device), upstream.to(device)


def check_logprobs(shape, temperature, entropy, dtype, tolerance, impl="torch", device="cpu"):
    """Compare values and gradients of `impl` with the reference on the same rounded inputs."""
    hidden, weight, targets, upstream = example(*shape, dtype, device)
    results = token_logprobs(hidden, weight, targets, temperature, entropy, impl)
    results = results if entropy else (results,)
    sum_dtype = torch.promote_types(dtype, torch.float32)
    leaves = (hidden, weight)
    upstream = upstream[: len(results)]
    gradients = torch.autograd.grad(results, leaves, [g.to(sum_dtype) for g in upstream])

    references = reference_logprobs(hidden, weight, targets, temperature)[: len(results)]
    reference_gradients = torch.autograd.grad(references, leaves, list(upstream))
    value_tolerance = min(tolerance, 1e-5)  # sums are float32 for any dtype of the operands
    for actual, expected in zip(results, references):
        assert actual.dtype == sum_dtype and actual.shape == expected.shape
        torch.testing.assert_close(
            actual.double(), expected, rtol=value_tolerance, atol=value_tolerance
        )
    for actual, expected in zip(gradients, reference_gradients):
        assert actual.dtype == dtype
        scale = max(1, expected.abs().max())
        torch.testing.assert_close(
            actual.double() / scale, expected.double() / scale, rtol=tolerance, atol=tolerance
        )


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 8 x 16, so that small shapes have several tiles."""
    monkeypatch.setattr(logprob, "ROWS", 8)
    monkeypatch.setattr(logprob, "COLUMNS", 16)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("temperature", [0.5, 1, 2.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_logprobs_entropy_and_gradients_equal_the_reference(
    small_tiles, shape, temperature, entropy, dtype, tolerance
):
    """Covers shapes of one row or column and shapes that are no multiple of a tile."""
    check_logprobs(shape, temperature, entropy, dtype, tolerance)


@pytest.mark.parametrize("entropy", [False, True])
def test_tiles_of_full_size_equal_the_reference(entropy):
    """The other tests use small tiles."""
    check_logprobs((logprob.ROWS + 5, 7, logprob.COLUMNS + 3), 0.7, entropy, torch.float32, 1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_half_precision_products_are_summed_in_float32(small_tiles, dtype, tolerance):
    """bfloat16 sums have errors of 1e-2, which would change the importance ratios of PPO."""
    check_logprobs((33, 64, 130), 1.0, True, dtype, tolerance)


def test_gradients_agree_with_finite_differences(small_tiles):
    """torch's gradcheck, with and without the entropy."""
    hidden, weight, targets, _ = example(10, 3, 19, torch.float64)
    torch.autograd.gradcheck(
        lambda h, w: token_logprobs(h, w, targets, 0.8, entropy=True), (hidden, weight)
    )
    torch.autograd.gradcheck(lambda h, w: token_logprobs(h, w, targets, 0.8), (hidden, weight))


def test_each_result_can_be_differentiated_alone():
    """Autograd passes None for the other result, and an expanded gradient for a sum."""
    hidden, weight, targets, _ = example(6, 4, 9, torch.float64)
    for which in (0, 1):
        result = token_logprobs(hidden, weight, targets, entropy=True)[which]
        reference = reference_logprobs(hidden, weight, targets, 1)[which]
        actual = torch.autograd.grad(result.sum(), (hidden, weight))
        expected = torch.autograd.grad(reference.sum(), (hidden, weight))
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("sliced", [True, False])
def test_the_table_may_have_more_rows_than_the_vocabulary(sliced, small_tiles):
    """The other rows are not in the softmax and get no gradient. hidden may be strided."""
    hidden, table, targets, upstream = example(12, 6, 40, torch.float64)
    targets = targets.clamp(max=32)
    strided = hidden.detach().T.contiguous().T.requires_grad_()
    if sliced:
        logp = token_logprobs(strided, table[:33], targets)
    else:
        logp = token_logprobs(strided, table, targets, vocab_size=33)
    expected, _ = reference_logprobs(hidden, table[:33], targets, 1)
    torch.testing.assert_close(logp, expected)
    gradients = torch.autograd.grad(logp, (strided, table), upstream[0])
    expected_gradients = torch.autograd.grad(expected, (hidden, table), upstream[0])
    torch.testing.assert_close(gradients, expected_gradients)
    assert not gradients[1][33:].any()


def test_large_logits_stay_finite_and_no_logprob_is_positive():
    """exp overflows at 89, and rounding must not give probabilities above 1."""
    hidden, weight, targets, upstream = example(200, 16, 50, torch.float32)
    for scale in (1, 30, 1000):
        most_likely = (hidden @ weight.T).argmax(1)
        logp, entropy = token_logprobs(hidden * scale, weight, most_likely, entropy=True)
        assert logp.isfinite().all() and (logp <= 0).all() and (entropy > -1e-5).all()
    logp, entropy = token_logprobs(hidden * 1000, weight, targets, entropy=True)
    gradients = torch.autograd.grad((logp, entropy), (hidden, weight), list(upstream.float()))
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_autocast_rounds_the_operands_and_nothing_else(small_tiles):
    """hidden may be bfloat16 while the weight is float32, and sums stay float32."""
    hidden, weight, targets, upstream = example(20, 32, 50, torch.float32)
    rounded = [x.detach().bfloat16().double().requires_grad_() for x in (hidden, weight)]
    references = reference_logprobs(*rounded, targets, 1)
    expected_dh, expected_dw = torch.autograd.grad(references, rounded, list(upstream))
    for h in (hidden, hidden.detach().bfloat16().requires_grad_()):
        with torch.autocast("cpu", torch.bfloat16):
            results = token_logprobs(h, weight, targets, entropy=True)
            dh, dw = torch.autograd.grad(results, (h, weight), list(upstream.float()))
        assert results[0].dtype == results[1].dtype == dw.dtype == torch.float32
        assert dh.dtype == h.dtype
        for actual, expected in zip(results, references):
            torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(dw.double(), expected_dw, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(dh.double(), expected_dh, rtol=2e-2, atol=1e-4)


class Watch(TorchDispatchMode):
    """Counts operations, backward included, and the elements of the largest tensor they return."""

    operations = 0
    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        for output in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(output, torch.Tensor):
                self.largest = max(self.largest, output.numel())
        return result


@contextlib.contextmanager
def saved_tensors():
    """The tensors that autograd saves for the backward pass, in a list."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        yield saved


@pytest.mark.parametrize("entropy", [False, True])
def test_no_tensor_is_larger_than_a_tile(monkeypatch, entropy):
    """The [N, V] logits (3 GB for GPT-2 and 16k tokens) never exist, forward or backward."""
    monkeypatch.setattr(logprob, "ROWS", 64)
    monkeypatch.setattr(logprob, "COLUMNS", 256)
    n, d, v = 250, 8, 1000
    hidden, weight, targets, upstream = example(n, d, v, torch.float32)
    with Watch() as watch, saved_tensors() as saved:
        results = token_logprobs(hidden, weight, targets, entropy=entropy)
        results = results if entropy else (results,)
        torch.autograd.backward(results, list(upstream.float()[: len(results)]))
    assert watch.largest == logprob.ROWS * logprob.COLUMNS
    inputs = (hidden.data_ptr(), weight.data_ptr())
    assert sum(x.numel() for x in saved if x.data_ptr() not in inputs) <= 3 * n


def test_calls_without_gradient_save_nothing():
    """Measuring log-probs without gradients needs no memory for a backward pass."""
    hidden, weight, targets, _ = example(5, 4, 6, torch.float32)
    with torch.no_grad(), saved_tensors() as saved:
        logp, entropy = token_logprobs(hidden, weight, targets, entropy=True)
    assert not saved and not logp.requires_grad and not entropy.requires_grad


def test_an_entropy_that_is_only_logged_costs_nothing_in_the_backward_pass():
    """The backward pass skips the entropy if the loss does not depend on it."""
    hidden, weight, targets, _ = example(20, 4, 30, torch.float32)
    without_entropy = token_logprobs(hidden, weight, targets)
    with_entropy, _ = token_logprobs(hidden, weight, targets, entropy=True)
    operations = []
    for logp in (without_entropy, with_entropy):
        with Watch() as watch:
            torch.autograd.grad(logp.sum(), (hidden, weight))
        operations.append(watch.operations)
    assert operations[1] <= operations[0] + 1  # one to unpack the saved entropy


def test_no_tile_is_alive_while_the_gradients_are_cast(monkeypatch):
    """On a GPU a tile has 128 MiB, which would add to the peak of memory."""
    tiles = []
    alive_at_casts = []
    original = logprob._logit_gradients

    def recording(*arguments):
        for rows, columns, dz in original(*arguments):
            tiles.append(weakref.ref(dz))
            yield rows, columns, dz

    class RecordCasts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            is_cast = function is torch.ops.aten._to_copy.default
            if is_cast and args[0].dtype == torch.float32 and args[0].shape == (40, 8):
                alive_at_casts.append(sum(tile() is not None for tile in tiles))
            return function(*args, **(kwargs or {}))

    monkeypatch.setattr(logprob, "_logit_gradients", recording)
    hidden = torch.randn(6, 8, dtype=torch.float16, requires_grad=True)
    weight = torch.randn(40, 8, dtype=torch.float16, requires_grad=True)
    loss = token_logprobs(hidden, weight, torch.arange(6)).sum()
    with RecordCasts():
        loss.backward()
    assert tiles and alive_at_casts == [0]


@pytest.mark.parametrize("interpret", [False, True])
def test_triton_runs_where_it_can(monkeypatch, interpret):
    """On CUDA if it is installed, elsewhere only in its interpreter, which is for tests."""
    assert logprob.HAS_TRITON == (importlib.util.find_spec("triton") is not None)
    knobs = SimpleNamespace(runtime=SimpleNamespace(interpret=interpret))
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(knobs=knobs))
    monkeypatch.setattr(logprob, "HAS_TRITON", True)
    cpu = torch.zeros(1)
    cuda = SimpleNamespace(is_cuda=True, device="cuda")
    assert logprob.use_triton("auto", cuda, torch.float32)
    assert logprob.use_triton("triton", cuda, torch.float32)
    assert not logprob.use_triton("auto", cpu, torch.float32)
    assert not logprob.use_triton("auto", cuda, torch.float64)
    assert not logprob.use_triton("torch", cuda, torch.float32)
    if interpret:
        assert logprob.use_triton("triton", cpu, torch.float32)
        with pytest.raises(ValueError, match="multiplies bfloat16 incorrectly"):
            logprob.use_triton("triton", cpu, torch.bfloat16)
    else:
        assert logprob.use_triton("triton", cuda, torch.bfloat16)
        with pytest.raises(ValueError, match="needs CUDA tensors"):
            logprob.use_triton("triton", cpu, torch.float32)
    monkeypatch.setattr(logprob, "HAS_TRITON", False)
    assert not logprob.use_triton("auto", cuda, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision_products_on_a_gpu_need_no_cast(monkeypatch, dtype):
    """torch.mm with out_dtype exists on CUDA only."""
    calls = []

    def mm(a, b, out_dtype):
        calls.append(out_dtype)
        return a.to(out_dtype) @ b.to(out_dtype)

    monkeypatch.setattr(torch, "mm", mm)
    a, b = torch.randn(3, 4).to(dtype), torch.randn(4, 2).to(dtype)
    out = torch.ones(3, 2)
    logprob._add_product(out, a.as_subclass(tiny.OnCuda), b, 0.5)
    torch.testing.assert_close(out, 1.0 + 0.5 * a.float() @ b.float())
    assert calls == ([torch.float32] if dtype == torch.bfloat16 else [])


def test_second_derivatives_are_an_error():
    """The backward pass is written by hand, so its own derivative would be wrong."""
    hidden, weight, targets, _ = example(5, 4, 6, torch.float64)
    logp = token_logprobs(hidden, weight, targets)
    upstream = torch.ones_like(logp, requires_grad=True)
    (gradient,) = torch.autograd.grad(logp, hidden, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


HIDDEN = torch.zeros(3, 4)
WEIGHT = torch.zeros(5, 4)
TARGETS = torch.tensor([0, 4, 2])


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(hidden=torch.zeros(3, 4, 1)), r"hidden .*\[3, 4, 1\]"),
        (dict(hidden=torch.zeros(0, 4), targets=TARGETS[:0]), r"hidden .*\[0, 4\]"),
        (dict(hidden=HIDDEN.long()), r"hidden .*int64 \[3, 4\]"),
        (dict(weight=torch.zeros(5)), r"weight .*\[5\]"),
        (dict(weight=torch.zeros(0, 4)), r"weight .*\[0, 4\]"),
        (dict(weight=torch.zeros(4, 5)), r"weight .*\[4, 5\]"),
        (dict(weight=WEIGHT.double()), r"weight .*float64 \[5, 4\]"),
        (dict(weight=WEIGHT.to("meta")), r"weight .*\[5, 4\] on meta"),
        (dict(targets=torch.tensor([0, 1])), r"targets .*\[2\]"),
        (dict(targets=TARGETS[:, None]), r"targets .*\[3, 1\]"),
        (dict(targets=TARGETS.int()), r"targets .*int32 \[3\]"),
        (dict(targets=TARGETS.to("meta")), r"targets .*\[3\] on meta"),
        (dict(targets=torch.tensor([0, 5, 1])), r"targets must be in \[0, 5\).*\[3\]"),
        (dict(targets=torch.tensor([0, -1, 1])), r"targets must be in \[0, 5\).*\[3\]"),
        (dict(temperature=0.0), "temperature .*0.0"),
        (dict(temperature=-1), "temperature .*-1"),
        (dict(temperature=math.nan), "temperature .*nan"),
        (dict(impl="cuda"), "impl .*cuda"),
        (dict(vocab_size=0), "vocab_size must be from 1 to 5, .*got 0"),
        (dict(vocab_size=6), "vocab_size must be from 1 to 5, .*got 6"),
        (dict(vocab_size=int(TARGETS.max())), r"targets must be in \[0, "),
    ],
)
def test_an_error_of_token_logprobs_names_the_argument(changed, message):
    """The message contains the argument, and its dtype and shape or its value."""
    arguments = dict(hidden=HIDDEN, weight=WEIGHT, targets=TARGETS) | changed
    with pytest.raises(ValueError, match=message):
        token_logprobs(**arguments)


# ---- discounted returns --------------------------------------------------------------------------

# (B, R): one column, exactly one block, and lengths that are no multiple of a block
RETURN_SHAPES = [(1, 1), (3, 2), (5, 31), (4, 32), (6, 33), (9, 100), (2, 257)]


def check_returns(shape, gamma, dtype, tolerance, impl="torch", device="cpu"):
    """Compare with the reference: rows of many lengths, with NaN, infinity and 6e4 as padding."""
    batch, length = shape
    rewards = torch.randn(shape, generator=torch.Generator().manual_seed(length)).to(dtype)
    six_lengths = torch.tensor([length, 0, 1, length - 1, length // 2, 32])
    lengths = six_lengths[torch.arange(batch) % 6].clamp(0, length)
    mask = torch.arange(length) < lengths[:, None]
    padding = torch.tensor([math.nan, math.inf, 6e4])[torch.arange(length) % 3].to(dtype)
    padded = torch.where(mask, rewards, padding)
    actual = discounted_returns(padded.to(device), mask.to(device), gamma, impl).cpu()
    assert actual.dtype == torch.promote_types(dtype, torch.float32) and actual.shape == shape
    expected = reference_returns(rewards, mask, gamma)
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)
    assert not actual[~mask].any()


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)]
)
@pytest.mark.parametrize("gamma", [0, 0.9, 1.0])
@pytest.mark.parametrize("shape", RETURN_SHAPES)
def test_returns_equal_the_reference_for_any_padding(shape, gamma, dtype, tolerance):
    """Covers one column, one block, several blocks, and empty rows."""
    check_returns(shape, gamma, dtype, tolerance)


@pytest.mark.parametrize("gamma", [0.5, 0.99])
def test_the_return_of_a_small_loss_and_a_later_gain(gamma):
    """Rewards are -1 at step 1 and 100 at step 8: the return is gamma (-1) + gamma^8 100."""
    rewards = torch.zeros(1, 12, dtype=torch.float64)
    rewards[0, 1] = -1
    rewards[0, 8] = 100
    returns = discounted_returns(rewards, torch.ones(1, 12), gamma)
    assert math.isclose(returns[0, 0], -gamma + 100 * gamma**8, rel_tol=1e-12)
    assert math.isclose(returns[0, 8], 100) and not returns[0, 9:].any()


@pytest.mark.parametrize("length", [32, 40])
def test_rewards_and_mask_may_be_strided(length):
    """Catches code that assumes contiguous rows."""
    rewards = torch.randn(length, 8)[:, ::2].T
    mask = (torch.arange(length)[:, None] < torch.tensor([length, 7, 1, 0])).T
    assert not rewards.is_contiguous() and not mask.is_contiguous()
    expected = discounted_returns(rewards.contiguous(), mask.contiguous(), 0.9)
    assert torch.equal(discounted_returns(rewards, mask, 0.9), expected)


def test_masks_of_any_type_give_the_same_returns_and_no_argument_is_changed():
    """A mask of 0 and 1 may be bool, integer or float."""
    rewards = torch.randn(4, 40)
    mask = torch.arange(40) < torch.tensor([[40], [7], [1], [0]])
    copied = rewards.clone()
    expected = discounted_returns(rewards, mask, 0.9)
    for other in (mask.float(), mask.long(), mask.double()):
        assert torch.equal(discounted_returns(rewards, other, 0.9), expected)
    assert torch.equal(rewards, copied)


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(rewards=torch.zeros(3)), r"rewards .*\[3\]"),
        (dict(rewards=torch.zeros(0, 3)), r"rewards .*\[0, 3\]"),
        (dict(rewards=torch.zeros(2, 3).int()), r"rewards .*int32 \[2, 3\]"),
        (dict(rewards=torch.zeros(2, 3, requires_grad=True)), r"rewards .*\[2, 3\].*require grad"),
        (dict(mask=torch.ones(3, 2)), r"mask .*\[3, 2\]"),
        (dict(mask=torch.ones(2, 3, device="meta")), r"mask .*\[2, 3\] on meta"),
        (dict(mask=torch.tensor([[1, 1, 1], [1, 0, 1]])), r"mask must be a prefix .*\[2, 3\]"),
        (dict(mask=torch.tensor([[0, 1, 1], [1, 1, 1]])), r"mask must be a prefix .*\[2, 3\]"),
        (dict(mask=torch.full((2, 3), 0.5)), r"mask must be a prefix .*\[2, 3\]"),
        (dict(mask=torch.full((2, 3), math.nan)), r"mask must be a prefix .*\[2, 3\]"),
        (dict(gamma=1.01), "gamma .*1.01"),
        (dict(gamma=-0.1), "gamma .*-0.1"),
        (dict(gamma=math.nan), "gamma .*nan"),
        (dict(impl="numpy"), "impl .*numpy"),
    ],
)
def test_an_error_of_discounted_returns_names_the_argument(changed, message):
    """The message contains the argument, and its dtype and shape or its value."""
    arguments = dict(rewards=torch.zeros(2, 3), mask=torch.ones(2, 3), gamma=0.9) | changed
    with pytest.raises(ValueError, match=message):
        discounted_returns(**arguments)
