"""A sequence has one log-prob, one value and one score, however it is padded, batched or cached."""

import math

import pytest
import torch
from tiny import random_model

from minirlhf.config import UserError
from minirlhf.data import PreferenceGroup, collate_preferences, pad_left, pad_right
from minirlhf.device import pick_device
from minirlhf.generate import generate
from minirlhf.lab import bench_naive
from minirlhf.losses import preference_loss
from minirlhf.model import KVCache, ModelConfig, Transformer, pack, sequence_scores
from minirlhf.rollout import collect_rollout, evaluate_actions, sequence_kl

PROMPTS = [[1, 2, 3, 4], [5], [6, 7], [8, 1, 5]]
RESPONSES = [[3, 10], [4, 5, 6, 10], [7, 2, 1, 8, 9], [10]]
PAD = 40  # no row of the softmax, but of the table


def alone(model, prompt, response):
    """(log-probs, values) of a response by the plainest code: one unpadded sequence, a loop over its tokens."""
    ids = torch.tensor([prompt + response])
    hidden = model(ids, torch.ones_like(ids, dtype=torch.bool))[0]
    logprobs, values = [], []
    for place, token in enumerate(response, start=len(prompt)):
        logprobs.append((hidden[place - 1] @ model.wte.weight[:11].T).log_softmax(0)[token])
        values.append(model.value_head(hidden[place - 1])[0])
    return torch.stack(logprobs), torch.stack(values)


def evaluate(model, order, extra_left=0, extra_right=0):
    """(log-probs, values, entropies) of a batch of the sequences in this order, with so many columns of padding more."""
    prompts, prompt_mask = pad_left([PROMPTS[i] for i in order], PAD)
    responses, response_mask = pad_right([RESPONSES[i] for i in order], PAD)
    left, right = torch.full((len(order), extra_left), PAD), torch.full((len(order), extra_right), PAD)
    return evaluate_actions(
        model, torch.cat([left, prompts], 1), torch.cat([left < 0, prompt_mask], 1),
        torch.cat([responses, right], 1), torch.cat([response_mask, right < 0], 1), 1.0, entropy=True)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2), (2, 2), (1,)])
@pytest.mark.parametrize("extra", [(0, 0), (5, 0), (0, 4), (3, 2)])
def test_log_prob_and_value_do_not_depend_on_padding_or_batch(order, extra):
    """Positions that count padding, or a mask that lets it be seen, shift log-probs by tens of nats without an error."""
    model = random_model()
    logprobs, values, _ = evaluate(model, order, *extra)
    for row, i in enumerate(order):
        expected = alone(model, PROMPTS[i], RESPONSES[i])
        for found, wanted in zip((logprobs, values), expected):
            torch.testing.assert_close(found[row, :len(wanted)], wanted, rtol=0, atol=1e-5)
            assert (found[row, len(wanted):] == 0).all()


def test_entropy_is_that_of_the_softmax_and_zero_on_padding():
    """Entropy averaged over padding reads as collapse (or as health) that is not there."""
    model = random_model()
    _, _, entropy = evaluate(model, (0,), 2, 3)
    ids = torch.tensor([PROMPTS[0] + RESPONSES[0]])
    hidden = model(ids, torch.ones_like(ids, dtype=torch.bool))[0]
    p = (hidden[3:5] @ model.wte.weight[:11].T).softmax(-1)
    torch.testing.assert_close(entropy[0, :2], -(p * p.log()).sum(-1), rtol=0, atol=1e-5)
    assert (entropy[0, 2:] == 0).all()


@pytest.mark.parametrize("pad", [pad_left, pad_right])
@pytest.mark.parametrize("extra", [0, 4])
def test_score_is_read_at_the_last_real_token_under_any_padding(pad, extra):
    """Read at column -1, a right-padded sequence is scored at its padding; read at the mask's sum, a left-padded one is."""
    model = random_model()
    model.score_shift.fill_(0.5)
    model.score_scale.fill_(2.0)
    sequences = [p + r for p, r in zip(PROMPTS, RESPONSES)]
    longest = max(map(len, sequences)) + extra
    ids, mask = pad(sequences + [[1] * longest], PAD)
    scores = sequence_scores(model, ids, mask)
    for sequence, score in zip(sequences, scores):
        one = torch.tensor([sequence])
        hidden = model(one, torch.ones_like(one, dtype=torch.bool))
        torch.testing.assert_close(score, (model.reward_head(hidden[0, -1])[0] - 0.5) / 2.0, rtol=0, atol=1e-5)


