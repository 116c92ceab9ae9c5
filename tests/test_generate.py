"""Sampling draws from the distribution whose log-probs the update computes."""

import math

from minirlhf.data.batches import pad_left
from minirlhf.model import fast_decode
from minirlhf.model import generate as generate_module
from minirlhf.model.cache import KVCache
from minirlhf.model.fast_decode import SMALLEST, fast_linear_layers, reordered
from minirlhf.model.generate import filter_logits, generate, sample_tokens
from minirlhf.model.transformer import ModelConfig, Transformer
from minirlhf.rl.rollout import evaluate_actions
from minirlhf.run.seeding import row_uniforms

import pytest
import tiny
import torch
from tiny import make_samples, random_model
from torch import Tensor

EOS = 10
VOCAB = 11
PAD = 11
LIMIT = 8  # maximum response length
PROMPTS = [[1, 2, 3, 4], [5], [6, 7], [8, 1, 5], [2], [9, 9, 9]]
HAS_ONEDNN = torch.backends.mkldnn.is_available()


def ending_model(seed: int = 3) -> Transformer:
    """A model whose responses have many different lengths."""
    return random_model(seed, spread=0.4)


def plain_generate(model, prompt, uniforms, temperature=1.0) -> list[int]:
    """One response by the simplest loop: no cache, no batch, no padding; None is greedy."""
    tokens = []
    for t in range(LIMIT):
        ids = torch.tensor([prompt + tokens])
        hidden = model(ids, torch.ones_like(ids, dtype=torch.bool))[0, -1]
        logits = hidden @ model.lm_weight.T
        if uniforms is None:
            tokens.append(int(logits.argmax()))
        else:
            cumulative = (logits / temperature).softmax(0).cumsum(0)
            tokens.append(next(i for i in range(VOCAB) if cumulative[i] > uniforms[t]))
        if tokens[-1] == EOS:
            break
    return tokens


def responses(model, prompts, uniforms=None, temperature=1.0, top_k=0, top_p=1.0):
    """The sampled tokens of each row. Also checks the mask and the padding."""
    response, mask = generate(
        model, *pad_left(prompts, PAD), LIMIT, EOS, PAD, uniforms, temperature, top_k, top_p
    )
    assert response.shape == mask.shape and mask.dtype == torch.bool and mask.any(0).all()
    lengths = mask.sum(1)
    assert torch.equal(mask, torch.arange(mask.shape[1]) < lengths[:, None])  # a prefix of ones
    assert (response[~mask] == PAD).all()
    tokens = [row[:n].tolist() for row, n in zip(response, lengths.tolist())]
    for row in tokens:
        assert EOS not in row[:-1]
        assert row[-1] == EOS or len(row) == LIMIT
    return tokens


# ---- faster linear layers ------------------------------------------------------------------------


def wide_model(seed: int = 0) -> Transformer:
    """2 layers, in which the two matrices of each MLP and the LM head have SMALLEST elements."""
    form = tiny.FORM | (dict(d_mlp=1024) if "d_mlp" in tiny.FORM else {})
    config = ModelConfig(1100, table_rows=1104, n_layer=2, d_model=256, context=8, **form)
    return Transformer(config, seed)


@pytest.mark.skipif(not HAS_ONEDNN, reason="no oneDNN on this processor")
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_reordered_matrix_gives_the_same_product_by_onednn(with_bias):
    """The copy is in oneDNN's order, and oneDNN multiplies with it."""
    weight = torch.randn(1024, 256)
    bias = torch.randn(1024) if with_bias else None
    x = torch.randn(8, 256)
    multiply = reordered(weight, bias, 8)
    with torch.profiler.profile() as profile:
        product = multiply(x)
    assert "mkldnn::_linear_pointwise" in {event.name for event in profile.events()}
    expected = torch.nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(product, expected, rtol=1e-4, atol=1e-4)


def test_only_matrices_of_at_least_the_smallest_size_are_copied():
    """Small matrices stay in the processor's cache, so a copy would not be faster."""
    model = wide_model()
    with fast_linear_layers(model, 2) as lm_head:
        for block in model.blocks:
            assert block.mlp_in.weight.numel() == block.mlp_out.weight.numel() == SMALLEST
            assert block.attention_in.weight.numel() < SMALLEST
            assert ("forward" in vars(block.mlp_in)) == HAS_ONEDNN
            assert ("forward" in vars(block.mlp_out)) == HAS_ONEDNN
            assert "forward" not in vars(block.attention_in)
            assert "forward" not in vars(block.attention_out)
        assert ("forward" in vars(lm_head)) == HAS_ONEDNN
    small = random_model()
    with fast_linear_layers(small, 2) as lm_head:
        assert not any("forward" in vars(layer) for layer in (*small.modules(), lm_head))


