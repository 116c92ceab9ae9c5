"""The sampler draws from the distribution whose log-probs the learner computes, and from nothing else."""

import math

import pytest
import torch
from tiny import random_model

from minirlhf.data import pad_left
from minirlhf.generate import filter_logits, gelu_by_sigmoid, generate, packed, sample_tokens, weights_packed
from minirlhf.model import KVCache, ModelConfig, Transformer
from minirlhf.rollout import evaluate_actions
from minirlhf.seeding import row_uniforms

EOS, PAD, VOCAB, LIMIT = 10, 11, 11, 8
PROMPTS = [[1, 2, 3, 4], [5], [6, 7], [8, 1, 5], [2], [9, 9, 9]]


def ending_model(seed=3):
    """One whose replies end at all sorts of lengths."""
    return random_model(seed, spread=0.4)


def plain_generate(model, prompt, uniforms, temperature=1.0):
    """One reply by the plainest loop: no cache, no batch, no padding; uniforms None is greedy."""
    tokens = []
    for t in range(LIMIT):
        ids = torch.tensor([prompt + tokens])
        logits = model(ids, torch.ones_like(ids, dtype=torch.bool))[0, -1] @ model.wte.weight[:VOCAB].T
        if uniforms is None:
            tokens.append(int(logits.argmax()))
        else:
            cumulative = (logits / temperature).softmax(0).cumsum(0)
            tokens.append(next(i for i in range(VOCAB) if cumulative[i] > uniforms[t]))
        if tokens[-1] == EOS:
            break
    return tokens


def replies(model, prompts, **options):
    """Each row's sampled tokens, with the shape of the mask and of the padding checked."""
    response, mask = generate(model, *pad_left(prompts, PAD), LIMIT, EOS, PAD, **options)
    assert response.shape == mask.shape and mask.dtype == torch.bool and mask.any(0).all()
    lengths = mask.sum(1)
    assert torch.equal(mask, torch.arange(mask.shape[1]) < lengths[:, None])  # a prefix of ones
    assert (response[~mask] == PAD).all()
    found = [row[:n].tolist() for row, n in zip(response, lengths.tolist())]
    for row in found:
        assert EOS not in row[:-1] and (row[-1] == EOS or len(row) == LIMIT)  # the mask counts EOS, and ends with it
    return found


@pytest.mark.parametrize("rows_of_weight, kind", [(256, "aten::addmm"), (1024, "mkldnn::_linear_pointwise")])
def test_matrices_are_copied_in_the_order_that_is_read_fastest_at_their_size(rows_of_weight, kind):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("no oneDNN on this processor")
    weight, bias, x = (torch.randn(*shape) for shape in ((rows_of_weight, 256), (rows_of_weight,), (8, 256)))
    multiply = packed(weight, bias, 8)
    with torch.profiler.profile() as profile:
        found = multiply(x)
    assert kind in {event.name for event in profile.events()}
    torch.testing.assert_close(found, torch.nn.functional.linear(x, weight, bias), rtol=1e-4, atol=1e-4)


def test_the_quicker_gelu_is_the_one_that_was_trained():
    """For every finite number, those included at which a power overflows."""
    x = torch.cat([torch.linspace(-12.0, 12.0, 4001), torch.tensor([0.0, -1e4, 1e4, -1e30, 1e30])])
    torch.testing.assert_close(gelu_by_sigmoid(x), torch.nn.functional.gelu(x, approximate="tanh"), rtol=1e-6, atol=1e-6)


def test_a_model_decodes_the_same_with_copies_of_its_weights():
    """The packed copies must be of this model's matrices and of the rows of its softmax, and must be gone afterwards: the
    weights change at the next update."""
    model = Transformer(ModelConfig(50257, table_rows=50304, n_layer=2, n_head=2, d_model=256, context=8)).requires_grad_(False)
    ids, mask = pad_left([[5, 6, 7], [8, 9]], 50257)
    one_more = torch.tensor([3, 4])

    def logits():
        cache = KVCache(model, mask)
        model(ids, mask, cache)
        with weights_packed(model, 2) as logits_of:
            for layer in (model.blocks[0].mlp_in, model.blocks[0].gelu):
                assert (layer.forward.__module__ == "minirlhf.generate") == torch.backends.mkldnn.is_available()
            return logits_of(model.decode(one_more, cache))

    def plain():
        return model(torch.cat([ids, one_more[:, None]], 1), torch.cat([mask, mask[:, -1:]], 1))[:, -1] @ model.lm_weight.T

    torch.testing.assert_close(logits(), plain(), rtol=0, atol=1e-4)
    for parameter in model.parameters():
        parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(logits(), plain(), rtol=0, atol=1e-4)
    assert "forward" not in vars(model.blocks[0].mlp_in)