def test_what_stands_in_padding_changes_nothing():
    """A stray id in the padding that reaches attention makes results depend on whatever was in the batch before."""
    model = random_model()
    ids, mask = pad_left([p + r for p, r in zip(PROMPTS, RESPONSES)], PAD)
    noise = torch.where(mask, ids, torch.randint(0, 64, ids.shape, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(model(ids, mask)[mask], model(noise, mask)[mask])


def siblings(side):
    """(sequences, ids, mask): groups that share a beginning, one with a repeat and a row that is the beginning of another."""
    sequences = [[1, 2, 3, 4, 5], [1, 2, 3, 6], [1, 2, 3, 6], [1, 2], [7], [7, 1, 2, 3], [1, 2, 3, 4, 5, 6]]
    return sequences, *side(sequences, PAD)


@pytest.mark.parametrize("side", [pad_left, pad_right])
def test_rows_that_share_a_beginning_are_each_as_if_alone(side):
    """Computed once for all siblings, a prompt must still be each one's own: its states, and its share of the gradient."""
    model = random_model().double().requires_grad_(True)
    sequences, ids, mask = siblings(side)
    weights = torch.randn(*mask.shape, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    together = torch.where(mask[:, :, None], model(ids, mask) * weights, 0.0).sum()
    gradient = torch.autograd.grad(together, model.blocks.parameters())
    apart = 0.0
    for row, sequence in enumerate(sequences):
        one = torch.tensor([sequence])
        hidden = model(one, torch.ones_like(one, dtype=torch.bool))[0]
        torch.testing.assert_close(model(ids, mask)[row, mask[row]], hidden, rtol=0, atol=1e-12)
        apart = apart + (hidden * weights[row, mask[row]]).sum()
    for found, wanted in zip(gradient, torch.autograd.grad(apart, model.blocks.parameters())):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("side", [pad_left, pad_right])
def test_padding_and_repeated_beginnings_are_not_computed(side):
    """Four responses to a prompt cost one prompt. Sharing that stops at a different column each row loses nothing but work."""
    _, ids, mask = siblings(side)
    layout = pack(ids, mask)
    assert layout.ids.tolist() == [1, 2, 3, 4, 5] + [6] + [7] + [1, 2, 3] + [1, 2, 3, 4, 5, 6]
    assert layout.positions.tolist() == [0, 1, 2, 3, 4] + [3] + [0] + [1, 2, 3] + [0, 1, 2, 3, 4, 5]
    assert torch.equal(layout.ids[layout.out][mask], ids[mask])


@pytest.mark.parametrize("with_head", [True, False])
def test_the_tied_table_has_the_gradient_of_both_its_ends(with_head):
    """The rows that tokens read and the rows of the softmax are the same weights: a gradient of one end alone still trains,
    to something else. A reward model has no use for the head."""
    model = random_model().double().requires_grad_(True)
    _, ids, mask = siblings(pad_left)
    weights = torch.randn(*mask.shape, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def loss(hidden, table):
        states = torch.where(mask[:, :, None], hidden * weights, 0.0).sum()
        return states + (hidden[mask] @ table[:11].T).log_softmax(-1)[:, 3].sum() if with_head else states

    head = model.wte.weight.detach().clone().requires_grad_(True)  # a table of its own: the two gradients, one by one
    rows, _ = torch.autograd.grad(loss(model(ids, mask), head), (model.wte.weight, head), allow_unused=True)
    plain = bench_naive.padded_trunk(model, ids, mask)
    expected = torch.autograd.grad(loss(plain, model.wte.weight), model.wte.weight)[0]  # as autograd adds them
    found = torch.autograd.grad(loss(*model(ids, mask, with_table=True)), model.wte.weight)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert torch.equal(found, rows) != with_head and rows.any()


@pytest.mark.parametrize("side", [pad_left, pad_right])
def test_states_that_nobody_wants_are_left_out_and_the_others_as_they_were(side):
    """What the last block does not compute may be missing from no state that is read, and from no weight's gradient."""
    model = random_model().double().requires_grad_(True)
    _, ids, mask = siblings(side)
    chosen = mask & (torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)) < 0.5)
    computed = []
    hook = model.blocks[-1].mlp_in.register_forward_hook(lambda layer, given, result: computed.append(len(result)))
    found, expected = model(ids, mask, wanted=chosen)[chosen], model(ids, mask)[chosen]
    hook.remove()
    layout = pack(ids, mask)
    assert computed == [len(layout.out[chosen].unique()), len(layout.ids)]  # a token that siblings share once
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weights = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gradients = [torch.autograd.grad((states * weights).sum(), model.blocks.parameters()) for states in (found, expected)]
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("longest, columns", [(1, 1), (7, 7), (8, 16), (15, 16), (16, 16), (17, 17), (95, 96), (96, 96)])
def test_rows_are_filled_up_where_that_makes_attention_faster(longest, columns):
    """By columns that no real token reads: the states are those of the bare rows, wherever the longest row ends."""
    model = Transformer(ModelConfig(11, 12, n_layer=2, n_head=2, d_model=16, context=100), seed=3).double()
    sequences = [[1 + i % 9 for i in range(longest)], [4]]
    ids, mask = pad_right([*sequences, [5] * longest], PAD)
    assert pack(ids, mask).rows.shape == (3, columns)
    for row, sequence in enumerate(sequences):
        one = torch.tensor([sequence])
        x = model.wte(one) + model.wpe(torch.arange(len(sequence)))
        for block in model.blocks:
            q, k, v = block.before(x).view(1, -1, 3, 2, 8).permute(2, 0, 3, 1, 4)
            future = torch.full((len(sequence), len(sequence)), float("-inf"), dtype=torch.float64).triu(1)
            mixed = (q @ k.mT / 8**0.5 + future).softmax(-1) @ v
            x = block.after(x, mixed.transpose(1, 2).flatten(2))
        torch.testing.assert_close(model(ids, mask)[row, : len(sequence)], model.ln_f(x)[0], rtol=0, atol=1e-12)
    padded = torch.cat([torch.full((3, 40), PAD), ids], 1)  # 40 columns that no row has: nor has attention
    assert pack(padded, padded != PAD).rows.shape == (3, columns)


def test_hidden_states_do_not_depend_on_later_tokens():
    """A leak from the future makes every log-prob too good, and sampling can never match it."""
    model = random_model()
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    changed = torch.tensor([[1, 2, 3, 9, 9]])
    torch.testing.assert_close(model(ids, mask)[:, :3], model(changed, mask)[:, :3], rtol=0, atol=1e-6)
    assert not torch.allclose(model(ids, mask)[:, 3:], model(changed, mask)[:, 3:])


@pytest.mark.parametrize("prompt", [5, 6, 8])
def test_reading_token_by_token_through_the_cache_equals_reading_at_once(prompt):
    """Decoding with positions or masks that differ from the learner's samples from another policy than the one trained."""
    model = random_model().requires_grad_(True)  # as in a notebook, where nobody has turned gradients off
    ids, mask = pad_left([[1, 2, 3, 4, 5, 6, 7, 8, 9], [4, 3, 2, 1, 5], [4, 3, 2, 1, 5, 6]], PAD)
    cache = KVCache(model, mask[:, :prompt])
    hidden = [model(ids[:, :prompt], mask[:, :prompt], cache)]
    hidden += [model.decode(ids[:, t], cache)[:, None] for t in range(prompt, 9)]
    torch.testing.assert_close(torch.cat(hidden, 1)[mask], model(ids, mask)[mask], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kept", [(True, False, True), (False, False, True), (True, True, False), (True, True, True)])
def test_rows_that_leave_the_cache_leave_the_others_as_they_were(kept):
    """After finished rows have left, each row must go on with its own keys and values, not with a neighbour's."""
    model, kept = random_model(), torch.tensor(kept)
    ids, mask = pad_left([[1, 2, 3], [4], [5, 6]], PAD)
    cache = KVCache(model, mask)
    model(ids, mask, cache)
    old = cache.keep_rows(kept)
    assert sorted(old.tolist()) == kept.nonzero().squeeze(1).tolist()
    for column, token in ((3, 7), (4, 8)):
        ids = torch.cat([ids, torch.full_like(ids[:, :1], token)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        torch.testing.assert_close(model.decode(ids[old, column], cache), model(ids, mask)[old, -1], rtol=0, atol=1e-5)


def test_train_and_eval_mode_give_the_same_log_probs():
    """Dropout between sampling and learning makes the first importance ratio differ from 1."""
    model = random_model()
    prompts, responses = pad_left(PROMPTS, PAD), pad_right(RESPONSES, PAD)
    both = [evaluate_actions(mode, *prompts, *responses, 1.0, entropy=True) for mode in (model.train(), model.eval())]
    assert all(torch.equal(a, b) for a, b in zip(*both))
    assert torch.equal(*(sequence_scores(mode, *prompts) for mode in (model.train(), model.eval())))


def test_temperature_divides_the_logits_of_policy_and_reference_alike():
    """A reference at temperature 1 beside a policy at 0.7 charges a KL penalty to a policy that has not moved."""
    policy, reference = random_model(1), random_model(2)
    sampled = (*pad_left(PROMPTS[:2], PAD), *pad_right(RESPONSES[:2], PAD))
    rollout = collect_rollout(policy, reference, *sampled, torch.zeros(2), 0.1, 0.7, 0)
    for model, logprobs in ((policy, rollout.logprobs), (reference, rollout.ref_logprobs)):
        ids = torch.tensor([PROMPTS[0] + RESPONSES[0]])
        logits = model(ids, torch.ones_like(ids, dtype=torch.bool))[0, 3:5] @ model.wte.weight[:11].T
        wanted = (logits / 0.7).log_softmax(-1)[torch.arange(2), torch.tensor(RESPONSES[0])]
        torch.testing.assert_close(logprobs[0, :2], wanted, rtol=0, atol=1e-5)
    same = collect_rollout(policy, policy, *sampled, torch.zeros(2), 0.1, 0.7, 0)
    assert torch.equal(same.logprobs, same.ref_logprobs)
    assert (sequence_kl(policy, policy, sampled, 0.7) == 0).all()


def test_padding_and_rounding_rows_are_in_no_softmax():
    """Rows beyond the vocabulary in the softmax take probability from real tokens: log-probs too low, whatever is learnt."""
    model = random_model()
    sampled = (*pad_left(PROMPTS[:1], PAD), torch.arange(11)[:, None])
    prompt, mask = (x.expand(11, -1) for x in sampled[:2])
    before, _, _ = evaluate_actions(model, prompt, mask, sampled[2], torch.ones(11, 1, dtype=torch.bool), 1.0)
    assert before.exp().sum() == pytest.approx(1.0, abs=1e-5)
    model.wte.weight[11:] *= 100
    after, _, _ = evaluate_actions(model, prompt, mask, sampled[2], torch.ones(11, 1, dtype=torch.bool), 1.0)
    assert torch.equal(before, after)


def test_a_fresh_model_scores_and_values_everything_zero():
    """Heads that start at random numbers start training with a gradient that undoes them."""
    model = Transformer(ModelConfig(11, 64, n_layer=1, n_head=2, d_model=16, context=12))
    ids, mask = pad_right(PROMPTS, PAD)
    assert (sequence_scores(model, ids, mask) == 0).all()
    assert (model.value_head(model(ids, mask)) == 0).all()


@pytest.mark.parametrize("centering", [0.0, 0.1])
def test_the_first_preference_loss_is_exactly_ln_2(centering):
    """Anything else at step 0 is a wrong margin, a wrong reduction or a head that does not start at 0."""
    model = Transformer(ModelConfig(11, 64, n_layer=1, n_head=2, d_model=16, context=12))
    groups = [PreferenceGroup((1, 2), ((3, 10), (4, 5, 10), (6,)), ((0, 1, 0.0, 1.0), (2, 1, 0.0, 0.5))),
              PreferenceGroup((7,), ((8, 10), (9, 10)), ((1, 0, 0.0, 1.0),))]
    batch = collate_preferences(groups, PAD)
    scores = sequence_scores(model, batch.ids, batch.attention_mask)
    loss = preference_loss(scores[batch.chosen], scores[batch.rejected], batch.margin, centering, batch.weight)
    assert loss.item() == torch.tensor(2.0).log().item() == pytest.approx(math.log(2), abs=1e-7)


def test_one_row_and_one_token_work_everywhere():
    """squeeze() without a dimension, std of one number: batches of one are where shapes break."""
    model = random_model()
    prompt, mask = torch.tensor([[3]]), torch.tensor([[True]])
    response, response_mask = generate(model, prompt, mask, 1, eos=10, pad=PAD)
    assert response.shape == response_mask.shape == (1, 1)
    rollout = collect_rollout(model, model, prompt, mask, response, response_mask, torch.ones(1), 0.1, 1.0, 0)
    assert rollout.logprobs.shape == rollout.values.shape == rollout.rewards.shape == (1, 1)
    assert rollout.rewards.item() == 1.0
    assert sequence_scores(model, prompt, mask).shape == (1,)
    assert sequence_kl(model, model, (prompt, mask, response, response_mask), 1.0).tolist() == [0.0]


def test_nothing_changes_its_arguments():
    """A mask written to in place corrupts the batch for whoever reads it next."""
    model = random_model()
    sampled = (*pad_left(PROMPTS, PAD), *pad_right(RESPONSES, PAD))
    copies = [tensor.clone() for tensor in sampled]
    generate(model, *sampled[:2], 4, eos=10, pad=PAD)
    sequence_scores(model, *sampled[:2])
    collect_rollout(model, model, *sampled, torch.zeros(4), 0.1, 1.0, 2)
    sequence_kl(model, model, sampled, 1.0)
    assert all(torch.equal(*pair) for pair in zip(sampled, copies))


def test_micro_batches_of_a_rollout_equal_the_whole():
    """Rows measured in a smaller batch must be the same rows in the same places."""
    policy, reference = random_model(1), random_model(2)
    sampled = (*pad_left(PROMPTS, PAD), *pad_right(RESPONSES, PAD), torch.arange(4.0))
    whole, *cut = (collect_rollout(policy, reference, *sampled, 0.1, 1.0, size) for size in (0, 1, 3))
    for rollout in cut:
        for found, wanted in zip(rollout, whole):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_a_sequence_beyond_the_context_is_an_error_that_names_it():
    """Positions past the table would be an IndexError deep inside, or on CUDA an assertion without a name."""
    with pytest.raises(ValueError, match=r"ids \(1, 25\).*context of 24"):
        random_model()(torch.ones(1, 25, dtype=torch.long), torch.ones(1, 25, dtype=torch.bool))


def test_the_same_seed_makes_the_same_weights():
    """Weights from the global generator depend on whatever was drawn before."""
    sizes = ModelConfig(11, 64, n_layer=1, n_head=2, d_model=16, context=12)
    torch.manual_seed(1)
    first = Transformer(sizes, seed=3).state_dict()
    torch.manual_seed(2)
    second, other = Transformer(sizes, seed=3).state_dict(), Transformer(sizes, seed=4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["wte.weight"], other["wte.weight"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="only a machine without CUDA refuses it")
def test_a_device_that_is_not_there_is_refused_by_name():
    """torch's own complaint is a page long and comes after the data has been read."""
    with pytest.raises(UserError, match="--device cuda"):
        pick_device("cuda")
    assert pick_device("auto").type == "cpu"