def test_fast_linear_layers_give_the_same_logits(form):
    """The copies are of this model's current weights, and they are removed afterwards.

    The weights change at the next update, so an old copy would be wrong.
    """
    model = wide_model().requires_grad_(False)
    pad = model.config.vocab_size
    ids, mask = pad_left([[5, 6, 7], [8, 9]], pad)
    next_ids = torch.tensor([3, 4])

    def fast_logits() -> Tensor:
        cache = KVCache(model.config, mask, 1, torch.float32)
        model(ids, mask, cache)
        with fast_linear_layers(model, 2) as lm_head:
            return lm_head(model.decode(next_ids, cache))

    def plain_logits() -> Tensor:
        longer_ids = torch.cat([ids, next_ids[:, None]], 1)
        longer_mask = torch.cat([mask, mask[:, -1:]], 1)
        return model(longer_ids, longer_mask)[:, -1] @ model.lm_weight.T

    first = fast_logits()
    torch.testing.assert_close(first, plain_logits(), rtol=0, atol=1e-4)
    assert first.shape == (2, model.config.vocab_size)
    for parameter in model.parameters():
        parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(fast_logits(), plain_logits(), rtol=0, atol=1e-4)
    assert not torch.allclose(fast_logits(), first, atol=1e-2)
    assert not any("forward" in vars(layer) for layer in model.modules())


@pytest.mark.parametrize("fails_at", [1, 3, 5])
def test_no_copies_remain_if_memory_runs_out(fails_at, monkeypatch):
    """A layer that still used its copy would get no gradient and never change."""
    model = wide_model()
    calls = []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == fails_at:
            raise MemoryError
        return reordered(*arguments)

    monkeypatch.setattr(fast_decode, "reordered", failing)
    if HAS_ONEDNN:
        with pytest.raises(MemoryError):
            generate(model, *pad_left([[5, 6]], 1100), 2, 1099, 1100)
        assert len(calls) == fails_at
    assert not any("forward" in vars(layer) for layer in model.modules())


@pytest.mark.parametrize(
    "compiler", [pytest.param(torch.compile, marks=pytest.mark.slow), lambda part, dynamic: part]
)
def test_a_compiled_model_decodes_with_its_own_weights(compiler, monkeypatch):
    """The compiler fails on reordered copies."""
    monkeypatch.setattr(torch, "compile", compiler)
    plain = wide_model()
    compiled = wide_model()
    compiled.compile_blocks()
    with fast_linear_layers(compiled, 2) as lm_head:
        assert not any("forward" in vars(layer) for layer in (*compiled.modules(), lm_head))
    prompts = pad_left([[5, 6, 7], [8, 9]], 1100)
    expected, _ = generate(plain, *prompts, 5, 1099, 1100)
    actual, _ = generate(compiled, *prompts, 5, 1099, 1100)
    assert torch.equal(actual, expected)


# ---- generate equals the simplest loop -----------------------------------------------------------


def test_greedy_decoding_equals_the_argmax_loop_without_a_cache(form):
    """Catches a cache that is off by one position."""
    for seed in range(4):
        model = ending_model(seed)
        expected = [plain_generate(model, prompt, None) for prompt in PROMPTS]
        assert responses(model, PROMPTS) == expected


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampling_equals_the_simplest_loop_while_rows_leave_the_batch(temperature, form):
    """Catches random numbers, keys or places of another row after finished rows have left."""
    model = ending_model()
    prompts = PROMPTS * 8
    uniforms = row_uniforms(0, "test", 0, list(range(48)), LIMIT)
    tokens = responses(model, prompts, uniforms, temperature)
    assert len({len(row) for row in tokens}) >= 4  # rows leave at different times
    pairs = zip(prompts, uniforms)
    assert tokens == [plain_generate(model, prompt, u, temperature) for prompt, u in pairs]


@pytest.mark.parametrize("every", [2, 3, 16])
def test_finished_rows_may_leave_the_batch_later(every, monkeypatch, form):
    """A GPU removes finished rows only every few tokens; the result must be the same."""
    model = random_model()
    ids, mask = pad_left([[1, 2, 3], [4], [5, 6]] * 20, PAD)
    uniforms = row_uniforms(0, "later", 0, list(range(60)), LIMIT)
    expected = generate(model, ids, mask, LIMIT, EOS, PAD, uniforms)
    monkeypatch.setitem(generate_module.COMPACT_EVERY, "cpu", every)
    actual = generate(model, ids, mask, LIMIT, EOS, PAD, uniforms)
    assert len(set(expected[1].sum(1).tolist())) > 3
    for ours, theirs in zip(actual, expected):
        assert torch.equal(ours, theirs)