@pytest.mark.parametrize("fails_at", [1, 3, 6, 9])
def test_no_packed_weights_are_left_over_where_memory_runs_out(fails_at, monkeypatch):
    """A layer that went on multiplying by its copy would get no gradient, and say the same after every update."""
    model, count = Transformer(ModelConfig(50257, 50304, 2, 2, 96, context=8)), iter(range(1, 100))

    def pack(*arguments):
        if next(count) == fails_at:
            raise MemoryError
        return packed(*arguments)

    monkeypatch.setattr("minirlhf.generate.packed", pack)
    if torch.backends.mkldnn.is_available():
        with pytest.raises(MemoryError):
            generate(model, *pad_left([[5, 6]], 50257), 2, 50256, 50257)
    assert not any("forward" in vars(layer) for layer in model.modules())


@pytest.mark.parametrize("compiler", [pytest.param(torch.compile, marks=pytest.mark.slow), lambda part, dynamic: part])
def test_a_compiled_model_decodes_with_its_own_weights(compiler, monkeypatch):
    """The compiler fails on packed copies, with a traceback, and after train_reward.py has done all its steps."""
    monkeypatch.setattr(torch, "compile", compiler)
    plain, compiled = (Transformer(ModelConfig(50257, 50304, 1, 2, 96, context=8)) for _ in range(2))
    compiled.compile_blocks()
    with weights_packed(compiled, 2):
        assert not any("forward" in vars(layer) for layer in compiled.modules())
    prompts = pad_left([[5, 6, 7], [8, 9]], 50257)
    ours, theirs = (generate(model, *prompts, 5, 50256, 50257)[0] for model in (plain, compiled))
    assert torch.equal(ours, theirs)


# ---- generate equals the plain loop ----------------------------------------------------------------------------------


def test_greedy_equals_the_argmax_loop_without_a_cache():
    """A cache off by one position still writes fluent text, only not this model's."""
    for seed in range(4):
        model = ending_model(seed)
        assert replies(model, PROMPTS) == [plain_generate(model, prompt, None) for prompt in PROMPTS]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampling_equals_the_plain_loop_while_finished_rows_leave_the_batch(temperature):
    """After rows have left, a sampler that mixes up rows takes a neighbour's random numbers, cache or place."""
    model, prompts = ending_model(), PROMPTS * 8
    uniforms = row_uniforms(0, "test", 0, list(range(48)), LIMIT)
    found = replies(model, prompts, uniforms=uniforms, temperature=temperature)
    assert len({len(row) for row in found}) >= 4  # else nothing left the batch on the way
    assert found == [plain_generate(model, prompt, u, temperature) for prompt, u in zip(prompts, uniforms)]


def test_the_same_seed_samples_the_same_whatever_the_batch_and_the_order():
    """With one generator for the batch, memory settings and resuming change what is sampled."""
    model, prompts = ending_model(), PROMPTS * 4
    rows = list(range(100, 124))

    def sample(some):
        uniforms = row_uniforms(7, "rollout", 5, [rows[i] for i in some], LIMIT)
        return dict(zip(some, replies(model, [prompts[i] for i in some], uniforms=uniforms)))

    together = sample(list(range(24)))
    alone = {i: reply for i in range(24) for reply in sample([i]).values()}
    shuffled = sample(torch.randperm(24, generator=torch.Generator().manual_seed(0)).tolist())
    assert together == alone == shuffled


def test_random_numbers_differ_between_seeds_purposes_steps_and_rows():
    """Two rows (or two iterations) with the same random numbers are one sample counted twice."""
    draws = [row_uniforms(seed, purpose, step, [row], 4) for seed in (0, 1) for purpose in ("rollout", "evaluate")
             for step in (0, 1) for row in (0, 1)]
    assert len({tuple(draw[0].tolist()) for draw in draws}) == 16
    many = row_uniforms(0, "rollout", 0, list(range(200)), 500)
    assert many.dtype == torch.float32 and many.min() >= 0.0 and many.max() < 1.0
    assert many.mean() == pytest.approx(0.5, abs=0.005)
    torch.manual_seed(0)
    again = row_uniforms(0, "rollout", 0, [3], 500)
    assert torch.equal(again[0], many[3])  # no global generator is read, and none is moved
    assert torch.initial_seed() == 0 and torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(0)))


# ---- which tokens can come ------------------------------------------------------------------------------------------


