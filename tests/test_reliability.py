"""Bad batches are saved, files cannot run code, and runs write only into their own folder.

The slow tests run tests/reliability.py with few cases.
"""

import ast
import functools
import json
import math
import random
import re
from pathlib import Path

import train_policy
import train_reward
from minirlhf.config import PolicyConfig, RewardConfig
from minirlhf.run.checkpoint import load_checkpoint
from minirlhf.run.folder import open_folder, unused_folder

import pytest
import reliability
import tiny
import torch
from tiny import as_flags, contents, policy_config, refused, reward_config, rows

# ---- a batch on which training fails -------------------------------------------------------------


def saved_batch(message: str, folder: Path, stage: str, step: int) -> dict:
    """The content of the file that an error line names; checks that it names stage and step."""
    path = folder / f"bad-batch-{stage}-{step}.json"
    assert f"{stage} step {step}: " in message, message
    assert f"the batch is in {path}; the last checkpoint is not affected" in message, message
    return json.loads(path.read_text())


def assert_last_checkpoint(folder: Path, kind: str, step: int) -> None:
    """The newest checkpoint is that of this step, and its weights are finite."""
    meta, states = load_checkpoint(sorted((folder / "checkpoints").glob(f"{kind}-*.pt"))[-1], kind)
    assert meta["step"] == step
    assert all(tensor.isfinite().all() for tensor in states["model"].values())


def on_call(number, real, spoil):
    """The function `real`, but spoil() changes the result of its number-th call."""
    calls = []

    def call(*arguments):
        calls.append(arguments)
        result = real(*arguments)
        return spoil(result) if len(calls) == number else result

    return call


@pytest.mark.parametrize("stage, target", [("sft", "language_model_loss"), ("reward", "pair_loss")])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_bad_batch_of_the_reward_script_is_saved(
    stage, target, what, inputs, tmp_path, monkeypatch, capsys
):
    """The message names the batch; without it, "the loss is nan" gives no hint at the cause."""

    def spoil(result):
        loss, metrics = result if stage == "reward" else (result, None)
        if what == "gradient":
            loss.register_hook(lambda gradient: gradient * math.inf)
        elif stage == "reward":
            loss = loss * math.nan
            metrics = dict(metrics, loss=metrics["loss"] * math.nan)
        else:
            loss = loss * math.nan
        return (loss, metrics) if stage == "reward" else loss

    monkeypatch.setattr(train_reward, target, on_call(3, getattr(train_reward, target), spoil))
    config = reward_config(inputs, tmp_path / "run", save_every=1)
    message = refused(capsys, train_reward.main, RewardConfig, as_flags(config))
    assert {"loss": "the loss is nan", "gradient": "the gradient is not finite"}[what] in message
    batch = saved_batch(message, tmp_path / "run", stage, 3)
    if stage == "sft":
        assert len(batch["texts"]) == config.sft_batch_size
        assert all(type(i) is int for text in batch["texts"] for i in text)
    else:
        groups = batch["groups"]
        assert len(groups) == config.batch_size
        assert all(len(prompt) == 4 and responses and pairs for prompt, responses, pairs in groups)
    assert_last_checkpoint(tmp_path / "run", stage, 2)
    logged = rows(tmp_path / "run" / "reward_metrics.jsonl")
    assert [row["step"] for row in logged if row["stage"] == stage] == [1, 2]