def test_samples_do_not_depend_on_the_batch_or_its_order(form):
    """One generator for the whole batch would make samples depend on memory settings."""
    model = ending_model()
    prompts = PROMPTS * 4
    numbers = list(range(100, 124))

    def sample(indices):
        uniforms = row_uniforms(7, "rollout", 5, [numbers[i] for i in indices], LIMIT)
        return dict(zip(indices, responses(model, [prompts[i] for i in indices], uniforms)))

    together = sample(list(range(24)))
    alone = {}
    for i in range(24):
        alone |= sample([i])
    shuffled = sample(torch.randperm(24, generator=torch.Generator().manual_seed(0)).tolist())
    assert together == alone == shuffled


def test_random_numbers_differ_between_seeds_purposes_steps_and_rows():
    """Two rows with the same random numbers would be one sample counted twice."""
    draws = [
        row_uniforms(seed, purpose, step, [row], 4)
        for seed in (0, 1)
        for purpose in ("rollout", "evaluate")
        for step in (0, 1)
        for row in (0, 1)
    ]
    assert len({tuple(draw[0].tolist()) for draw in draws}) == 16
    many = row_uniforms(0, "rollout", 0, list(range(200)), 500)
    assert many.dtype == torch.float32 and many.min() >= 0.0 and many.max() < 1.0
    assert many.mean() == pytest.approx(0.5, abs=0.005)


def test_random_numbers_do_not_use_the_global_generator():
    """The global generator neither affects the numbers nor is changed by them."""
    expected = row_uniforms(0, "rollout", 0, [3], 500)
    torch.manual_seed(0)
    assert torch.equal(row_uniforms(0, "rollout", 0, [3], 500), expected)
    many = row_uniforms(0, "rollout", 0, list(range(200)), 500)
    assert torch.equal(many[3], expected[0])
    assert torch.initial_seed() == 0
    assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(0)))


# ---- which tokens are possible -------------------------------------------------------------------


def test_padding_rows_of_the_table_are_never_sampled(form):
    """An id after the vocabulary has no text and no log-prob."""
    model = random_model()
    model.lm_table[VOCAB:] *= 100
    hidden = model(*pad_left(PROMPTS, PAD))[:, -1]
    # a softmax over the whole table would choose them
    assert ((hidden @ model.lm_table.T).argmax(-1) >= VOCAB).any()
    for uniforms in (
        None,
        row_uniforms(0, "test", 0, list(range(6)), LIMIT),
        torch.full((6, LIMIT), 1 - 2**-24),
    ):
        for options in (dict(), dict(top_k=40), dict(top_p=0.99), dict(temperature=5.0)):
            tokens = responses(model, PROMPTS, uniforms, **options)
            assert max(map(max, tokens)) < VOCAB


def test_one_row_of_one_token():
    """The loop ends before a second forward pass."""
    response, mask = generate(random_model(), *pad_left([[1]], PAD), 1, EOS, PAD)
    assert response.shape == (1, 1) and mask.tolist() == [[True]]


def test_a_response_may_be_eos_alone():
    """EOS as the first action has mask 1 and length 1."""
    model = random_model()
    first = responses(model, [[1]])[0][0]
    response, mask = generate(model, *pad_left([[1]] * 3, PAD), LIMIT, first, PAD)
    assert response.tolist() == [[first]] * 3 and mask.tolist() == [[True]] * 3


@pytest.mark.parametrize(
    "options",
    [
        dict(top_k=-1),
        dict(top_p=0.0),
        dict(top_p=1.1),
        dict(temperature=0.0),
        dict(max_response_length=0),
    ],
)
def test_impossible_settings_are_an_error_that_names_them(options):
    """Otherwise temperature 0 would give NaN, and then token 0 in every place."""
    settings = dict(max_response_length=2, eos=EOS, pad=PAD, uniforms=torch.zeros(1, 2)) | options
    with pytest.raises(ValueError, match=next(iter(options))):
        generate(random_model(), *pad_left([[1]], PAD), **settings)


# ---- inverse CDF ---------------------------------------------------------------------------------

BELOW_ONE = 1.0 - 2.0**-24  # the largest float32 below 1


