"""A sequence has one log-prob, value and score, independent of padding, batch and cache."""

import math

from minirlhf.config import PolicyConfig, RewardConfig
from minirlhf.data.batches import PreferenceGroup, collate_preferences, pad_left, pad_right
from minirlhf.model.cache import KVCache
from minirlhf.model.generate import generate
from minirlhf.model.packing import pack
from minirlhf.model.transformer import (
    ModelConfig,
    Transformer,
    apply_head,
    is_last_token,
    sequence_scores,
)
from minirlhf.rl.losses import preference_loss
from minirlhf.rl.rollout import action_states, evaluate_actions, measure, sequence_kl
from minirlhf.rl.sampling import Samples
from minirlhf.run.device import pick_device, prepare_training
from minirlhf.run.errors import UserError

import pytest
import torch
from exact import make_rollout
from tiny import make_samples, random_model
from torch import Tensor

PROMPTS = [[1, 2, 3, 4], [5], [6, 7], [8, 1, 5]]
RESPONSES = [[3, 10], [4, 5, 6, 10], [7, 2, 1, 8, 9], [10]]
VOCAB = 11
PAD = 40  # a row of the table, but not of the softmax
SMALL = ModelConfig(VOCAB, table_rows=64, n_layer=1, n_head=2, d_model=16, context=12)


def hidden_alone(model: Transformer, sequence: list[int]) -> Tensor:
    """[T, D] hidden states of one unpadded sequence."""
    ids = torch.tensor([sequence])
    return model(ids, torch.ones_like(ids, dtype=torch.bool))[0]


def turned(x: Tensor, config: ModelConfig) -> Tensor:
    """RoPE on x [heads, T, d]: the pair (x_i, x_{i + d / 2}) as a complex number times e^(i angle).

    Llama 3's scaling by the cases of its published code: wavelengths up to original / high stay,
    those from original / low are multiplied by the factor, those between are interpolated.
    """
    half = config.head_width // 2
    frequencies = []
    for i in range(half):
        frequency = config.rope_base ** (-2 * i / config.head_width)
        if config.rope_scaling:
            factor, low, high, original = config.rope_scaling
            wavelength = 2 * math.pi / frequency
            if wavelength > original / low:
                frequency /= factor
            elif wavelength > original / high:
                smooth = (original / wavelength - low) / (high - low)
                frequency = (1 - smooth) * frequency / factor + smooth * frequency
        frequencies.append(frequency)
    angles = torch.arange(x.shape[1])[:, None] * torch.tensor(frequencies, dtype=x.dtype)
    pairs = torch.complex(x[..., :half], x[..., half:]) * torch.polar(angles * 0 + 1, angles)
    return torch.cat([pairs.real, pairs.imag], -1)


def plain_hidden(model: Transformer, sequence: list[int]) -> Tensor:
    """[T, D] hidden_alone with attention written out, without packing or attention kernels."""
    c = model.config
    length = len(sequence)
    x = model.wte(torch.tensor(sequence))
    if not c.rope_base:
        x = x + model.wpe(torch.arange(length))
    future = torch.full((length, length), float("-inf"), dtype=x.dtype).triu(1)
    for block in model.blocks:
        qkv = block.attention_in(block.ln_1(x)).view(length, -1, c.head_width).transpose(0, 1)
        queries, keys, values = qkv.split([c.n_head, c.kv_heads, c.kv_heads])
        if c.qk_norm:
            queries, keys = (
                y * (y.pow(2).mean(-1, keepdim=True) + c.norm_eps).rsqrt() * norm.weight
                for y, norm in ((queries, block.ln_q), (keys, block.ln_k))
            )
        if c.rope_base:
            queries, keys = turned(queries, c), turned(keys, c)
        attended = []
        for head in range(c.n_head):
            shared = head * c.kv_heads // c.n_head
            weights = (queries[head] @ keys[shared].T / c.head_width**0.5 + future).softmax(-1)
            attended.append(weights @ values[shared])
        x = x + block.attention_out(torch.cat(attended, 1))
        inner = block.mlp_in(block.ln_2(x))
        if c.swiglu:
            gate, inner = inner[:, : c.d_mlp], inner[:, c.d_mlp :]
            inner = gate * gate.sigmoid() * inner
        else:
            inner = torch.nn.functional.gelu(inner, approximate="tanh")
        x = x + block.mlp_out(inner)
    return model.ln_f(x)


