"""Comparisons with transformers, TRL and torchrl. A test is skipped if its library is missing.

float32: equal to 1e-5, logits to 1e-4. Nothing is downloaded, because weights are random.
"""

import os
from collections import defaultdict
from types import SimpleNamespace
from unittest.mock import MagicMock

from minirlhf.config import PolicyConfig, RewardConfig
from minirlhf.data.batches import PreferenceGroup, pad_left, pad_right
from minirlhf.data.tokenizer import pad_id
from minirlhf.kernels import discounted_returns, token_logprobs
from minirlhf.lab import conformance
from minirlhf.model import load_pretrained
from minirlhf.model.generate import generate
from minirlhf.model.pretrained import load_weights
from minirlhf.rl.advantages import gae, reward_to_go
from minirlhf.rl.dpo import dpo_loss
from minirlhf.rl.losses import preference_loss
from minirlhf.rl.rollout import evaluate_actions
from train_reward import language_model_loss, pair_loss

import pytest
import smollm2
import torch
from tiny import make_samples

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the libraries are imported
VOCAB = 1000
SCALED = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0)
SCALED |= dict(high_freq_factor=4.0, original_max_position_embeddings=64)
LLAMA = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=2,
    max_position_embeddings=512,
)
# name: (class of transformers' configuration, its settings)
PEERS = dict(
    gpt2=("GPT2Config", dict(n_layer=3, n_head=3, n_embd=192)),
    gpt2_small=("GPT2Config", dict(n_layer=12, n_head=12, n_embd=768, vocab_size=50257)),
    smollm2=("LlamaConfig", LLAMA | dict(tie_word_embeddings=True)),
    llama3=("LlamaConfig", LLAMA | dict(rope_parameters=SCALED, tie_word_embeddings=False)),
    qwen2=("Qwen2Config", LLAMA | dict(tie_word_embeddings=False)),
    qwen3=("Qwen3Config", LLAMA | dict(head_dim=24, tie_word_embeddings=True)),
)
SMALL = [name for name in PEERS if name != "gpt2_small"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def peer_model(name, seed=0, kind="", **settings):
    """A model of transformers, without dropout, with random weights, biases and gains.

    kind: its class; empty: the language model of the family.
    """
    transformers = pytest.importorskip("transformers")
    class_name, shape = PEERS[name]
    settings = dict(vocab_size=VOCAB, attn_implementation="eager") | shape | settings
    if name.startswith("gpt2"):
        settings |= dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    config = getattr(transformers, class_name)(**settings)
    if kind:
        model = getattr(transformers, kind)(config).eval()
    else:
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    random = generator(seed)
    spread = 0.05 if name.startswith("gpt2") else 0.15  # narrow models need more for sure choices
    with torch.no_grad():
        for weight in model.parameters():
            noise = spread * torch.randn(weight.shape, generator=random)
            weight.copy_(noise + weight if weight.ndim == 1 else noise)
    return model


def load_from_peer(peer, folder, **settings):
    """The peer's weights in this project's model, by the files that transformers writes."""
    peer.save_pretrained(folder, **settings)
    vocab = peer.config.vocab_size
    model = load_weights(folder, vocab, vocab + 64)
    for path in folder.glob("*.safetensors"):
        path.unlink()  # pytest would keep half a gigabyte
    return model


def random_sequences(lengths, seed=1):
    """Sequences of random ids, none of them 0."""
    sequences = []
    for length in lengths:
        ids = torch.randint(1, VOCAB, (length,), generator=generator(seed + length))
        sequences.append(ids.tolist())
    return sequences


def logits_of(model, ids, mask):
    return model(ids, mask) @ model.lm_weight.T


# ---- the model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [pad_left, pad_right])
@pytest.mark.parametrize("name", PEERS)
def test_logits_loss_and_gradients_equal_those_of_transformers(name, pad, tmp_path):
    """Every family, with several sequences under padding; GPT-2 also in its real size."""
    peer = peer_model(name)
    ours = load_from_peer(peer, tmp_path)
    ids, mask = pad(random_sequences([19, 7] if name == "gpt2_small" else [33, 2, 17, 200, 5]), 0)
    theirs = peer(
        ids,
        attention_mask=mask.long(),
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        labels=ids.masked_fill(~mask, -100),
    )
    difference = (logits_of(ours, ids, mask) - theirs.logits)[mask].abs().max()
    assert theirs.logits[mask].std() > 0.1 and difference < 1e-4
    if pad is pad_left:  # there the peer's loss also predicts first tokens, from padding
        return
    loss = language_model_loss(ours, ids, mask)
    assert abs(loss.item() - theirs.loss.item()) < 1e-5

    loss.backward()
    theirs.loss.backward()
    # The peer's gradients replace its weights, so that load_from_peer converts them too.
    with torch.no_grad():
        for weight in peer.parameters():
            weight.copy_(weight.grad)
    expected = dict(load_from_peer(peer, tmp_path).named_parameters())
    for key, weight in ours.named_parameters():
        if not key.startswith(("reward_head", "value_head")):
            assert expected[key].norm() > 0, key
            assert (weight.grad - expected[key]).norm() < 1e-5 * expected[key].norm(), key


def test_shards_that_transformers_writes_are_read(tmp_path):
    """In many files of a few tensors each, with an index."""
    peer = peer_model("qwen3")
    expected = load_from_peer(peer, tmp_path / "one").state_dict()
    sharded = load_from_peer(peer, tmp_path / "many", max_shard_size="100KB").state_dict()
    assert (tmp_path / "many" / "model.safetensors.index.json").exists()
    assert all(torch.equal(sharded[key], weight) for key, weight in expected.items())


@pytest.mark.parametrize("name", SMALL)
def test_greedy_decoding_equals_that_of_transformers(name, tmp_path):
    """The same tokens and log-probs, with left padding and rows that end at different times."""
    peer = peer_model(name)
    ours = load_from_peer(peer, tmp_path)
    ids, mask = pad_left(random_sequences([6, 1, 11, 3, 8, 2, 9]), 0)

    def generate_with_peer(eos):
        return peer.generate(
            ids,
            attention_mask=mask.long(),
            max_new_tokens=16,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )

    without_eos = generate_with_peer(None).sequences[:, ids.shape[1] :]
    eos = int(without_eos[0, 3])  # so that the first row ends early
    theirs = generate_with_peer(eos)
    expected = theirs.sequences[:, ids.shape[1] :]
    response, response_mask = generate(ours, ids, mask, 16, eos, 0)
    lengths = response_mask.sum(1)
    assert lengths[0] <= 4 and lengths.max() == 16 and expected.shape == response.shape
    assert torch.equal(response[response_mask], expected[response_mask])
    assert not expected[~response_mask].any()
    samples = make_samples(ids, mask, response, response_mask)
    logprobs, _, _ = evaluate_actions(ours, samples, 1.0)
    their_logprobs = torch.stack(theirs.logits, 1).log_softmax(-1)
    their_logprobs = their_logprobs.gather(2, expected[:, :, None]).squeeze(2)
    assert (logprobs - their_logprobs)[response_mask].abs().max() < 1e-5
    assert their_logprobs[response_mask].std() > 0.1


# ---- SmolLM2 -------------------------------------------------------------------------------------

QUESTIONS = (
    "What is the capital of France?",
    "My black fan is very late. Please send me a refund.",
    "Write a haiku about the sea.",
    "List three primes greater than 100.",
    "Why is the sky blue?",
    "Translate 'good morning' into Spanish.",
    "Who wrote Hamlet?",
    "What is 17 times 23?",
    "Give me a recipe for pancakes.",
    "Explain gravity to a child.",
    "Is a tomato a fruit?",
    "Name the planets of the solar system.",
    "How do I boil an egg?",
    "Tell me a joke about cats.",
    "What does HTTP stand for?",
    "Summarize the plot of Cinderella.",
    "Sort these words: pear, apple, fig.",
    "When did people first walk on the Moon?",
    "Write a function that adds two numbers.",
    "What should I wear in the rain?",
)


@pytest.mark.slow
def test_smollm2_gives_the_logits_and_the_greedy_text_of_transformers(tmp_path):
    """The real weights and the real tokenizer, on 20 prompts of different lengths.

    The texts may differ where the two best logits differ by less than the rounding.
    """
    transformers = pytest.importorskip("transformers")
    folder = smollm2.build(tmp_path)
    ours, encoding = load_pretrained(folder)
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = [[1, *encoding.encode_ordinary(f"user\n{text}"), 2, 198, 1] for text in QUESTIONS]
    pad = pad_id(encoding)
    ids, mask = pad_left(prompts, pad)
    with torch.no_grad():
        response, _ = generate(ours, ids, mask, 64, eos=pad, pad=pad)
        assert response.shape == (20, 64)
        for prompt, actual in zip(prompts, response.tolist()):
            sequence = torch.tensor([prompt + actual])
            theirs = peer(sequence).logits[0]
            difference = logits_of(ours, sequence, torch.ones_like(sequence).bool())[0] - theirs
            assert difference.abs().max() < 1e-3
            states = theirs[len(prompt) - 1 : -1]
            margin = states.max(-1).values - states[torch.arange(64), actual]
            assert margin.max() < 2e-3


# ---- the losses of pairs -------------------------------------------------------------------------


def trl_loss(model, inputs, centering):
    """The loss of TRL's RewardTrainer. The rest of the trainer only logs, so it is a stub."""
    trl = pytest.importorskip("trl")
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(center_rewards_coefficient=centering),
        accelerator=SimpleNamespace(gather_for_metrics=lambda x: x, gather=lambda x: x),
        _tp_size=1,
        _total_train_tokens=0,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    return trl.RewardTrainer.compute_loss(trainer, model, inputs)


@pytest.mark.parametrize("centering", [None, 0.0, 0.1])
@pytest.mark.parametrize("with_margin", [False, True])
def test_the_preference_loss_equals_that_of_trl(with_margin, centering):
    """The loss and its gradient, with and without margin and centering."""
    scores = (3 * torch.randn(2, 50, generator=generator())).requires_grad_()
    margin = torch.rand(50, generator=generator(1)) if with_margin else None
    inputs = dict(attention_mask=torch.ones(100, 4))
    if with_margin:
        inputs["margin"] = margin
    theirs = trl_loss(lambda **_: SimpleNamespace(logits=scores.view(100, 1)), inputs, centering)
    ours = preference_loss(*scores, margin, centering or 0.0)
    assert abs(ours.item() - theirs.item()) < 1e-5 and ours.item() > 0.1
    gradients = [torch.autograd.grad(loss, scores)[0] for loss in (ours, theirs)]
    assert (gradients[0] - gradients[1]).abs().max() < 1e-5 * gradients[1].abs().max()


def test_loss_and_gradients_of_a_reward_model_equal_those_of_trl(tmp_path):
    """Compares with the classifier of transformers on the last token and the loss of TRL."""
    one_score = dict(num_labels=1, pad_token_id=0)
    peer = peer_model("gpt2", kind="GPT2ForSequenceClassification", **one_score)
    language_model = peer_model("gpt2")
    language_model.transformer.load_state_dict(peer.transformer.state_dict())
    ours = load_from_peer(language_model, tmp_path)
    with torch.no_grad():
        ours.reward_head.weight.copy_(peer.score.weight)
    prompts = random_sequences([4, 1, 10, 6], seed=4)
    chosen = random_sequences([12, 3, 8, 20], seed=2)
    rejected = random_sequences([5, 9, 8, 2], seed=3)
    margins = [0.5, 0.0, 1.0, 0.25]
    groups = []
    for p, c, r, margin in zip(prompts, chosen, rejected, margins):
        pairs = ((0, 1, margin, 1.0),)
        groups.append(PreferenceGroup(tuple(p), (tuple(c), tuple(r)), pairs))
    config = RewardConfig(centering=0.1)
    loss, _ = pair_loss(ours, groups, 0, config, total_weight=4.0)
    loss.backward()
    sequences = [p + c for p, c in zip(prompts, chosen)]
    sequences += [p + r for p, r in zip(prompts, rejected)]
    ids, mask = pad_right(sequences, 0)
    inputs = dict(input_ids=ids, attention_mask=mask.long(), margin=torch.tensor(margins))
    theirs = trl_loss(peer, inputs, 0.1)
    theirs.backward()
    assert abs(loss.item() - theirs.item()) < 1e-5
    trunk = peer.transformer
    for actual, expected in (
        (ours.reward_head.weight.grad, peer.score.weight.grad),
        (ours.wpe.weight.grad, trunk.wpe.weight.grad),
        (ours.wte.weight.grad[:VOCAB], trunk.wte.weight.grad),
        (ours.blocks[0].attention_in.weight.grad, trunk.h[0].attn.c_attn.weight.grad.T),
    ):
        assert expected.norm() > 0
        assert (actual - expected).norm() < 1e-5 * expected.norm()


class LogProbs(torch.nn.Module):
    """A peer model that returns what TRL's fused LM head returns: log-probs of the labels."""

    def __init__(self, peer):
        super().__init__()
        self.peer = peer
        self.is_gradient_checkpointing = False

    def forward(self, input_ids, attention_mask, labels, **_):
        logits = self.peer(input_ids, attention_mask=attention_mask).logits[:, :-1]
        labels = labels[:, 1:]
        logprobs = logits.log_softmax(-1).gather(2, labels.clamp(min=0)[..., None]).squeeze(2)
        logprobs = torch.where(labels >= 0, logprobs, 0.0)
        zeros = torch.zeros_like(logprobs)  # of what is only logged
        return SimpleNamespace(
            log_probs=logprobs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
        )


def trl_dpo_loss(model, reference, inputs, beta):
    """The loss of TRL's DPOTrainer. What only logs is a mock."""
    trl = pytest.importorskip("trl")
    trainer = MagicMock(
        model=model,
        ref_model=reference,
        beta=beta,
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        precompute_ref_logps=False,
        use_weighting=False,
        aux_loss_enabled=False,
    )
    trainer.accelerator.device = torch.device("cpu")
    trainer.accelerator.gather_for_metrics = trainer.accelerator.gather = lambda x: x
    trainer.args.gradient_checkpointing_kwargs = None
    return trl.DPOTrainer._compute_loss(trainer, model, inputs, False)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_loss_and_gradients_of_dpo_equal_those_of_trl(beta, tmp_path):
    """Prompts and responses of different lengths, and a reference that is not the policy."""
    peers = [peer_model("gpt2", seed=seed) for seed in (0, 1)]
    ours = [load_from_peer(peer, tmp_path) for peer in peers]
    prompts = random_sequences([4, 1, 10, 6], seed=4)
    chosen = random_sequences([12, 3, 8, 20], seed=2)
    rejected = random_sequences([5, 9, 7, 2], seed=3)
    groups = [
        PreferenceGroup(tuple(p), (tuple(c), tuple(r)), ((0, 1, 0.0, 1.0),))
        for p, c, r in zip(prompts, chosen, rejected)
    ]
    config = PolicyConfig(algorithm="dpo", dpo_beta=beta)
    loss, _ = dpo_loss(*ours, groups, 0, config, total_weight=4.0)
    loss.backward()
    responses = chosen + rejected
    ids, mask = pad_right([p + r for p, r in zip(prompts * 2, responses)], 0)
    column = torch.arange(ids.shape[1])
    in_response = column >= torch.tensor([len(p) for p in prompts * 2])[:, None]
    inputs = dict(
        input_ids=ids, attention_mask=mask.long(), completion_mask=(in_response & mask).long()
    )
    theirs = trl_dpo_loss(*map(LogProbs, peers), inputs, beta)
    theirs.backward()
    assert abs(loss.item() - theirs.item()) < 1e-5 and loss.item() > 0.1
    trunk = peers[0].transformer
    for actual, expected in (
        (ours[0].wpe.weight.grad, trunk.wpe.weight.grad),
        (ours[0].wte.weight.grad[:VOCAB], trunk.wte.weight.grad),
        (ours[0].blocks[0].attention_in.weight.grad, trunk.h[0].attn.c_attn.weight.grad.T),
    ):
        assert expected.norm() > 0
        assert (actual - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_entropies_equal_those_of_trl(temperature):
    """The vocabulary has several tiles."""
    utils = pytest.importorskip("trl.trainer.utils")
    hidden = torch.randn(70, 32, generator=generator())
    weight = torch.randn(5000, 32, generator=generator(1)) / 4
    targets = torch.randint(0, 5000, (70,), generator=generator(2))
    logits = hidden @ weight.T
    ours, entropy = token_logprobs(hidden, weight, targets, temperature, entropy=True)
    expected = utils.selective_log_softmax(logits, targets, temperature)
    expected_entropy = utils.entropy_from_logits(logits / temperature)
    assert (ours - expected).abs().max() < 1e-5
    assert (entropy - expected_entropy).abs().max() < 1e-5


# ---- returns and advantages ----------------------------------------------------------------------


def example(length=75):
    """rewards, values, mask and is_last, [7, R]. Padding is not 0.

    is_last marks the last token of each row, as torchrl requires.
    """
    rewards, values = torch.randn(2, 7, length, generator=generator())
    lengths = torch.tensor([length, 1, 2, 5, length - 1, 12, length])[:, None]
    mask = torch.arange(length) < lengths
    is_last = torch.arange(length) == lengths - 1
    return torch.where(mask, rewards, 1e3), torch.where(mask, values, -1e3), mask, is_last


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.3])
@pytest.mark.parametrize("lam", [1.0, 0.95, 0.2])
@pytest.mark.parametrize(
    "name", ["generalized_advantage_estimate", "vec_generalized_advantage_estimate"]
)
def test_gae_equals_that_of_torchrl(name, lam, gamma):
    """The last token ends the episode: torchrl calls it done and terminated, even if it was cut."""
    functional = pytest.importorskip("torchrl.objectives.value.functional")
    rewards, values, mask, is_last = example()
    # no value counts after the end
    next_values = torch.cat([values[:, 1:], torch.full((7, 1), 1e3)], dim=1)
    estimate = getattr(functional, name)
    expected, returns = estimate(gamma, lam, values, next_values, rewards, is_last, time_dim=1)
    ours = gae(rewards, values, mask, gamma, lam)
    assert (ours - expected)[mask].abs().max() < 1e-5 and not ours[~mask].any()
    assert (ours + values - returns)[mask].abs().max() < 1e-5


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.3])
def test_discounted_returns_equal_those_of_torchrl(gamma):
    """Rewards at every step, in rows of different lengths."""
    functional = pytest.importorskip("torchrl.objectives.value.functional")
    rewards, _, mask, is_last = example()
    expected = functional.reward2go(rewards, is_last, gamma, time_dim=1)
    for ours in (discounted_returns(rewards, mask, gamma), reward_to_go(rewards, mask, gamma)):
        assert (ours - expected)[mask].abs().max() < 1e-5 and not ours[~mask].any()


