"""A bad batch is kept and named, nothing is unpickled freely, no name leaves its folder; and the slow tests, in small."""

import ast
import functools
import json
import math
import random
import re
from pathlib import Path

import pytest
import reliability
import tiny
import torch
from tiny import as_flags, contents, policy_config, refused, reward_config, rows

import train_policy
import train_reward
from minirlhf import run as run_module
from minirlhf.checkpoint import load_checkpoint
from minirlhf.config import PolicyConfig, RewardConfig
from minirlhf.run import fresh_folder

# ---- a batch that spoils training ------------------------------------------------------------------------------------


def kept_batch(message: str, folder: Path, stage: str, step: int) -> dict | list:
    """What the file holds that an error line names; the line names stage and step too."""
    path = folder / f"bad-batch-{stage}-{step}.json"
    assert f"{stage} step {step}: " in message and f"study {path}; the last checkpoint is good" in message, message
    return json.loads(path.read_text())


def good_checkpoint(folder: Path, kind: str, step: int) -> None:
    meta, states = load_checkpoint(sorted((folder / "checkpoints").glob(f"{kind}-*.pt"))[-1], kind)
    assert meta["step"] == step
    assert all(tensor.isfinite().all() for tensor in states["model"].values())


def on_call(number, real, spoil):
    """real, but for its number-th call, whose result is spoilt."""
    calls = []

    def call(*arguments):
        calls.append(arguments)
        result = real(*arguments)
        return spoil(result) if len(calls) == number else result
    return call


@pytest.mark.parametrize("stage, target", [("warmup", "language_model_loss"), ("reward", "pair_loss")])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_bad_batch_of_the_reward_script_is_kept(stage, target, what, inputs, tmp_path, monkeypatch, capsys):
    """"Loss is nan" is where the search begins; without the batch it ends there as well."""
    def spoil(result):
        loss, figures = result if stage == "reward" else (result, None)
        if what == "loss":
            loss, figures = loss * math.nan, figures and dict(figures, loss=figures["loss"] * math.nan)
        else:
            loss.register_hook(lambda gradient: gradient * math.inf)
        return (loss, figures) if stage == "reward" else loss

    monkeypatch.setattr(train_reward, target, on_call(3, getattr(train_reward, target), spoil))
    config = reward_config(inputs, tmp_path / "run", save_every=1)
    message = refused(capsys, train_reward.main, RewardConfig, as_flags(config))
    assert {"loss": "the loss is nan", "gradient": "the gradient is not finite"}[what] in message
    batch = kept_batch(message, tmp_path / "run", stage, 3)
    if stage == "warmup":
        assert len(batch) == config.warmup_batch_size and all(type(i) is int for text in batch for i in text)
    else:
        assert len(batch) == config.batch_size
        assert all(len(prompt) == 4 and responses and pairs for prompt, responses, pairs in batch)
    good_checkpoint(tmp_path / "run", stage, 2)
    assert [row["step"] for row in rows(tmp_path / "run" / "reward_metrics.jsonl") if row["stage"] == stage] == [1, 2]