def samples_of(rows=range(4), extra_left: int = 0, extra_right: int = 0) -> Samples:
    """These rows of PROMPTS and RESPONSES, with additional columns of padding."""
    prompt_ids, prompt_mask = pad_left([PROMPTS[i] for i in rows], PAD)
    response_ids, response_mask = pad_right([RESPONSES[i] for i in rows], PAD)
    left = torch.full((len(prompt_ids), extra_left), PAD)
    right = torch.full((len(prompt_ids), extra_right), PAD)
    return make_samples(
        torch.cat([left, prompt_ids], 1),
        torch.cat([left < 0, prompt_mask], 1),
        torch.cat([response_ids, right], 1),
        torch.cat([response_mask, right < 0], 1),
    )


# ---- padding and batches -------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [(0, 1, 2, 3), (3, 1, 0, 2), (2, 2), (1,)])
@pytest.mark.parametrize("extra", [(0, 0), (5, 0), (0, 4), (3, 2)])
def test_log_prob_and_value_do_not_depend_on_padding_or_batch(rows, extra, form):
    """Catches positions that count padding, and attention to padding."""
    model = random_model()
    logprobs, values, _ = evaluate_actions(model, samples_of(rows, *extra), 1.0)
    for row, i in enumerate(rows):
        length = len(RESPONSES[i])
        hidden = hidden_alone(model, PROMPTS[i] + RESPONSES[i])
        states = hidden[len(PROMPTS[i]) - 1 : -1]
        logits = states @ model.lm_weight.T
        expected = logits.log_softmax(-1)[torch.arange(length), torch.tensor(RESPONSES[i])]
        torch.testing.assert_close(logprobs[row, :length], expected, rtol=0, atol=1e-5)
        expected = model.value_head(states)[:, 0]
        torch.testing.assert_close(values[row, :length], expected, rtol=0, atol=1e-5)
        assert (logprobs[row, length:] == 0).all() and (values[row, length:] == 0).all()


def test_action_states_are_the_states_before_each_token(form):
    """One row for each sampled token, in the order of responses; none for padding."""
    model = random_model()
    states = action_states(model, samples_of(extra_left=2, extra_right=3))
    expected = []
    for prompt, response in zip(PROMPTS, RESPONSES):
        expected.append(hidden_alone(model, prompt + response)[len(prompt) - 1 : -1])
    torch.testing.assert_close(states, torch.cat(expected), rtol=0, atol=1e-5)


def test_entropy_is_that_of_the_softmax_and_zero_on_padding():
    """The entropy is 0 on padding, and everywhere if it is not requested."""
    model = random_model()
    samples = samples_of((0,), 2, 3)
    _, _, entropy = evaluate_actions(model, samples, 1.0, entropy=True)
    hidden = hidden_alone(model, PROMPTS[0] + RESPONSES[0])
    p = (hidden[3:5] @ model.lm_weight.T).softmax(-1)
    torch.testing.assert_close(entropy[0, :2], -(p * p.log()).sum(-1), rtol=0, atol=1e-5)
    assert (entropy[0, 2:] == 0).all()
    assert not evaluate_actions(model, samples, 1.0)[2].any()