# ---- what TRL's losses claim ---------------------------------------------------------------------


def trl_policy_loss(name, batch_tokens=0, only_kl=False, **settings):
    """The loss of TRL's GRPO or RLOO trainer, as minirlhf.lab.conformance calls it.

    The rest of the trainer is a stub. batch_tokens: of the whole generation batch; 0 means those of
    the batch itself. only_kl: all advantages are 0.
    """
    trl = pytest.importorskip("trl")
    trainer = getattr(trl, f"{name}Trainer")
    args = getattr(trl, f"{name}Config")(bf16=False, use_cpu=True, report_to=[], **settings)
    copied = ("beta", "max_completion_length", "loss_type", "importance_sampling_level")
    copied += ("top_entropy_quantile", "off_policy_mask_threshold")

    def loss(logprobs, old_logprobs, ref_logprobs, advantages, mask):
        measured = (logprobs, torch.zeros_like(logprobs), None)
        stub = SimpleNamespace(
            args=args,
            model=SimpleNamespace(training=True),
            accelerator=SimpleNamespace(
                num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
            ),
            current_gradient_accumulation_steps=1,
            aux_loss_enabled=False,
            use_vllm=False,
            _entropy_bonus_enabled=False,
            _metrics=defaultdict(lambda: defaultdict(list)),
            _get_per_token_logps_and_entropies=lambda *_, **__: measured,
            epsilon_low=args.epsilon,
            epsilon_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
            **{key: getattr(args, key, None) for key in copied},
        )
        mask = mask.long()
        inputs = dict(
            prompt_ids=mask[:, :0],
            prompt_mask=mask[:, :0],
            completion_ids=mask,
            completion_mask=mask,
            advantages=0.0 * advantages[:, 0] if only_kl else advantages[:, 0],
            old_per_token_logps=old_logprobs,
            ref_per_token_logps=ref_logprobs,
            old_logps=(old_logprobs * mask).sum(1),
            num_items_in_batch=torch.tensor(batch_tokens or int(mask.sum())),
        )
        return trainer._compute_loss(stub, None, inputs)

    return loss