def draw(probabilities: list[float], u: float) -> int:
    return sample_tokens(torch.tensor([probabilities]).log(), torch.tensor([u])).item()


@pytest.mark.parametrize(
    "u, token", [(0.0, 0), (0.2499, 0), (0.2501, 1), (0.4999, 1), (0.5001, 2), (BELOW_ONE, 2)]
)
def test_inverse_cdf_by_hand(u, token):
    """Token i is drawn for u between the cumulative probabilities of i - 1 and i."""
    assert draw([0.25, 0.25, 0.5], u) == token


@pytest.mark.parametrize(
    "probabilities, u, token",
    [
        ([0.0, 0.0, 1.0, 0.0], 0.0, 2),
        ([0.0, 0.0, 1.0, 0.0], BELOW_ONE, 2),
        ([0.5, 0.0, 0.5, 0.0], 0.5, 2),  # u on the boundary
        ([0.5, 0.0, 0.5, 0.0], BELOW_ONE, 2),
        ([0.0, 1.0], 0.0, 1),
        ([1.0], BELOW_ONE, 0),
    ],
)
def test_a_token_of_probability_zero_is_never_drawn(probabilities, u, token):
    """Catches >= instead of > at u = 0, and an index after the last token at u near 1."""
    assert draw(probabilities, u) == token


def test_the_largest_uniform_gives_a_token_of_the_vocabulary():
    """Float32 probabilities of 50,000 tokens sum to a little less or more than 1."""
    logits = torch.randn(64, 50_000, generator=torch.Generator().manual_seed(0))
    logits *= torch.linspace(0, 8, 64)[:, None]
    logits[:, -100:] = float("-inf")
    for u in (0.0, BELOW_ONE):
        assert sample_tokens(logits, torch.full((64,), u)).max() < 49_900


def test_a_sum_times_the_largest_uniform_is_less_than_the_sum():
    """Holds for every float32 sum in [0.5, 2), so the target is below the last cumulative sum."""
    one_half = torch.tensor(0.5).view(torch.int32)
    sums = (torch.arange(2**23, dtype=torch.int32) + one_half).view(torch.float32)
    assert sums[0] == 0.5 and sums[-1] < 1.0
    for scaled in (sums, 2 * sums):
        assert (scaled * torch.tensor(BELOW_ONE) < scaled).all()


def test_probabilities_are_summed_in_float64_on_a_gpu(monkeypatch):
    """In float32 its parallel sum can fall from one token to the next."""
    dtypes = []
    cumsum = torch.Tensor.cumsum

    def recording(x, dim, dtype):
        dtypes.append(dtype)
        return cumsum(x, dim, dtype=dtype)

    monkeypatch.setattr(torch.Tensor, "cumsum", recording)
    logits = torch.zeros(1, 3)
    assert sample_tokens(logits, torch.tensor([0.5])).tolist() == [1]
    assert sample_tokens(logits.as_subclass(tiny.OnCuda), torch.tensor([0.5])).tolist() == [1]
    assert dtypes[0] == torch.float32 and set(dtypes[1:]) == {torch.float64}


def test_sampling_does_not_change_its_arguments():
    """Catches logits that are divided by the temperature in place."""
    logits = torch.randn(3, 5)
    uniforms = torch.rand(3)
    copies = (logits.clone(), uniforms.clone())
    sample_tokens(logits, uniforms)
    filter_logits(logits, 2, 0.5)
    assert torch.equal(logits, copies[0]) and torch.equal(uniforms, copies[1])


# ---- frequencies ---------------------------------------------------------------------------------


def chi_square_limit(df: int) -> float:
    """The value that chance exceeds once in 10,000 times (Wilson and Hilferty 1931)."""
    return df * (1 - 2 / (9 * df) + 3.72 * math.sqrt(2 / (9 * df))) ** 3


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    expected = probabilities.double() * counts.sum()
    return ((counts - expected) ** 2 / expected).sum().item()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_frequencies_agree_with_the_log_probs(temperature):
    """Catches a temperature that differs between sampling and training."""
    model = random_model(1, spread=0.25)
    count = 8000
    prompt, mask = (x.expand(count, -1) for x in pad_left([[3, 1, 4]], PAD))
    uniforms = row_uniforms(0, "test", 0, list(range(count)), 2)
    response, response_mask = generate(model, prompt, mask, 2, EOS, PAD, uniforms, temperature)
    samples = make_samples(prompt, mask, response, response_mask)
    logprobs, _, _ = evaluate_actions(model, samples, temperature)

    def check(tokens, logprobs):
        counts = torch.bincount(tokens, minlength=VOCAB)
        p = torch.zeros(VOCAB).scatter(0, tokens, logprobs.exp())
        assert (counts[p == 0] == 0).all() and p.sum() == pytest.approx(1.0, abs=0.01)
        seen = p > 0
        assert chi_square(counts[seen], p[seen] / p.sum()) < chi_square_limit(int(seen.sum()) - 1)

    first = response[:, 0]
    check(first, logprobs[:, 0])
    most_frequent = first[first != EOS].mode().values
    same_state = first == most_frequent
    check(response[same_state, 1], logprobs[same_state, 1])