@pytest.mark.parametrize("pad", [pad_left, pad_right])
@pytest.mark.parametrize("extra", [0, 4])
def test_the_score_is_that_of_the_last_real_token_under_any_padding(pad, extra, form):
    """Catches the last column on right padding, and the sum of the mask on left padding."""
    model = random_model()
    model.score_shift.fill_(0.5)
    model.score_scale.fill_(2.0)
    sequences = [prompt + response for prompt, response in zip(PROMPTS, RESPONSES)]
    longest = max(map(len, sequences)) + extra
    ids, mask = pad(sequences + [[1] * longest], PAD)
    scores = sequence_scores(model, ids, mask)
    for sequence, score in zip(sequences, scores):
        raw = model.reward_head(hidden_alone(model, sequence)[-1])[0]
        torch.testing.assert_close(score, (raw - 0.5) / 2.0, rtol=0, atol=1e-5)


def test_is_last_token_by_hand():
    """Left padding, right padding, no padding."""
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    expected = [[0, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0, 1], [1, 0, 0, 0]]
    assert is_last_token(mask).int().tolist() == expected


def test_apply_head_is_the_head_without_its_last_dimension():
    """Autocast does not round the scalar heads."""
    model = random_model()
    hidden = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        values = apply_head(model.value_head, hidden)
    assert values.dtype == torch.float32
    assert torch.equal(values, model.value_head(hidden)[..., 0])


def test_ids_in_padding_change_nothing(form):
    """Catches padding that reaches attention."""
    model = random_model()
    ids, mask = pad_left([prompt + response for prompt, response in zip(PROMPTS, RESPONSES)], PAD)
    random_ids = torch.randint(0, 64, ids.shape, generator=torch.Generator().manual_seed(0))
    other = torch.where(mask, ids, random_ids)
    assert torch.equal(model(ids, mask)[mask], model(other, mask)[mask])


# ---- packing -------------------------------------------------------------------------------------

# with shared prefixes, one repeated sequence, and one that is the prefix of another
SHARED = [
    [1, 2, 3, 4, 5],
    [1, 2, 3, 6],
    [1, 2, 3, 6],
    [1, 2],
    [7],
    [7, 1, 2, 3],
    [1, 2, 3, 4, 5, 6],
]


@pytest.mark.parametrize("side", [pad_left, pad_right])
def test_sequences_with_a_shared_prefix_are_each_as_if_alone(side, form):
    """A prefix is computed once; hidden states and gradients are those of separate sequences."""
    model = random_model().double().requires_grad_(True)
    ids, mask = side(SHARED, PAD)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(*mask.shape, 16, dtype=torch.float64, generator=generator)
    together = torch.where(mask[:, :, None], model(ids, mask) * weights, 0.0).sum()
    gradients = torch.autograd.grad(together, model.blocks.parameters())
    apart = 0.0
    for row, sequence in enumerate(SHARED):
        hidden = hidden_alone(model, sequence)
        actual = model(ids, mask)[row, mask[row]]
        torch.testing.assert_close(actual, hidden, rtol=0, atol=1e-12)
        apart = apart + (hidden * weights[row, mask[row]]).sum()
    expected_gradients = torch.autograd.grad(apart, model.blocks.parameters())
    for actual, expected in zip(gradients, expected_gradients):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("side", [pad_left, pad_right])
def test_padding_and_repeated_prefixes_are_not_computed(side):
    """The packed batch has each shared prefix once, and unpack() restores the layout."""
    ids, mask = side(SHARED, PAD)
    packed = pack(ids, mask)
    assert packed.ids.tolist() == [1, 2, 3, 4, 5] + [6] + [7] + [1, 2, 3] + [1, 2, 3, 4, 5, 6]
    assert packed.positions.tolist() == [0, 1, 2, 3, 4] + [3] + [0] + [1, 2, 3] + [0, 1, 2, 3, 4, 5]
    unpacked = packed.unpack(packed.ids[:, None].double())
    assert torch.equal(unpacked[:, :, 0][mask], ids[mask].double())