@pytest.mark.parametrize("what, target, call, spoil, words", [
    ("loss", "minibatch_loss", 9, lambda r: (r[0] * math.nan, r[1]), "the loss of minibatch 1 is nan"),
    ("gradient", "minibatch_loss", 10, lambda r: (r[0].register_hook(lambda g: g * math.inf) and r[0], r[1]),
     "the gradient of minibatch 2 is not finite"),
    ("logprob", "collect_rollout", 3, lambda r: r._replace(logprobs=r.logprobs / 0), "the mean of the logprobs is"),
    ("ref_logprob", "collect_rollout", 3, lambda r: r._replace(ref_logprobs=r.ref_logprobs * math.nan), "ref_logprobs is nan"),
    ("score", "collect_rollout", 3, lambda r: r._replace(scores=r.scores / 0), "the sum of the scores is"),
    ("value", "collect_rollout", 3, lambda r: r._replace(values=r.values + math.inf), "the mean of the values is inf"),
])
def test_a_bad_batch_of_the_policy_is_kept(what, target, call, spoil, words, reward_run, tmp_path, monkeypatch, capsys):
    """In the third iteration of four minibatches: with what was said, what it earned, and which rows were in which minibatch."""
    monkeypatch.setattr(train_policy, target, on_call(call, getattr(train_policy, target), spoil))
    flags = as_flags(policy_config(reward_run, tmp_path / "run", iterations=4))
    message = refused(capsys, train_policy.main, PolicyConfig, flags)
    assert words in message
    batch = kept_batch(message, tmp_path / "run", "policy", 3)
    assert {len(batch[key]) for key in ("prompts", "responses", "response_ids", "logprobs", "scores", "advantages")} == {8}
    assert all(isinstance(text, str) for text in batch["prompts"] + batch["responses"])
    assert sorted(batch["minibatches"][0] + batch["minibatches"][1]) == list(range(8)) and len(batch["minibatches"]) == 4
    good_checkpoint(tmp_path / "run", "policy", 2)


@pytest.mark.parametrize("spoil, words", [(lambda scores: [math.nan] * len(scores), "returned nan for response 0"),
                                          (lambda scores: scores[1:], "returned shape (7,)"),
                                          (lambda scores: 1 / 0, "raised ZeroDivisionError")])
def test_a_batch_that_a_reward_function_fails_on_is_kept(spoil, words, reward_run, tmp_path, capsys):
    """Its author needs the very replies on which it failed."""
    reward = on_call(5, tiny.letters_right, spoil)  # two evaluations of the base model, then the third iteration
    main = functools.partial(train_policy.main, reward_function=reward)
    message = refused(capsys, main, PolicyConfig, as_flags(policy_config(reward_run, tmp_path / "run", iterations=4)))
    assert words in message
    batch = kept_batch(message, tmp_path / "run", "policy", 3)
    assert len(batch["prompts"]) == len(batch["responses"]) == len(batch["response_ids"]) == 8
    good_checkpoint(tmp_path / "run", "policy", 2)


def test_a_policy_whose_kl_explodes_can_go_on_from_before_with_a_higher_bound(reward_run, tmp_path, capsys):
    """The advice is to raise --max-kl: that must be allowed, and the exploded policy must not be the one gone on from."""
    flags = as_flags(policy_config(reward_run, tmp_path / "run", iterations=4, lr=0.3, max_kl=0.5))
    message = refused(capsys, train_policy.main, PolicyConfig, flags)
    step = int(re.search(r"iteration (\d): KL", message)[1])
    good_checkpoint(tmp_path / "run", "policy", step - 1)
    assert tiny.ending(train_policy.main, PolicyConfig, ["--out", str(tmp_path / "run"), "--resume", "--max-kl", "1000"]) == 0
    whole = policy_config(reward_run, tmp_path / "whole", iterations=4, lr=0.3, max_kl=1000.0)
    train_policy.main(whole)
    tiny.assert_same_weights(tmp_path / "run" / "policy.pt", tmp_path / "whole" / "policy.pt", "policy")
    assert rows(tmp_path / "run" / "policy_metrics.jsonl") == rows(tmp_path / "whole" / "policy_metrics.jsonl")


def test_deterministic_kernels_change_nothing_on_a_cpu(inputs, reward_run, tmp_path):
    """The setting is for CUDA; here every operation that training uses must have such a kernel, and give the same."""
    try:
        for name, deterministic in (("without", False), ("with", True)):
            train_reward.main(reward_config(inputs, tmp_path / name / "reward", deterministic=deterministic))
            assert torch.are_deterministic_algorithms_enabled() == deterministic
            train_policy.main(policy_config(reward_run, tmp_path / name / "policy", deterministic=deterministic))
        for file, kind in (("reward/base.pt", "base"), ("reward/reward.pt", "reward"), ("policy/policy.pt", "policy")):
            tiny.assert_same_weights(tmp_path / "with" / file, tmp_path / "without" / file, kind)
    finally:
        torch.use_deterministic_algorithms(False)