@pytest.mark.parametrize(
    "what, target, call, spoil, words",
    [
        (
            "loss",
            "minibatch_loss",
            9,
            lambda r: (r[0] * math.nan, r[1]),
            "the loss of minibatch 1 is nan",
        ),
        (
            "gradient",
            "minibatch_loss",
            10,
            lambda r: (r[0].register_hook(lambda g: g * math.inf) and r[0], r[1]),
            "the gradient of minibatch 2 is not finite",
        ),
        (
            "logprob",
            "measure",
            5,  # two calls in each iteration, first for the policy
            lambda r: (r[0] / 0, r[1]),
            "the mean of the logprobs is",
        ),
        ("ref_logprob", "measure", 6, lambda r: (r[0] * math.nan, r[1]), "ref_logprobs is nan"),
        ("score", "score", 3, lambda r: r / 0, "the sum of the scores is"),
        ("value", "measure", 5, lambda r: (r[0], r[1] + math.inf), "the mean of the values is inf"),
    ],
)
def test_a_bad_batch_of_the_policy_is_saved(
    what, target, call, spoil, words, reward_run, tmp_path, monkeypatch, capsys
):
    """In the third iteration: with texts, rewards, and the rows of each of its four minibatches."""
    monkeypatch.setattr(train_policy, target, on_call(call, getattr(train_policy, target), spoil))
    flags = as_flags(policy_config(reward_run, tmp_path / "run", iterations=4))
    message = refused(capsys, train_policy.main, PolicyConfig, flags)
    assert words in message
    batch = saved_batch(message, tmp_path / "run", "policy", 3)
    columns = ("prompts", "responses", "response_ids", "logprobs", "scores", "advantages")
    assert {len(batch[column]) for column in columns} == {8}
    assert all(isinstance(text, str) for text in batch["prompts"] + batch["responses"])
    minibatches = batch["minibatches"]
    assert len(minibatches) == 4
    assert sorted(minibatches[0] + minibatches[1]) == list(range(8))
    assert_last_checkpoint(tmp_path / "run", "policy", 2)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda scores: [math.nan] * len(scores), "returned nan for response 0"),
        (lambda scores: scores[1:], "returned shape (7,)"),
        (lambda scores: 1 / 0, "raised ZeroDivisionError"),
    ],
)
def test_a_batch_on_which_a_reward_function_fails_is_saved(
    spoil, words, reward_run, tmp_path, capsys
):
    """The function's author needs exactly the responses on which it failed."""
    # two evaluations of the base model, then the third iteration
    reward = on_call(5, tiny.letters_right, spoil)
    main = functools.partial(train_policy.main, reward_function=reward)
    flags = as_flags(policy_config(reward_run, tmp_path / "run", iterations=4))
    message = refused(capsys, main, PolicyConfig, flags)
    assert words in message
    batch = saved_batch(message, tmp_path / "run", "policy", 3)
    assert len(batch["prompts"]) == len(batch["responses"]) == len(batch["response_ids"]) == 8
    assert_last_checkpoint(tmp_path / "run", "policy", 2)


def test_a_run_with_an_exploded_kl_resumes_before_it_with_a_larger_max_kl(
    reward_run, tmp_path, capsys
):
    """The error suggests a larger --max-kl, so that must be allowed when resuming.

    The run resumes from the checkpoint before the KL was too large.
    """
    flags = as_flags(policy_config(reward_run, tmp_path / "run", iterations=4, lr=0.3, max_kl=0.5))
    message = refused(capsys, train_policy.main, PolicyConfig, flags)
    step = int(re.search(r"iteration (\d): the KL", message)[1])
    assert_last_checkpoint(tmp_path / "run", "policy", step - 1)
    flags = ["--out", str(tmp_path / "run"), "--resume", *tiny.MODULES, "--max-kl", "1000"]
    assert tiny.ending(train_policy.main, PolicyConfig, flags) == 0
    expected = tmp_path / "expected"
    train_policy.main(policy_config(reward_run, expected, iterations=4, lr=0.3, max_kl=1000.0))
    tiny.assert_same_weights(tmp_path / "run" / "policy.pt", expected / "policy.pt", "policy")
    logged = rows(tmp_path / "run" / "policy_metrics.jsonl")
    assert logged == rows(expected / "policy_metrics.jsonl")


def test_deterministic_kernels_change_nothing_on_a_cpu(inputs, reward_run, tmp_path):
    """The setting is for CUDA.

    On a CPU every operation that training uses must have such a kernel, with the same result.
    """
    try:
        for name, deterministic in (("without", False), ("with", True)):
            train_reward.main(
                reward_config(inputs, tmp_path / name / "reward", deterministic=deterministic)
            )
            assert torch.are_deterministic_algorithms_enabled() == deterministic
            train_policy.main(
                policy_config(reward_run, tmp_path / name / "policy", deterministic=deterministic)
            )
        for file, kind in (
            ("reward/base.pt", "base"),
            ("reward/reward.pt", "reward"),
            ("policy/policy.pt", "policy"),
        ):
            tiny.assert_same_weights(tmp_path / "with" / file, tmp_path / "without" / file, kind)
    finally:
        torch.use_deterministic_algorithms(False)