# ---- top-k and top-p -----------------------------------------------------------------------------


def kept(probabilities, top_k=0, top_p=1.0) -> list[int]:
    """The tokens that filter_logits keeps. Also checks that it does not change their logits."""
    logits = torch.tensor([probabilities]).log()
    filtered = filter_logits(logits, top_k, top_p)
    stay = filtered > float("-inf")
    assert torch.equal(filtered[stay], logits[stay])
    return stay[0].nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    "top_k, expected", [(0, [0, 1, 2, 3]), (1, [1]), (2, [1, 3]), (3, [1, 2, 3]), (9, [0, 1, 2, 3])]
)
def test_top_k_by_hand(top_k, expected):
    """top_k keeps the k most likely tokens; 0 and a k larger than the vocabulary keep all."""
    assert kept([0.05, 0.5, 0.15, 0.3], top_k=top_k) == expected


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_top_k_keeps_k_tokens_if_logits_are_equal(top_k):
    """A threshold at the k-th logit would keep all of them."""
    assert len(kept([0.25, 0.25, 0.25, 0.25], top_k=top_k)) == top_k


def test_top_p_applies_after_the_temperature():
    """The most likely token has a probability of 0.8 at temperature 0.5, and of 0.59 at 1."""
    model = random_model(spread=0.0)
    with torch.no_grad():
        model.ln_f.bias.fill_(1.0)
        model.ln_f.weight.zero_()
        model.wte.weight.zero_()
        model.wte.weight[:3, 0] = torch.tensor([0.8, 0.1, 0.1]).log() / 2 + 40.0
    ids, mask = (x.expand(500, -1) for x in pad_left([[1]], PAD))
    uniforms = torch.rand(500, 1)

    def tokens(temperature: float) -> set[int]:
        response, _ = generate(
            model, ids, mask, 1, EOS, PAD, uniforms, temperature=temperature, top_p=0.7
        )
        return set(response.flatten().tolist())

    assert tokens(0.5) == {0}
    assert tokens(1.0) == {0, 1}


@pytest.mark.parametrize(
    "top_p, expected",
    [
        (0.01, [1]),
        (0.49, [1]),
        (0.51, [1, 3]),
        (0.79, [1, 3]),
        (0.81, [1, 2, 3]),
        (0.96, [0, 1, 2, 3]),
        (1.0, [0, 1, 2, 3]),
    ],
)
def test_top_p_by_hand(top_p, expected):
    """top_p keeps the smallest set of probability p: the token that reaches p is in it."""
    assert kept([0.05, 0.5, 0.15, 0.3], top_p=top_p) == expected
    assert len(kept([0.25, 0.25, 0.25, 0.25], top_p=0.5)) == 2  # reached exactly


def test_top_p_applies_to_the_tokens_that_top_k_keeps():
    """0.5 and 0.3 are 62.5% and 37.5% of the two tokens that top_k keeps."""
    assert kept([0.05, 0.5, 0.15, 0.3], top_k=2, top_p=0.6) == [1]
    assert kept([0.05, 0.5, 0.15, 0.3], top_k=2, top_p=0.65) == [1, 3]


def test_top_k_of_one_is_greedy():
    """With top_k = 1 the random numbers have no effect."""
    model = ending_model()
    assert responses(model, PROMPTS, torch.rand(6, LIMIT), top_k=1) == responses(model, PROMPTS)


def test_tokens_that_were_filtered_out_are_never_sampled():
    """Uses random numbers over the whole unit interval, both ends included."""
    logits = filter_logits(torch.tensor([[0.05, 0.5, 0.15, 0.3]]).log(), 2, 1.0).expand(1002, -1)
    uniforms = torch.cat([torch.linspace(0, BELOW_ONE, 1000), torch.tensor([0.0, BELOW_ONE])])
    assert set(sample_tokens(logits, uniforms).tolist()) == {1, 3}
