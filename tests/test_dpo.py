"""Direct preference optimization against exact values, in float64.

Its optimum under full coverage, what partial coverage leaves open, the mean of a sampled pair's
gradient, and whole runs of `--algorithm dpo`.
"""

import json
import math
from types import SimpleNamespace

import train_policy
import train_reward
from minirlhf.config import PolicyConfig, RewardConfig
from minirlhf.data.batches import PreferenceGroup, collate_preferences, encode_preferences
from minirlhf.data.preference_files import read_preferences
from minirlhf.data.tokenizer import fingerprint, load_tokenizer
from minirlhf.model.loading import load_model
from minirlhf.rl import dpo
from minirlhf.rl.dpo import dpo_loss, response_logprobs
from minirlhf.rl.preferences import accumulate_gradient
from minirlhf.run.checkpoint import load_checkpoint

import pytest
import tiny
import torch
import torch.nn.functional as F
from exact import TokenMDP, gradient, make_mdp, padded_samples, relative_error, tabulate, tiny_model
from exact import response_logprobs as exact_logprobs
from tiny import as_flags, policy_config, refused, reward_config, rows
from torch import Tensor, nn

MDP = make_mdp(((1, 0, 1), (0,)), vocab=3, limit=2)  # 7 responses to each of two prompts
COUNT = len(MDP.responses)
BETA = 0.7
TEMPERATURE = 1.3
CONFIG = PolicyConfig(algorithm="dpo", dpo_beta=BETA, temperature=TEMPERATURE)


@pytest.fixture(autouse=True)
def float64_weights(monkeypatch):
    """The weights of pairs in float64: a probability is not exact in float32."""

    def collate(groups, pad, device="cpu"):
        weights = [weight for group in groups for *_, weight in group.pairs]
        batch = collate_preferences(groups, pad, device)
        assert batch.weight.tolist() == pytest.approx(weights)
        return batch._replace(weight=torch.tensor(weights, dtype=torch.float64))

    monkeypatch.setattr(dpo, "collate_preferences", collate)


class LogitTable(nn.Module):
    """A policy with a free logit for each action in each state. Its hidden state is its logits.

    It can represent any distribution over the responses.
    """

    def __init__(self, mdp: TokenMDP, logits: Tensor | None = None):
        super().__init__()
        states = dict.fromkeys(state for row in range(COUNT) for state, _ in mdp.steps(row))
        self.states = {state: number for number, state in enumerate(states)}
        self.number = {(*mdp.prompts[p], *tokens): n for (p, tokens), n in self.states.items()}
        if logits is None:
            logits = torch.randn(
                len(states), mdp.vocab, generator=torch.Generator().manual_seed(5)
            ).double()
        self.logits = nn.Parameter(logits)
        self.lm_table = torch.eye(mdp.vocab, dtype=torch.float64)
        self.wte = SimpleNamespace(weight=self.lm_table)  # only its device is used
        self.config = SimpleNamespace(vocab_size=mdp.vocab)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        rows = [
            [self.number.get(tuple(row[: t + 1]), 0) for t in range(len(row))]
            for row in ids.tolist()
        ]
        return self.logits[torch.tensor(rows)]

    def response_logprobs(self) -> Tensor:
        """[N], at the temperature of CONFIG."""
        logp = (self.logits / TEMPERATURE).log_softmax(-1)
        return torch.stack(
            [sum(logp[self.states[s], a] for s, a in MDP.steps(row)) for row in range(COUNT)]
        )

    @classmethod
    def of_distribution(cls, logprobs: Tensor) -> "LogitTable":
        """The policy whose responses have these log-probs [N], normalized for each prompt."""
        table = cls(MDP)
        mass = torch.zeros_like(table.logits.data)
        for row, probability in enumerate(logprobs.exp().tolist()):
            for state, action in MDP.steps(row):
                mass[table.states[state], action] += probability
        table.logits.data = TEMPERATURE * mass.log()
        return table


def utilities() -> Tensor:
    """[N] random, with an offset for each prompt, which must not matter."""
    noise = torch.randn(COUNT, generator=torch.Generator().manual_seed(6)).double()
    return 2.0 * noise + 3.0 * torch.tensor(MDP.prompt_of)


def of_prompt(prompt: int) -> list[int]:
    return [row for row in range(COUNT) if MDP.prompt_of[row] == prompt]