# ---- files and names from other people -----------------------------------------------------------

RUNS_CODE = {
    "eval",
    "exec",
    "compile",
    "pickle",
    "cPickle",
    "dill",
    "marshal",
    "shelve",
    "cloudpickle",
    "joblib",
    "yaml",
    "Unpickler",
}


def unsafe(source: str) -> list[str]:
    """The imports and calls in a source that could run code from a file."""
    problems = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = (getattr(node, "module", "") or "").split(".")
            problems += [
                name.name for name in node.names if RUNS_CODE & {*name.name.split("."), *module}
            ]
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            restricted = any(
                k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords
            )
            loads = name.endswith(
                ("torch.load", "np.load", "numpy.load", "fromfile", "read_pickle")
            )
            if (
                name in RUNS_CODE
                or loads
                and not restricted
                or any(k.arg == "allow_pickle" for k in node.keywords)
            ):
                problems.append(ast.unparse(node))
    return problems


def test_no_file_can_run_code():
    """torch.load without weights_only=True would run code that a downloaded checkpoint contains."""
    files = [
        path
        for path in tiny.ROOT.rglob("*.py")
        if "tests" not in path.relative_to(tiny.ROOT).parts
        and not any(
            part.startswith(".") or part in ("runs", "venv")
            for part in path.relative_to(tiny.ROOT).parts
        )
    ]
    assert len(files) > 20
    assert {str(path): unsafe(path.read_text()) for path in files if unsafe(path.read_text())} == {}
    for bad in (
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f, allow_pickle=True)",
        "import pickle",
        "eval(text)",
        "from pickle import load",
        "exec(text)",
        "numpy.load(f)",
        "pickle.Unpickler(f)",
    ):
        assert unsafe(bad) or bad == "pickle.Unpickler(f)", bad
    assert unsafe("torch.load(f, weights_only=True)\nmodel.eval()") == []


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/x",
        "/etc/passwd",
        "..",
        ".",
        "a/../../b",
        "\x1b[2J",
        "x\0y",
        "",
        "~root",
        "a\nb",
        "-rf",
    ],
)
def test_a_folder_named_after_settings_stays_under_runs(name, tmp_path, monkeypatch):
    """Without --out, the name of the folder contains --task and --algorithm."""
    monkeypatch.chdir(tmp_path)
    folder = unused_folder(name)
    open_folder(PolicyConfig(), name, {})[1].close()
    assert folder.parent == Path("runs") and re.fullmatch(r"[A-Za-z0-9_.-]+", folder.name)
    assert not folder.name.startswith((".", "-r"))
    assert {path.split("/")[0] for path in contents(tmp_path)} == {"runs"}
    assert (tmp_path / folder / "config.json").exists()


def test_a_run_writes_only_into_its_own_folder(inputs, reward_run, tmp_path, monkeypatch):
    """Neither the working directory nor the inputs change."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    before = contents(inputs) | contents(reward_run)
    train_reward.main(reward_config(inputs, tmp_path / "deep" / "er" / "reward"))
    train_policy.main(policy_config(reward_run, tmp_path / "deep" / "er" / "policy"))
    assert {tuple(path.split("/")[:3]) for path in contents(tmp_path)} == {
        ("deep", "er", "reward"),
        ("deep", "er", "policy"),
    }
    assert contents(inputs) | contents(reward_run) == before


# ---- the harness ---------------------------------------------------------------------------------


def test_damaged_content_always_differs():
    """A damage that changed nothing would count as a passed case."""
    rng = random.Random(0)
    for content in (b"", b"a", b"hello\n" * 50):
        assert all(
            reliability.damaged(rng, content, b"hello\n" * 50) != content for _ in range(500)
        )


@pytest.mark.slow
@pytest.mark.parametrize("test", reliability.BRIEF)
def test_reliability_with_few_cases(test):
    """`python -m tests.reliability` runs more of them."""
    print(reliability.run_test(test, reliability.BRIEF[test]))