@pytest.mark.parametrize("with_lm_head", [True, False])
def test_the_gradient_of_the_tied_table_is_the_sum_of_its_uses(with_lm_head):
    """The same weights are the token embedding and the LM head.

    A gradient of one use alone still trains, but to something else.
    """
    model = random_model().double().requires_grad_(True)
    ids, mask = pad_left(SHARED, PAD)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(*mask.shape, 16, dtype=torch.float64, generator=generator)

    def loss(hidden: Tensor, table: Tensor) -> Tensor:
        states = torch.where(mask[:, :, None], hidden * weights, 0.0).sum()
        if not with_lm_head:
            return states
        return states + (hidden[mask] @ table[:VOCAB].T).log_softmax(-1)[:, 3].sum()

    tied = loss(model(ids, mask), model.wte.weight)
    (actual,) = torch.autograd.grad(tied, model.wte.weight)
    head = model.wte.weight.detach().clone().requires_grad_(True)
    untied = loss(model(ids, mask), head)
    embedding_gradient, head_gradient = torch.autograd.grad(
        untied, (model.wte.weight, head), allow_unused=True
    )
    expected = embedding_gradient
    if with_lm_head:
        assert embedding_gradient.any() and head_gradient.any()
        expected = embedding_gradient + head_gradient
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    assert not actual[VOCAB:].any()


def tables(model: Transformer) -> tuple[Tensor, ...]:
    """The embedding table, and the LM head if it is another matrix."""
    return (model.wte.weight,) if model.config.tied else (model.wte.weight, model.lm_table)


def test_evaluate_actions_gives_the_tables_the_gradient_of_both_uses(form):
    """The log-prob kernel and the embedding both add their part, as in a plain softmax.

    If the LM head is untied, each table gets its own part.
    """
    model = random_model().double().requires_grad_(True)
    logprobs, _, _ = evaluate_actions(model, samples_of(), 1.0)
    actual = torch.autograd.grad(logprobs.sum(), tables(model))
    plain = 0.0
    for prompt, response in zip(PROMPTS, RESPONSES):
        states = plain_hidden(model, prompt + response)[len(prompt) - 1 : -1]
        logp = (states @ model.lm_weight.T).log_softmax(-1)
        plain = plain + logp[torch.arange(len(response)), torch.tensor(response)].sum()
    expected = torch.autograd.grad(plain, tables(model))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("longest", [1, 7, 8, 15, 16, 17, 95, 96])
def test_hidden_states_equal_plain_attention_at_every_length(longest, form):
    """Attention has as many columns as the longest sequence has tokens, without common padding."""
    model = random_model(3, context=100).double()
    sequences = [[1 + i % 9 for i in range(longest)], [4], [5] * longest]
    ids, mask = pad_right(sequences, PAD)
    assert pack(ids, mask).rows.shape == (3, longest)
    for row, sequence in enumerate(sequences):
        actual = model(ids, mask)[row, : len(sequence)]
        torch.testing.assert_close(actual, plain_hidden(model, sequence), rtol=0, atol=1e-12)
    padded = torch.cat([torch.full((3, 40), PAD), ids], 1)
    assert pack(padded, padded != PAD).rows.shape == (3, longest)


def test_hidden_states_do_not_depend_on_later_tokens(form):
    """Catches a causal mask that is off by one."""
    model = random_model()
    hidden = hidden_alone(model, [1, 2, 3, 4, 5])
    changed = hidden_alone(model, [1, 2, 3, 9, 9])
    torch.testing.assert_close(hidden[:3], changed[:3], rtol=0, atol=1e-6)
    assert not torch.allclose(hidden[3:], changed[3:])


# ---- the cache -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [5, 6, 8])
def test_decoding_with_the_cache_equals_one_forward_pass(prompt, form):
    """Catches positions or masks that differ between decoding and training.

    It also works with gradients enabled, as in a notebook.
    """
    model = random_model().requires_grad_(True)
    ids, mask = pad_left([[1, 2, 3, 4, 5, 6, 7, 8, 9], [4, 3, 2, 1, 5], [4, 3, 2, 1, 5, 6]], PAD)
    cache = KVCache(model.config, mask[:, :prompt], 9 - prompt, torch.float32)
    hidden = [model(ids[:, :prompt], mask[:, :prompt], cache)]
    hidden += [model.decode(ids[:, t], cache)[:, None] for t in range(prompt, 9)]
    expected = model(ids, mask)[mask]
    torch.testing.assert_close(torch.cat(hidden, 1)[mask], expected, rtol=0, atol=1e-5)