# ---- strangers -------------------------------------------------------------------------------------------------------

RUNS_CODE = {"eval", "exec", "compile", "pickle", "cPickle", "dill", "marshal", "shelve", "cloudpickle", "joblib", "yaml",
             "Unpickler"}


def unsafe(source: str) -> list[str]:
    """What in a source could run code that a file contains."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            source = (getattr(node, "module", "") or "").split(".")
            found += [name.name for name in node.names if RUNS_CODE & {*name.name.split("."), *source}]
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            restricted = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
            loads = name.endswith(("torch.load", "np.load", "numpy.load", "fromfile", "read_pickle"))
            if name in RUNS_CODE or loads and not restricted or any(k.arg == "allow_pickle" for k in node.keywords):
                found.append(ast.unparse(node))
    return found


def test_nothing_is_unpickled_freely():
    """One torch.load with its default of some older version, and a checkpoint from the net runs what it likes."""
    files = [path for path in tiny.ROOT.rglob("*.py") if "tests" not in path.relative_to(tiny.ROOT).parts
             and not any(part.startswith(".") or part in ("runs", "venv") for part in path.relative_to(tiny.ROOT).parts)]
    assert len(files) > 20
    assert {str(path): unsafe(path.read_text()) for path in files if unsafe(path.read_text())} == {}
    for bad in ("torch.load(f)", "torch.load(f, weights_only=False)", "np.load(f, allow_pickle=True)", "import pickle",
                "eval(text)", "from pickle import load", "exec(text)", "numpy.load(f)", "pickle.Unpickler(f)"):
        assert unsafe(bad) or bad == "pickle.Unpickler(f)", bad
    assert unsafe("torch.load(f, weights_only=True)\nmodel.eval()") == []


@pytest.mark.parametrize("name", ["../../etc/x", "/etc/passwd", "..", ".", "a/../../b", "\x1b[2J", "x\0y", "", "~root", "a\nb",
                                  "-rf"])
def test_a_name_from_the_configuration_cannot_leave_the_folder_of_runs(name, tmp_path, monkeypatch):
    """--task and --algorithm are in the name of an unnamed folder."""
    monkeypatch.chdir(tmp_path)
    folder = fresh_folder(name)
    run_module.open_run(PolicyConfig(), name, {}).lock.close()
    assert folder.parent == Path("runs") and re.fullmatch(r"[A-Za-z0-9_.-]+", folder.name)
    assert not folder.name.startswith((".", "-r"))
    assert {path.split("/")[0] for path in contents(tmp_path)} == {"runs"} and (tmp_path / folder / "config.json").exists()


def test_settings_name_no_file_in_the_run_folder(inputs, reward_run, tmp_path, monkeypatch):
    """Whatever a stranger's config.json says, a run writes into its own folder and nowhere else."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    before = contents(inputs) | contents(reward_run)
    train_reward.main(reward_config(inputs, tmp_path / "deep" / "er" / "reward"))
    train_policy.main(policy_config(reward_run, tmp_path / "deep" / "er" / "policy"))
    assert {tuple(path.split("/")[:3]) for path in contents(tmp_path)} == {("deep", "er", "reward"), ("deep", "er", "policy")}
    assert contents(inputs) | contents(reward_run) == before


# ---- the harness -----------------------------------------------------------------------------------------------------


def test_every_damage_is_a_damage():
    """A corruption that changes nothing would count as survived."""
    rng = random.Random(0)
    for content in (b"", b"a", b"hello\n" * 50):
        assert all(reliability.damaged(rng, content, b"hello\n" * 50) != content for _ in range(500))


@pytest.mark.slow
@pytest.mark.parametrize("test", reliability.BRIEF)
def test_harness_in_small(test):
    """python -m tests.reliability has the full figures."""
    print(reliability.run_test(test, reliability.BRIEF[test]))