def all_groups(utility: Tensor, rows: list[int]) -> list[PreferenceGroup]:
    """All ordered pairs of these rows, weighted by the probability that an annotator prefers it."""
    groups = []
    for prompt, ids in enumerate(MDP.prompts):
        own = [row for row in of_prompt(prompt) if row in rows]
        pairs = tuple(
            (i, j, 0.0, torch.sigmoid(utility[a] - utility[b]).item())
            for i, a in enumerate(own)
            for j, b in enumerate(own)
            if i != j
        )
        groups.append(PreferenceGroup(ids, tuple(MDP.responses[row] for row in own), pairs))
    return groups


def loss_of(policy, reference, groups) -> Tensor:
    total = sum(weight for group in groups for *_, weight in group.pairs)
    return dpo_loss(policy, reference, groups, MDP.vocab, CONFIG, total)[0]


def optimum(reference: LogitTable, utility: Tensor) -> Tensor:
    """[N] log-probs of pi* = pi_ref exp(u / beta) / Z."""
    unnormalized = reference.response_logprobs().detach() + utility / BETA
    return unnormalized.view(2, -1).log_softmax(1).flatten()


# ---- the population loss -------------------------------------------------------------------------


def test_the_optimum_of_the_penalized_objective_minimizes_the_loss():
    """With all pairs, the gradient at pi* is 0, and elsewhere it is not.

    Catches a wrong sign, a wrong place of beta, and log-probs that lack a token or have too many.
    """
    reference = LogitTable(MDP)
    utility = utilities()
    groups = all_groups(utility, list(range(COUNT)))
    best = LogitTable.of_distribution(optimum(reference, utility))
    assert torch.allclose(best.response_logprobs(), optimum(reference, utility))
    assert gradient(loss_of(best, reference, groups), best).abs().max() < 1e-9
    start = LogitTable(MDP)
    assert gradient(loss_of(start, reference, groups), start).abs().max() > 1e-2
    assert loss_of(best, reference, groups) < loss_of(start, reference, groups) - 0.05
    assert loss_of(start, reference, groups).item() == pytest.approx(math.log(2))


def test_pairs_that_miss_responses_leave_their_probability_open():
    """Two policies with the same loss, one of which puts most of its mass on unseen responses.

    Pairs state only differences of log-ratios. If all seen responses lose the same factor, the loss
    does not change, but the objective does.
    """
    reference = LogitTable(MDP)
    utility = utilities()
    unseen = [of_prompt(prompt)[k] for prompt in (0, 1) for k in (2, 5)]
    seen = [row for row in range(COUNT) if row not in unseen]
    groups = all_groups(utility, seen)
    first = optimum(reference, utility)
    mass = first.exp()
    second = mass.clone()
    for prompt in (0, 1):
        mine = torch.tensor(of_prompt(prompt))
        free = torch.tensor([row for row in unseen if MDP.prompt_of[row] == prompt])
        second[mine] *= 0.1 / (1 - mass[free].sum())
        second[free] = 0.9 * mass[free] / mass[free].sum()
    policies = [LogitTable.of_distribution(logp) for logp in (first, second.log())]
    losses = [loss_of(policy, reference, groups).item() for policy in policies]
    assert abs(losses[0] - losses[1]) < 1e-12
    objectives = []
    for policy in policies:
        logp = policy.response_logprobs().detach()
        penalty = BETA * (logp - reference.response_logprobs())
        objectives.append((logp.exp() * (utility - penalty)).sum().item() / 2)
    assert objectives[0] > objectives[1] + 0.3
    all_pairs = all_groups(utility, list(range(COUNT)))
    assert loss_of(policies[0], reference, all_pairs) < loss_of(policies[1], reference, all_pairs)


# ---- the loss of a batch -------------------------------------------------------------------------


def formula(model, reference, pairs, weights, margins) -> Tensor:
    """The weighted loss from log-probs of states computed alone, without padding."""
    log_ratio = exact_logprobs(tabulate(model, MDP, TEMPERATURE), MDP)
    log_ratio = log_ratio - exact_logprobs(tabulate(reference, MDP, TEMPERATURE), MDP).detach()
    winners, losers = torch.tensor(pairs).T
    difference = BETA * (log_ratio[winners] - log_ratio[losers]) - torch.tensor(margins)
    weight = torch.tensor(weights, dtype=torch.float64)
    return -(weight * F.logsigmoid(difference)).sum() / weight.sum()


