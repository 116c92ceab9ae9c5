"""The same numbers from programs that other people wrote: transformers, TRL, torchrl. Skipped where they are not installed.

float32: within 1e-5, logits within 1e-4. Nothing is downloaded: weights are random.
"""

import os
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from minirlhf.advantages import gae, reward_to_go
from minirlhf.config import RewardConfig
from minirlhf.data import PreferenceGroup, pad_left, pad_right
from minirlhf.generate import generate
from minirlhf.gpt2 import checkpoint_file, load_gpt2
from minirlhf.kernels import discounted_returns, token_logprobs
from minirlhf.losses import preference_loss
from minirlhf.rollout import evaluate_actions
from train_reward import language_model_loss, pair_loss

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when they are imported, below
VOCAB, TABLE = 50257, 50304
SMALL = dict(n_layer=12, n_head=12, n_embd=768)
REDUCED = dict(n_layer=3, n_head=3, n_embd=192)


def randomly(seed=0):
    return torch.Generator().manual_seed(seed)


def peer_model(shape, kind="GPT2LMHeadModel", seed=0, **settings):
    """transformers' GPT-2 with random weights, among them biases and gains, which it starts at 0 and 1."""
    transformers = pytest.importorskip("transformers")
    # in its plainest form, without dropout: it is the equations that are compared
    model = getattr(transformers, kind)(transformers.GPT2Config(
        **shape, attn_implementation="eager", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **settings)).eval()
    generator = randomly(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(0.05 * torch.randn(weight.shape, generator=generator) + (weight.ndim == 1) * weight)
    return model


def through_a_file(peer, folder, form="model.safetensors"):
    """The peer's weights in this project's model, by way of a file that transformers or torch wrote."""
    if form == "model.safetensors":
        peer.save_pretrained(folder)
    else:
        torch.save(peer.state_dict(), folder / form)
    path = checkpoint_file(folder)
    assert path.name == form
    model = load_gpt2(path, VOCAB, TABLE)
    path.unlink()  # half a gigabyte, which pytest would keep
    return model


def texts(lengths, seed=1, lowest=1):
    return [torch.randint(lowest, VOCAB, (length,), generator=randomly(seed + length)).tolist() for length in lengths]


def logits_of(model, ids, mask):
    return model(ids, mask) @ model.lm_weight.T


# ---- the model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("shape", [REDUCED, SMALL], ids=["reduced", "small"])
def test_logits_loss_and_gradients_are_those_of_transformers(shape, form, tmp_path):
    """GPT-2 small in its own shape, and one with a narrow trunk and many texts, padded to the right."""
    peer = peer_model(shape)
    ours = through_a_file(peer, tmp_path, form)
    ids, mask = pad_right(texts([19, 7] if shape is SMALL else [33, 2, 17, 40, 5]), 0)
    theirs = peer(ids, attention_mask=mask.long(), labels=ids.masked_fill(~mask, -100))
    difference = (logits_of(ours, ids, mask) - theirs.logits)[mask].abs().max()
    assert theirs.logits.std() > 0.3 and difference < 1e-4
    loss = language_model_loss(ours, ids, mask)
    assert abs(loss.item() - theirs.loss.item()) < 1e-5

    loss.backward()
    theirs.loss.backward()
    # the peer's gradients, put in the place of its weights, take the same way through a file
    with torch.no_grad():
        for weight in peer.parameters():
            weight.copy_(weight.grad)
    wanted = dict(through_a_file(peer, tmp_path, form).named_parameters())
    for name, weight in ours.named_parameters():
        if not name.startswith(("reward_head", "value_head")):
            assert wanted[name].norm() > 0, name
            assert (weight.grad - wanted[name]).norm() < 1e-5 * wanted[name].norm(), name


def test_greedy_decoding_is_that_of_transformers(tmp_path):
    """Left-padded prompts of several lengths, rows that end at different times: the same tokens, and their log-probs."""
    peer = peer_model(REDUCED)
    ours = through_a_file(peer, tmp_path)
    ids, mask = pad_left(texts([6, 1, 11, 3, 8, 2, 9]), 0)

    def theirs(eos):
        return peer.generate(ids, attention_mask=mask.long(), max_new_tokens=16, do_sample=False, eos_token_id=eos,
                             pad_token_id=0, return_dict_in_generate=True, output_logits=True)

    free = theirs(None).sequences[:, ids.shape[1]:]
    eos = int(free[0, 3])  # one that will be met
    found = theirs(eos)
    wanted = found.sequences[:, ids.shape[1]:]
    response, response_mask = generate(ours, ids, mask, 16, eos, 0)
    lengths = response_mask.sum(1)
    assert response_mask[0].sum() <= 4 and lengths.max() == 16 and wanted.shape == response.shape
    assert torch.equal(response[response_mask], wanted[response_mask])
    assert not wanted[~response_mask].any()
    logprobs, _, _ = evaluate_actions(ours, ids, mask, response, response_mask, 1.0)
    theirs_logprobs = torch.stack(found.logits, 1).log_softmax(-1).gather(2, wanted[:, :, None]).squeeze(2)
    assert (logprobs - theirs_logprobs)[response_mask].abs().max() < 1e-5
    assert theirs_logprobs[response_mask].std() > 0.1


# ---- the reward model's loss -----------------------------------------------------------------------------------------


def trl_loss(model, inputs, centering):
    """What TRL's RewardTrainer computes of a model's scores; the trainer around it only logs and counts."""
    trl = pytest.importorskip("trl")
    trainer = SimpleNamespace(model=SimpleNamespace(training=True), args=SimpleNamespace(center_rewards_coefficient=centering),
                              accelerator=SimpleNamespace(gather_for_metrics=lambda x: x, gather=lambda x: x), _tp_size=1,
                              _total_train_tokens=0, _metrics=defaultdict(lambda: defaultdict(list)))
    return trl.RewardTrainer.compute_loss(trainer, model, inputs)


@pytest.mark.parametrize("centering", [None, 0.0, 0.1])
@pytest.mark.parametrize("with_margin", [False, True])
def test_preference_loss_is_that_of_trl(with_margin, centering):
    """With a margin, with centring, and its gradient."""
    scores = (3 * torch.randn(2, 50, generator=randomly())).requires_grad_()
    margin = torch.rand(50, generator=randomly(1))
    inputs = dict(attention_mask=torch.ones(100, 4), **(dict(margin=margin) if with_margin else {}))
    theirs = trl_loss(lambda **_: SimpleNamespace(logits=scores.view(100, 1)), inputs, centering)
    ours = preference_loss(*scores, margin if with_margin else None, centering or 0.0)
    assert abs(ours.item() - theirs.item()) < 1e-5 and ours.item() > 0.1
    gradients = [torch.autograd.grad(loss, scores)[0] for loss in (ours, theirs)]
    assert (gradients[0] - gradients[1]).abs().max() < 1e-5 * gradients[1].abs().max()


def test_a_reward_model_learns_what_trl_would_teach_it(tmp_path):
    """From ids to the gradient of the trunk: transformers' classifier over the last token, TRL's loss; no value for padding."""
    peer = peer_model(REDUCED, "GPT2ForSequenceClassification", num_labels=1, pad_token_id=0)
    language_model = peer_model(REDUCED)
    language_model.transformer.load_state_dict(peer.transformer.state_dict())
    ours = through_a_file(language_model, tmp_path)
    with torch.no_grad():
        ours.reward_head.weight.copy_(peer.score.weight)
    chosen, rejected = texts([12, 3, 8, 20], seed=2), texts([5, 9, 8, 2], seed=3)
    prompts, margins = texts([4, 1, 10, 6], seed=4), [0.5, 0.0, 1.0, 0.25]
    groups = [PreferenceGroup(tuple(p), (tuple(c), tuple(r)), ((0, 1, margin, 1.0),))
              for p, c, r, margin in zip(prompts, chosen, rejected, margins)]
    loss, _ = pair_loss(ours, groups, 0, RewardConfig(centering=0.1, verdict_coef=0.0), total_weight=4.0)
    loss.backward()
    ids, mask = pad_right([p + r for responses in (chosen, rejected) for p, r in zip(prompts, responses)], 0)
    theirs = trl_loss(peer, dict(input_ids=ids, attention_mask=mask.long(), margin=torch.tensor(margins)), 0.1)
    theirs.backward()
    assert abs(loss.item() - theirs.item()) < 1e-5
    trunk = peer.transformer
    for found, wanted in ((ours.reward_head.weight.grad, peer.score.weight.grad), (ours.wpe.weight.grad, trunk.wpe.weight.grad),
                          (ours.wte.weight.grad[:VOCAB], trunk.wte.weight.grad),
                          (ours.blocks[0].attention_in.weight.grad, trunk.h[0].attn.c_attn.weight.grad.T)):
        assert wanted.norm() > 0 and (found - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_entropies_are_those_of_trl(temperature):
    """Of a vocabulary longer than one tile of this project's, which never holds all of the logits."""
    utils = pytest.importorskip("trl.trainer.utils")
    hidden, weight = torch.randn(70, 32, generator=randomly()), torch.randn(5000, 32, generator=randomly(1)) / 4
    targets = torch.randint(0, 5000, (70,), generator=randomly(2))
    logits = hidden @ weight.T
    ours, entropy = token_logprobs(hidden, weight, targets, temperature, entropy=True)
    assert (ours - utils.selective_log_softmax(logits, targets, temperature)).abs().max() < 1e-5
    assert (entropy - utils.entropy_from_logits(logits / temperature)).abs().max() < 1e-5


# ---- returns and advantages ------------------------------------------------------------------------------------------


def rollout(batch=7, length=75):
    """rewards, values, mask [B, R], with garbage past the mask, and torchrl's flag of the last step."""
    rewards, values = torch.randn(2, batch, length, generator=randomly())
    lengths = torch.tensor([length, 1, 2, 5, length - 1, 12, length])[:, None]
    mask, last = torch.arange(length) < lengths, torch.arange(length) == lengths - 1
    return torch.where(mask, rewards, 1e3), torch.where(mask, values, -1e3), mask, last


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.3])
@pytest.mark.parametrize("lam", [1.0, 0.95, 0.2])
@pytest.mark.parametrize("name", ["generalized_advantage_estimate", "vec_generalized_advantage_estimate"])
def test_gae_is_that_of_torchrl(name, lam, gamma):
    """A response is over with its last token, cut or not: in torchrl's words, it is done there, and terminated."""
    functional = pytest.importorskip("torchrl.objectives.value.functional")
    rewards, values, mask, last = rollout()
    next_values = torch.cat([values[:, 1:], torch.full((7, 1), 1e3)], dim=1)  # of no account where it is over
    wanted, returns = getattr(functional, name)(gamma, lam, values, next_values, rewards, last, time_dim=1)
    ours = gae(rewards, values, mask, gamma, lam)
    assert (ours - wanted)[mask].abs().max() < 1e-5 and not ours[~mask].any()
    assert (ours + values - returns)[mask].abs().max() < 1e-5


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.3])
def test_discounted_returns_are_those_of_torchrl(gamma):
    """Reward-to-go, of rewards at every step, in rows of different lengths."""
    functional = pytest.importorskip("torchrl.objectives.value.functional")
    rewards, _, mask, last = rollout()
    wanted = functional.reward2go(rewards, last, gamma, time_dim=1)
    for ours in (discounted_returns(rewards, mask, gamma), reward_to_go(rewards, mask, gamma)):
        assert (ours - wanted)[mask].abs().max() < 1e-5 and not ours[~mask].any()