CLIPS = "Clips the importance sampling weights"
LENGTH_BIAS = "Not recommended due to length bias"
NO_LENGTH_BIAS = "to eliminate length bias"
REVERSE_KL = "so that the KL gradient becomes the unbiased reverse-KL gradient"
SEQUENCE = dict(importance_sampling_level="sequence")
ONLY_KL = dict(loss_type="dr_grpo", beta=0.1, only_kl=True)
OWN_LENGTH = "each response is divided by its own length"
BATCH_TOKENS = "the sum is divided by the number of tokens in the batch"


@pytest.mark.parametrize(
    "trainer, settings, sentence, claim, fault",
    [
        ("GRPO", dict(loss_type="dr_grpo"), NO_LENGTH_BIAS, "policy-gradient", ""),
        ("GRPO", dict(loss_type="dapo"), NO_LENGTH_BIAS, "policy-gradient", BATCH_TOKENS),
        ("GRPO", dict(loss_type="dapo", batch_tokens=1000), "", "policy-gradient", ""),
        ("GRPO", dict(loss_type="grpo"), LENGTH_BIAS, "policy-gradient", OWN_LENGTH),
        (
            "GRPO",
            dict(loss_type="bnpo"),
            "depending on the local batch size",
            "policy-gradient",
            BATCH_TOKENS,
        ),
        ("GRPO", dict(loss_type="luspo", **SEQUENCE), "Length-Unbiased", "policy-gradient", ""),
        ("GRPO", dict(loss_type="cispo", batch_tokens=1000), CLIPS, "policy-gradient", ""),
        ("GRPO", dict(loss_type="sapo"), "useful learning signals", "policy-gradient", OWN_LENGTH),
        ("RLOO", {}, "", "policy-gradient", ""),
        ("GRPO", ONLY_KL, REVERSE_KL, "reverse-kl", "it satisfies reverse-kl-per-state"),
        ("GRPO", ONLY_KL, REVERSE_KL, "reverse-kl-per-state", ""),
        (
            "GRPO",
            dict(use_bias_correction_kl=False, **ONLY_KL),
            "",
            "reverse-kl-per-state",
            "it satisfies forward-kl-per-state",
        ),
    ],
)
def test_the_losses_of_trl_against_their_documentation(
    trainer, settings, sentence, claim, fault, capsys, tmp_path
):
    """fault: what is wrong, or "" if the claim holds. sentence: from the configuration's text."""
    trl = pytest.importorskip("trl")
    assert sentence in " ".join(getattr(trl, f"{trainer}Config").__doc__.split())
    loss = trl_policy_loss(trainer, output_dir=str(tmp_path), **settings)
    holds = conformance.check_loss(loss, claim, False)
    output = capsys.readouterr().out
    assert (holds, fault in output) == (fault == "", True), output


def test_the_loss_of_trls_rloo_is_exact_off_policy_without_clipping(capsys, tmp_path):
    """It weights with the ratio of the whole response."""
    loss = trl_policy_loss("RLOO", output_dir=str(tmp_path), epsilon=1e9)
    assert conformance.check_loss(loss, "policy-gradient", True)
    clipped = trl_policy_loss("RLOO", output_dir=str(tmp_path))
    assert not conformance.check_loss(clipped, "policy-gradient", True)


@pytest.mark.parametrize("bound, c", [(None, "0.0002"), (5.0, "0.001")])
def test_cispo_of_trl_clips_the_ratio_one_by_default(bound, c, capsys, tmp_path):
    """Its default bound is epsilon = 0.2; the recommended one is 5."""
    settings = dict(loss_type="cispo", batch_tokens=1000, epsilon_high=bound)
    loss = trl_policy_loss("GRPO", output_dir=str(tmp_path), **settings)
    assert conformance.check_loss(loss, "policy-gradient", False)
    assert f"c = {c} for [1, 3]" in capsys.readouterr().out