def ragged_groups() -> tuple[list[PreferenceGroup], list, list[float], list[float]]:
    """Groups of both prompts with weights and margins, and the same pairs as row numbers."""
    pairs = [(0, 3), (2, 0), (6, 1), (7, 9), (13, 8)]
    weights = [1.0, 0.25, 2.0, 0.5, 1.0]
    margins = [0.0, 0.5, 0.0, -0.25, 1.0]
    groups = []
    for winner, loser, margin, weight in zip(*zip(*pairs), margins, weights):
        prompt = MDP.prompts[MDP.prompt_of[winner]]
        responses = MDP.responses[winner], MDP.responses[loser]
        groups.append(PreferenceGroup(prompt, responses, ((0, 1, margin, weight),)))
    return groups, pairs, weights, margins


def test_loss_and_gradient_of_a_padded_batch_equal_the_formula():
    """Prompts of different lengths, cut and ended responses, weights, margins, a temperature."""
    model, reference = tiny_model(1, 3), tiny_model(2, 3).requires_grad_(False)
    groups, *pairs = ragged_groups()
    expected = formula(model, reference, *pairs)
    loss = loss_of(model, reference, groups)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    assert relative_error(gradient(loss, model), gradient(expected, model)) < 1e-9
    samples = padded_samples(MDP)
    assert samples.prompt_ids.shape[1] == 3  # one of the prompts is padded


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_micro_batches_add_up(micro_batch_size):
    """The same loss and gradient, although the micro-batches have different weights."""
    reference = tiny_model(2, 3).requires_grad_(False)
    groups, *_ = ragged_groups()

    def compute(size: int) -> tuple[dict, Tensor]:
        model = tiny_model(1, 3)
        row = accumulate_gradient(
            model,
            groups,
            size,
            lambda some, total: dpo_loss(model, reference, some, 3, CONFIG, total),
        )
        gradients = [w.grad.flatten() for w in model.parameters() if w.grad is not None]
        return row, torch.cat(gradients)

    whole, expected = compute(0)
    parts, actual = compute(micro_batch_size)
    assert parts == pytest.approx(whole, rel=1e-9) and parts["accuracy"] > 0
    assert relative_error(actual, expected) < 1e-9


def test_the_mean_gradient_of_a_sampled_pair_is_that_of_the_population_loss():
    """Pairs of two responses sampled from the reference, labeled by an annotator."""
    model, reference = tiny_model(1, 3), tiny_model(2, 3).requires_grad_(False)
    utility = utilities()
    p = exact_logprobs(tabulate(reference, MDP, TEMPERATURE), MDP).exp()
    log_ratio = exact_logprobs(tabulate(model, MDP, TEMPERATURE), MDP) - p.log()
    expected = torch.zeros(())
    mean = torch.zeros(())
    for prompt in (0, 1):
        for a in of_prompt(prompt):
            for b in of_prompt(prompt):
                chosen = torch.sigmoid(utility[a] - utility[b])
                difference = BETA * (log_ratio[a] - log_ratio[b])
                # the cross-entropy of the annotator's and the policy's probability
                cross_entropy = chosen * F.softplus(-difference)
                cross_entropy = cross_entropy + (1 - chosen) * F.softplus(difference)
                expected = expected + p[a] * p[b] / 2 * cross_entropy
                if a == b:
                    continue  # a pair of equal responses is dropped from the data: its loss is
                    # constant
                for winner, loser, probability in ((a, b, chosen), (b, a, 1 - chosen)):
                    responses = MDP.responses[winner], MDP.responses[loser]
                    group = PreferenceGroup(MDP.prompts[prompt], responses, ((0, 1, 0.0, 1.0),))
                    weight = p[a] * p[b] / 2 * probability
                    mean = mean + weight * loss_of(model, reference, [group])
    assert relative_error(gradient(mean, model), gradient(expected, model)) < 1e-9


def test_response_logprobs_leave_out_the_prompt():
    """They are those of the policy's actions, EOS included."""
    model = tiny_model(1, 3)
    prompts = [MDP.prompts[number] for number in MDP.prompt_of]
    groups = [PreferenceGroup(p, (r,), ((0, 0, 0.0, 1.0),)) for p, r in zip(prompts, MDP.responses)]
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    actual = response_logprobs(model, collate_preferences(groups, 3), lengths, TEMPERATURE)
    expected = exact_logprobs(tabulate(model, MDP, TEMPERATURE), MDP)
    assert (actual - expected).abs().max() < 1e-12


# ---- runs ----------------------------------------------------------------------------------------


SAME_BASE = dict(sft_sequences=480, normalize_prompts=14)  # as the fixture reward_run