def test_padding_and_rounding_rows_are_never_sampled():
    """An id beyond the vocabulary decodes to nothing, or crashes, and was in no log-prob."""
    model = random_model()
    model.wte.weight[VOCAB:] *= 100
    prompt = pad_left(PROMPTS, PAD)
    hidden = model(*prompt)[:, -1]
    assert ((hidden @ model.wte.weight.T).argmax(-1) >= VOCAB).any()  # what a softmax over the whole table would say
    for uniforms in (None, row_uniforms(0, "test", 0, list(range(6)), LIMIT), torch.full((6, LIMIT), 1 - 2 ** -24)):
        for options in (dict(), dict(top_k=40), dict(top_p=0.99), dict(temperature=5.0)):
            assert max(token for row in replies(model, PROMPTS, uniforms=uniforms, **options) for token in row) < VOCAB


def test_one_row_of_one_token():
    """The shortest of all runs: the loop must stop before it reads a second time."""
    response, mask = generate(random_model(), *pad_left([[1]], PAD), 1, EOS, PAD)
    assert response.shape == (1, 1) and mask.tolist() == [[True]]


def test_a_reply_may_end_with_its_first_token():
    """EOS as the very first action is an action like any other: mask 1, length 1."""
    model = random_model()
    first = replies(model, [[1]])[0][0]
    response, mask = generate(model, *pad_left([[1]] * 3, PAD), LIMIT, first, PAD)
    assert response.tolist() == [[first]] * 3 and mask.tolist() == [[True]] * 3


@pytest.mark.parametrize("options", [dict(top_k=-1), dict(top_p=0.0), dict(top_p=1.1), dict(temperature=0.0),
                                     dict(max_response_length=0)])
def test_impossible_settings_are_an_error_that_names_them(options):
    """temperature 0 divides by zero: NaN, and then token 0 for ever."""
    with pytest.raises(ValueError, match=next(iter(options))):
        generate(random_model(), *pad_left([[1]], PAD), eos=EOS, pad=PAD, uniforms=torch.zeros(1, 2),
                 **(dict(max_response_length=2) | options))


# ---- inverse CDF -----------------------------------------------------------------------------------------------------


def draw(probabilities, u, temperature=1.0):
    return sample_tokens(torch.tensor([probabilities]).log(), torch.tensor([u]), temperature).item()


BELOW_ONE = 1.0 - 2.0 ** -24  # the largest float32 below 1


@pytest.mark.parametrize("u, token", [(0.0, 0), (0.2499, 0), (0.2501, 1), (0.4999, 1), (0.5001, 2), (BELOW_ONE, 2)])
def test_inverse_cdf_by_hand(u, token):
    """Token i is drawn for u between the cumulative probabilities of i - 1 and i."""
    assert draw([0.25, 0.25, 0.5], u) == token


@pytest.mark.parametrize("probabilities, u, token", [
    ([0.0, 0.0, 1.0, 0.0], 0.0, 2),  # nothing at or below u = 0 but zeros
    ([0.0, 0.0, 1.0, 0.0], BELOW_ONE, 2),  # and none of the zeros behind
    ([0.5, 0.0, 0.5, 0.0], 0.5, 2),  # u on the boundary: not the zero between
    ([0.5, 0.0, 0.5, 0.0], BELOW_ONE, 2),
    ([0.0, 1.0], 0.0, 1),
    ([1.0], BELOW_ONE, 0),
])
def test_a_token_of_probability_zero_is_never_drawn(probabilities, u, token):
    """"First cumulative probability >= u" draws token 0 for u = 0, and an index past the end for u near 1."""
    assert draw(probabilities, u) == token


def test_the_largest_uniform_stays_in_the_vocabulary_however_sums_are_rounded():
    """Float32 probabilities of 50,000 tokens sum to a little less or more than 1; the index must not run off the end."""
    logits = torch.randn(64, 50_000, generator=torch.Generator().manual_seed(0)) * torch.linspace(0, 8, 64)[:, None]
    logits[:, -100:] = float("-inf")
    for u in (0.0, BELOW_ONE):
        assert sample_tokens(logits, torch.full((64,), u), 1.0).max() < 49_900
    total = torch.arange(2 ** 23, dtype=torch.int32) + torch.tensor(0.5).view(torch.int32)  # every float32 in [0.5, 1)
    for totals in (total.view(torch.float32), 2 * total.view(torch.float32)):
        assert (totals * torch.tensor(BELOW_ONE) < totals).all()