def test_the_cache_has_all_its_room_from_the_start(form):
    """Decoding fills the cache in place; nothing is allocated or copied for a new token.

    Only heads of keys and values have room in it, not the query heads that share them.
    """
    model = random_model()
    ids, mask = pad_left([[1, 2, 3], [4]], PAD)
    cache = KVCache(model.config, mask, 2, torch.float32)
    addresses = [kv.data_ptr() for kv in cache.kv]
    model(ids, mask, cache)
    for columns in (4, 5):
        model.decode(torch.tensor([5, 6]), cache)
        assert cache.columns == columns
    assert cache.lengths.tolist() == [5, 3]
    size = dict(gpt2=8, mixed=6, qwen3=6).get(form, 4)  # of the two key-value heads
    assert [kv.shape for kv in cache.kv] == [(2, 2, 2, 5, size)] * 2
    assert [kv.data_ptr() for kv in cache.kv] == addresses
    used = (cache.bias[:, 0, 0] == 0).int().tolist()
    assert used == [[1, 1, 1, 1, 1], [1, 0, 0, 1, 1]]


@pytest.mark.parametrize(
    "kept", [(True, False, True), (False, False, True), (True, True, False), (True, True, True)]
)
def test_rows_that_leave_the_cache_do_not_change_the_others(kept, form):
    """After keep_rows each row still has its own keys and values."""
    model = random_model()
    keep = torch.tensor(kept)
    ids, mask = pad_left([[1, 2, 3], [4], [5, 6]], PAD)
    cache = KVCache(model.config, mask, 2, torch.float32)
    model(ids, mask, cache)
    old = cache.keep_rows(keep)
    assert sorted(old.tolist()) == keep.nonzero().squeeze(1).tolist()
    for column, token in ((3, 7), (4, 8)):
        ids = torch.cat([ids, torch.full_like(ids[:, :1], token)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        decoded = model.decode(ids[old, column], cache)
        torch.testing.assert_close(decoded, model(ids, mask)[old, -1], rtol=0, atol=1e-5)


# ---- log-probs and scores ------------------------------------------------------------------------


def test_train_and_eval_mode_give_the_same_log_probs():
    """Dropout would make the first importance ratio differ from 1."""
    model = random_model()
    samples = samples_of()
    prompts = (samples.prompt_ids, samples.prompt_mask)
    in_training = evaluate_actions(model.train(), samples, 1.0, entropy=True)
    scores_in_training = sequence_scores(model, *prompts)
    in_evaluation = evaluate_actions(model.eval(), samples, 1.0, entropy=True)
    assert all(map(torch.equal, in_training, in_evaluation))
    assert torch.equal(scores_in_training, sequence_scores(model, *prompts))


def test_the_temperature_divides_the_logits_of_policy_and_reference(form):
    """Other temperatures for policy and reference would give a KL penalty to an equal policy."""
    policy, reference = random_model(1), random_model(2)
    samples = samples_of((0, 1))
    rollout = make_rollout(policy, reference, samples, torch.zeros(2), 0.1, 0.7, 0)
    for model, logprobs in ((policy, rollout.logprobs), (reference, rollout.ref_logprobs)):
        hidden = hidden_alone(model, PROMPTS[0] + RESPONSES[0])
        logits = hidden[3:5] @ model.lm_weight.T
        expected = (logits / 0.7).log_softmax(-1)[torch.arange(2), torch.tensor(RESPONSES[0])]
        torch.testing.assert_close(logprobs[0, :2], expected, rtol=0, atol=1e-5)
    same = make_rollout(policy, policy, samples, torch.zeros(2), 0.1, 0.7, 0)
    assert torch.equal(same.logprobs, same.ref_logprobs)
    assert (sequence_kl(policy, policy, samples, 0.7) == 0).all()


def test_padding_rows_of_the_table_are_in_no_softmax(form):
    """Rows after the vocabulary would take probability from real tokens."""
    model = random_model()
    prompt_ids, prompt_mask = (x.expand(VOCAB, -1) for x in pad_left(PROMPTS[:1], PAD))
    every_token = torch.arange(VOCAB)[:, None]
    response_mask = torch.ones(VOCAB, 1, dtype=torch.bool)
    samples = make_samples(prompt_ids, prompt_mask, every_token, response_mask)
    logprobs, _, _ = evaluate_actions(model, samples, 1.0)
    assert logprobs.exp().sum() == pytest.approx(1.0, abs=1e-5)
    for table in tables(model):
        table[VOCAB:] *= 100
    assert torch.equal(evaluate_actions(model, samples, 1.0)[0], logprobs)


def test_a_new_model_has_scores_and_values_of_zero():
    """Heads with random weights would add noise to the first gradients."""
    model = Transformer(SMALL)
    ids, mask = pad_right(PROMPTS, PAD)
    assert (sequence_scores(model, ids, mask) == 0).all()
    assert (model.value_head(model(ids, mask)) == 0).all()


@pytest.mark.parametrize("centering", [0.0, 0.1])
def test_the_first_preference_loss_is_exactly_ln_2(centering):
    """Another value means a wrong margin, a wrong reduction, or a head that is not 0."""
    model = Transformer(SMALL)
    pairs = ((0, 1, 0.0, 1.0), (2, 1, 0.0, 0.5))
    groups = [
        PreferenceGroup((1, 2), ((3, 10), (4, 5, 10), (6,)), pairs),
        PreferenceGroup((7,), ((8, 10), (9, 10)), ((1, 0, 0.0, 1.0),)),
    ]
    batch = collate_preferences(groups, PAD)
    scores = sequence_scores(model, batch.ids, batch.attention_mask)
    chosen, rejected = scores[batch.chosen], scores[batch.rejected]
    loss = preference_loss(chosen, rejected, batch.margin, centering, batch.weight)
    assert loss.item() == torch.tensor(2.0).log().item() == pytest.approx(math.log(2), abs=1e-7)


def test_heads_that_the_loss_does_not_use_are_frozen(form):
    """Several processes wait for the gradient of every weight that is not frozen."""
    model = random_model().requires_grad_(True)
    prepare_training(model, RewardConfig(), torch.device("cpu"), ["reward_head"])
    names = [name for name, weight in model.named_parameters() if not weight.requires_grad]
    untied = [] if model.config.tied else ["lm_head.weight"]
    assert sorted(names) == [*untied, "value_head.bias", "value_head.weight"]


def test_one_row_of_one_token_works_everywhere():
    """Catches squeeze() without a dimension and statistics of one number."""
    model = random_model()
    prompt = torch.tensor([[3]])
    mask = torch.tensor([[True]])
    response, response_mask = generate(model, prompt, mask, 1, eos=10, pad=PAD)
    assert response.shape == response_mask.shape == (1, 1)
    samples = make_samples(prompt, mask, response, response_mask)
    rollout = make_rollout(model, model, samples, torch.ones(1), 0.1, 1.0, 0)
    assert rollout.logprobs.shape == rollout.values.shape == rollout.rewards.shape == (1, 1)
    assert rollout.rewards.item() == 1.0
    assert sequence_scores(model, prompt, mask).shape == (1,)
    assert sequence_kl(model, model, samples, 1.0).tolist() == [0.0]


def test_no_function_changes_its_arguments(form):
    """A mask that is changed in place would corrupt the batch for the next function."""
    model = random_model()
    samples = samples_of()
    prompts = (samples.prompt_ids, samples.prompt_mask)
    generate(model, *prompts, 4, eos=10, pad=PAD)
    sequence_scores(model, *prompts)
    make_rollout(model, model, samples, torch.zeros(4), 0.1, 1.0, 2)
    sequence_kl(model, model, samples, 1.0)
    for actual, expected in zip(samples, samples_of()):
        same = torch.equal if isinstance(actual, Tensor) else list.__eq__
        assert same(actual, expected)


@pytest.mark.parametrize("size", [1, 3])
def test_micro_batches_of_measure_equal_the_full_batch(size, form):
    """Rows of a smaller batch have the same log-probs and values, in the same places."""
    model = random_model(1)
    full = measure(model, samples_of(), PolicyConfig(micro_batch_size=0))
    split = measure(model, samples_of(), PolicyConfig(micro_batch_size=size))
    for actual, expected in zip(split, full):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


# ---- errors and seeds ----------------------------------------------------------------------------


def test_a_sequence_longer_than_the_context_is_an_error_that_names_it():
    """Otherwise an embedding lookup fails without a clear message."""
    ids = torch.ones(1, 25, dtype=torch.long)
    with pytest.raises(ValueError, match=r"ids \(1, 25\).*context of 24"):
        random_model()(ids, ids.bool())


def test_new_tensors_are_on_the_device_of_the_arguments(form):
    """Otherwise the first run on a GPU would fail."""
    model = random_model()
    samples = samples_of()
    uniforms = torch.rand(len(samples.prompt_ids), 5)
    prompts = samples.prompt_ids, samples.prompt_mask
    with torch.device("meta"):  # a tensor that is made without a device would be there
        evaluate_actions(model, samples, 1.0)[0].sum()
        generate(model.for_decoding(), *prompts, 5, 0, PAD, uniforms, top_k=3, top_p=0.9)
        sequence_scores(model, *prompts)


@pytest.mark.parametrize(
    "biases, expected",
    [
        ("none", set()),
        ("qkv", {"attention_in"}),
        ("all", {"attention_in", "attention_out", "mlp_in", "mlp_out"}),
    ],
)
def test_which_matrices_of_a_block_have_a_bias(biases, expected):
    (block,) = Transformer(ModelConfig(11, 64, 1, 2, 16, 24, rms_norm=True, biases=biases)).blocks
    names = [name for name, _ in block.named_parameters() if name.endswith("bias")]
    assert {name.split(".")[0] for name in names} == expected


def test_initial_weights_have_the_stated_deviations():
    """Mean 0, and 1 / sqrt(fan-in) for matrices, but 1 / sqrt(2 layers fan-in) for outputs."""
    sizes = dict(vocab_size=2000, table_rows=2048, n_layer=8, n_head=4, d_model=256, context=512)
    expected = {
        "wte": 0.1,
        "wpe": 0.02,
        "attention_in": 256**-0.5,
        "attention_out": (2 * 8 * 256) ** -0.5,
        "mlp_in": 256**-0.5,
        "mlp_out": (2 * 8 * 1024) ** -0.5,
    }
    for name, weight in Transformer(ModelConfig(**sizes)).named_parameters():
        part = name.split(".")[-2]
        if part in expected and name.endswith("weight"):
            assert weight.std().item() == pytest.approx(expected[part], rel=0.02), name
            assert abs(weight.mean().item()) < 0.02 * expected[part], name
        else:
            value = 1.0 if "ln_" in name and name.endswith("weight") else 0.0
            assert (weight == value).all(), name


def test_the_same_seed_gives_the_same_weights():
    """Initial weights do not depend on torch's global generator."""
    torch.manual_seed(1)
    first = Transformer(SMALL, seed=3).state_dict()
    torch.manual_seed(2)
    second = Transformer(SMALL, seed=3).state_dict()
    other = Transformer(SMALL, seed=4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["wte.weight"], other["wte.weight"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_device_that_does_not_exist_is_an_error_that_names_the_flag():
    """The error comes before any data is read."""
    with pytest.raises(UserError, match="--device cuda"):
        pick_device("cuda")
    assert pick_device("auto").type == "cpu"