def dpo_config(reward_run, out, **changes) -> PolicyConfig:
    """4 iterations of 8 prompts, in two steps each."""
    return policy_config(reward_run, out, algorithm="dpo", **{**dict(iterations=4), **changes})


def flags_of(reward_run, out, **changes) -> list[str]:
    return as_flags(dpo_config(reward_run, out, **changes))


@pytest.fixture(scope="module")
def base_only(inputs, tmp_path_factory):
    """A run of train_reward.py --epochs 0."""
    folder = tmp_path_factory.mktemp("base-only") / "reward"
    assert train_reward.main(reward_config(inputs, folder, **SAME_BASE, epochs=0)) == {}
    return folder


def test_a_run_learns_the_pairs_and_writes_the_usual_files(reward_run, tmp_path, capsys):
    result = train_policy.main(dpo_config(reward_run, tmp_path / "run", iterations=20))
    names = {path.name for path in (tmp_path / "run").iterdir()} - {".lock"}
    assert names == tiny.POLICY_FILES
    first, *logged = rows(tmp_path / "run" / "policy_metrics.jsonl")
    assert first["step"] == 0 and [row["step"] for row in logged] == list(range(1, 21))
    for row in logged:
        assert {"loss", "accuracy", "lr", "grad_norm"} <= row.keys()
    assert logged[-1]["eval_sampled_kl"] > 0.1 and "eval_sampled_score" in logged[-1]
    assert logged[0]["loss"] > 0.6 and logged[-1]["loss"] < 0.5
    assert logged[-1]["accuracy"] > 0.9
    assert result["sampled_kl"] > 0.1
    output = capsys.readouterr().out
    assert "pairs: kept 28 of 28 pairs" in output and "iteration 20/20  loss 0." in output


def test_without_a_learning_rate_the_loss_stays_ln_2(reward_run, tmp_path):
    train_policy.main(dpo_config(reward_run, tmp_path / "run", lr=0.0, micro_batch_size=1))
    for row in rows(tmp_path / "run" / "policy_metrics.jsonl")[1:]:
        assert row["loss"] == pytest.approx(math.log(2), abs=1e-6) and row["grad_norm"] > 0


def test_the_learning_rate_rises_and_falls_over_all_steps(reward_run, tmp_path):
    """8 steps, two in each iteration: 1, 7/8, 6/8, ... of the peak."""
    train_policy.main(dpo_config(reward_run, tmp_path / "run", lr=0.8))
    logged = [row["lr"] for row in rows(tmp_path / "run" / "policy_metrics.jsonl")[1:]]
    assert logged == pytest.approx([0.75, 0.55, 0.35, 0.15])


def test_each_iteration_has_the_next_pairs(reward_run, tmp_path, monkeypatch):
    """14 prompts: after 8 steps of 4, 4, 4 and 2 prompts, each was there twice."""
    seen = []
    loss = dpo.dpo_loss

    def recording_loss(policy, reference, groups, *rest):
        seen.extend(groups)
        return loss(policy, reference, groups, *rest)

    monkeypatch.setattr(dpo, "dpo_loss", recording_loss)
    train_policy.main(dpo_config(reward_run, tmp_path / "run"))
    counts = [seen.count(group) for group in set(seen)]
    assert counts == [2] * 14


def test_other_pairs_can_be_named(reward_run, inputs, tmp_path):
    """Pairs with the labels exchanged give a loss below ln 2 on themselves alone."""
    records = [json.loads(line) for line in (inputs / "pairs.jsonl").read_text().splitlines()]
    swapped = tmp_path / "swapped.jsonl"
    with open(swapped, "w") as file:
        for record in records:
            chosen, rejected = record["rejected"], record["chosen"]
            file.write(json.dumps(record | dict(chosen=chosen, rejected=rejected)) + "\n")
    config = dpo_config(reward_run, tmp_path / "run", iterations=20, data=(str(swapped),))
    train_policy.main(config)
    facts = json.loads((tmp_path / "run" / "config.json").read_text())["facts"]
    assert facts["pairs 1"].endswith(f"  {swapped}")
    encoding = load_tokenizer(str(inputs / "bytes.tiktoken"))
    policy, _ = load_model(tmp_path / "run" / "policy.pt", "policy", fingerprint(encoding))
    base, _ = load_model(reward_run / "base.pt", "base", fingerprint(encoding))
    losses = []
    for file in (swapped, inputs / "pairs.jsonl"):
        groups, _ = encode_preferences(read_preferences(str(file)), encoding, 6, 5)
        total = float(sum(len(group.pairs) for group in groups))
        losses.append(dpo_loss(policy, base, groups, tiny.PAD, config, total)[0].item())
    assert losses[0] < 0.6 and losses[1] > 0.8