def test_the_arguments_of_the_sampler_are_left_alone():
    """Logits divided in place by the temperature are divided again by whoever reads them next."""
    logits, uniforms = torch.randn(3, 5), torch.rand(3)
    copies = logits.clone(), uniforms.clone()
    sample_tokens(logits, uniforms, 0.5)
    filter_logits(logits, 2, 0.5)
    assert torch.equal(logits, copies[0]) and torch.equal(uniforms, copies[1])


# ---- frequencies -----------------------------------------------------------------------------------------------------


def chi_square_limit(df: int) -> float:
    """What chance exceeds one time in 10,000 (Wilson and Hilferty 1931)."""
    return df * (1 - 2 / (9 * df) + 3.72 * math.sqrt(2 / (9 * df))) ** 3


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    expected = probabilities.double() * counts.sum()
    return ((counts - expected) ** 2 / expected).sum().item()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_tokens_come_as_often_as_the_stored_log_probs_say(temperature):
    """A sampler and a learner that disagree on the temperature (or on the first token) train on ratios that are wrong."""
    model, count = random_model(1, spread=0.25), 8000
    prompt, mask = (x.expand(count, -1) for x in pad_left([[3, 1, 4]], PAD))
    uniforms = row_uniforms(0, "test", 0, list(range(count)), 2)
    response, response_mask = generate(model, prompt, mask, 2, EOS, PAD, uniforms, temperature)
    stored, _, _ = evaluate_actions(model, prompt, mask, response, response_mask, temperature)

    def check(tokens, logprobs):
        counts = torch.bincount(tokens, minlength=VOCAB)
        p = torch.zeros(VOCAB).scatter(0, tokens, logprobs.exp())
        assert (counts[p == 0] == 0).all() and p.sum() == pytest.approx(1.0, abs=0.01)
        seen = p > 0
        assert chi_square(counts[seen], p[seen] / p.sum()) < chi_square_limit(int(seen.sum()) - 1)

    check(response[:, 0], stored[:, 0])
    after = response[:, 0] == response[:, 0][response[:, 0] != EOS].mode().values  # one state of the second token
    check(response[after, 1], stored[after, 1])


# ---- top-k and top-p -------------------------------------------------------------------------------------------------


def kept(probabilities, top_k=0, top_p=1.0):
    logits = torch.tensor([probabilities]).log()
    filtered = filter_logits(logits, top_k, top_p)
    stay = filtered > float("-inf")
    assert torch.equal(filtered[stay], logits[stay])  # what stays keeps its logit
    return stay[0].nonzero()[:, 0].tolist()


@pytest.mark.parametrize("top_k, expected", [(0, [0, 1, 2, 3]), (1, [1]), (2, [1, 3]), (3, [1, 2, 3]), (9, [0, 1, 2, 3])])
def test_top_k_by_hand(top_k, expected):
    """top_k keeps the k likeliest; 0 keeps all, and so does a k beyond the vocabulary."""
    assert kept([0.05, 0.5, 0.15, 0.3], top_k=top_k) == expected


@pytest.mark.parametrize("top_p, expected", [(0.01, [1]), (0.49, [1]), (0.51, [1, 3]), (0.79, [1, 3]), (0.81, [1, 2, 3]),
                                             (0.96, [0, 1, 2, 3]), (1.0, [0, 1, 2, 3])])
def test_top_p_by_hand(top_p, expected):
    """top_p keeps the smallest set that holds probability p: the token that crosses p stays, and the first always."""
    assert kept([0.05, 0.5, 0.15, 0.3], top_p=top_p) == expected


def test_top_p_is_taken_of_what_top_k_left():
    """0.5 and 0.3 are 62.5% and 37.5% of the two that top_k keeps."""
    assert kept([0.05, 0.5, 0.15, 0.3], top_k=2, top_p=0.6) == [1]
    assert kept([0.05, 0.5, 0.15, 0.3], top_k=2, top_p=0.65) == [1, 3]


def test_top_k_of_one_is_greedy():
    """Whatever the random numbers."""
    model = ending_model()
    assert replies(model, PROMPTS, uniforms=torch.rand(6, LIMIT), top_k=1) == replies(model, PROMPTS)


def test_cut_tokens_never_come():
    """Over many draws at both ends of the unit interval, only the kept tokens are sampled."""
    logits = filter_logits(torch.tensor([[0.05, 0.5, 0.15, 0.3]]).log(), 2, 1.0).expand(1002, -1)
    uniforms = torch.cat([torch.linspace(0, BELOW_ONE, 1000), torch.tensor([0.0, BELOW_ONE])])
    assert set(sample_tokens(logits, uniforms, 1.3).tolist()) == {1, 3}