@pytest.mark.parametrize("task", ["tiny", "none"])
def test_a_reward_run_of_0_epochs_suffices(task, base_only, inputs, tmp_path, capsys):
    """Its base model is that of a full run. Without a reward model, evaluations have no scores."""
    reward = base_only
    if task == "none":  # no gold utility either
        reward = tmp_path / "reward"
        train_reward.main(reward_config(inputs, reward, epochs=0, task="none"))
    assert not (reward / "reward.pt").exists()
    capsys.readouterr()
    result = train_policy.main(dpo_config(reward, tmp_path / "run", task=task, best_of_n=2))
    row = rows(tmp_path / "run" / "policy_metrics.jsonl")[-1]
    assert not any("score" in key or "best_of" in key for key in {**row, **result})
    assert ("sampled_gold" in result) == ("sampled_win_rate" in result) == (task == "tiny")
    output = capsys.readouterr().out
    assert "reward: none" in output and "score +" not in output and "score -" not in output
    page = (tmp_path / "run" / "samples.md").read_text()
    assert ("**after** (gold " in page) == (task == "tiny") and "**after**" in page


def test_the_base_model_does_not_depend_on_the_epochs(base_only, reward_run):
    tiny.assert_same_weights(base_only / "base.pt", reward_run / "base.pt", "base")


def test_a_reward_model_can_be_added_later(base_only, reward_run, inputs, tmp_path):
    """--resume --epochs 3 continues such a run."""
    folder = tmp_path / "reward"
    train_reward.main(reward_config(inputs, folder, **SAME_BASE, epochs=0))
    arguments = ["--out", str(folder), "--resume", *tiny.MODULES, "--epochs", "3"]
    assert tiny.ending(train_reward.main, RewardConfig, arguments) == 0
    tiny.assert_same_weights(folder / "reward.pt", reward_run / "reward.pt", "reward")


def test_only_the_policy_learns(reward_run, tmp_path):
    """The reward head and the value head stay as they are in the base model."""
    train_policy.main(dpo_config(reward_run, tmp_path / "run"))
    ours = load_checkpoint(tmp_path / "run" / "policy.pt", "policy")[1]["model"]
    base = load_checkpoint(reward_run / "base.pt", "base")[1]["model"]
    changed = {name for name in ours if not torch.equal(ours[name], base[name])}
    assert {name for name in ours if "_head" in name or "score_" in name}.isdisjoint(changed)
    assert {"wte.weight", "blocks.0.mlp_in.weight"} <= changed


# ---- bad input -----------------------------------------------------------------------------------


def error(capsys, flags) -> str:
    return refused(capsys, train_policy.main, PolicyConfig, flags)


def test_bad_input_is_one_line(reward_run, base_only, tmp_path, capsys):
    out = tmp_path / "run"
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a 1:"}\n')
    message = error(capsys, flags_of(reward_run, out, data=(str(prompts),)))
    assert f"{prompts}:1: " in message and '"chosen"' in message
    message = error(capsys, flags_of(reward_run, out, reward="tiny:letters_right"))
    assert "preference pairs" in message and "--reward" in message
    message = error(capsys, flags_of(reward_run, out, prompts=str(prompts)))
    assert "--prompts" in message and "--data" in message
    for beta in ("0", "-1", "nan"):
        message = error(capsys, [*flags_of(reward_run, out), f"--dpo-beta={beta}"])
        assert "--dpo-beta" in message
    message = error(capsys, as_flags(policy_config(base_only, out)))
    assert str(base_only) in message and "no reward model" in message
    message = error(capsys, as_flags(policy_config(reward_run, out, data=(str(prompts),))))
    assert "--data" in message and "--prompts" in message
    assert "did you mean dpo" in error(capsys, [*flags_of(reward_run, out), "--algorithm=dop"])
    assert not out.exists()


def test_a_reward_run_without_its_pairs_is_one_line(inputs, tmp_path, capsys):
    """The policy run reads the file that the reward run was trained on."""
    own = tmp_path / "inputs"
    own.mkdir()
    tiny.write_inputs(own)
    train_reward.main(reward_config(own, tmp_path / "reward", epochs=0))
    (own / "pairs.jsonl").unlink()
    message = error(capsys, flags_of(tmp_path / "reward", tmp_path / "run"))
    assert str(own / "pairs.jsonl") in message
