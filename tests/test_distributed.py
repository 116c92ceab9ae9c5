"""Several processes train the model that one would have trained: same seed, same batches, same weights."""

import copy
import dataclasses
import gc
import json
import signal
import subprocess
import time
import weakref
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from side_by_side import in_float64
from tiny import ROOT, as_flags, environment, policy_config, python, refused, reward_config, rows, weights

import train_policy
from minirlhf import parallel
from minirlhf import run as run_module
from minirlhf.checkpoint import load_checkpoint
from minirlhf.config import PolicyConfig, UserError

# 16 responses over 3 processes are 5, 5 and 6; minibatches of 6, 6 and 4; and what has a state or a global mean is there.
POLICIES = dict(
    ppo=dict(algorithm="ppo", minibatch_size=6, micro_batch_size=2, ent_coef=0.01, kl_target=4.5),
    rloo=dict(algorithm="rloo", micro_batch_size=3, kl_target=1.5),
    grpo=dict(algorithm="grpo", minibatch_size=6, kl_target=1.2),
    sharded=dict(algorithm="ppo", minibatch_size=6, micro_batch_size=1, shard=True, kl_target=4.5),
)
# 14 prompts in batches of 4, 4, 4 and 2: of three processes one has no prompt in the last. 20 texts over 3 likewise.
REWARDS = dict(reward=dict(micro_batch_size=1, centering=0.1), sharded_reward=dict(micro_batch_size=1, shard=True),
               no_verdicts=dict(verdict_coef=0.0, epochs=1))


def settings_of(name, inputs, reward_run, folder, **changes):
    """(script, settings) of one of the runs above, in folder/name."""
    if name in POLICIES:
        common = dict(iterations=5, batch_size=16, kl_horizon=100, eval_every=2, temperature=0.9)
        config = policy_config(reward_run, folder / name, **{**common, **POLICIES[name], **changes})
    else:
        config = reward_config(inputs, folder / name, **{**dict(epochs=2, save_every=3), **REWARDS[name], **changes})
    return "train_policy" if name in POLICIES else "train_reward", dataclasses.asdict(config)


def torchrun(count, *arguments):
    """The command, on any free port. Its agent looks after the workers ten times a second."""
    return python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), *map(str, arguments))


def run(command, **options):
    return subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300, **options)


@pytest.fixture(scope="module")
def alone(inputs, reward_run, tmp_path_factory):
    """Every run in this one process, in float64."""
    folder = tmp_path_factory.mktemp("alone")
    for name in [*POLICIES, *REWARDS]:
        in_float64(*settings_of(name, inputs, reward_run, folder, shard=False))
    in_float64(*settings_of("sharded", inputs, reward_run, folder / "float32", shard=False, iterations=2), "float32")
    return folder


@pytest.fixture(scope="module", params=[2, 3])
def together(request, inputs, reward_run, tmp_path_factory):
    """The same runs by two or three processes."""
    folder = tmp_path_factory.mktemp(f"together-{request.param}")
    runs = [settings_of(name, inputs, reward_run, folder) for name in [*POLICIES, *REWARDS]]
    runs.append((*settings_of("sharded", inputs, reward_run, folder / "float32", iterations=2), "float32"))
    (folder / "runs.json").write_text(json.dumps(runs))
    ended = run(torchrun(request.param, ROOT / "tests" / "side_by_side.py", folder / "runs.json"))
    assert ended.returncode == 0, ended.stderr
    return folder


def assert_close_weights(ours, theirs, kind, tolerance=1e-9):
    a, b = weights(ours, kind), weights(theirs, kind)
    assert a.keys() == b.keys() and {x.dtype for x in a.values()} == {torch.float64}
    assert {name: float((a[name] - b[name]).abs().max()) for name in a if (a[name] - b[name]).abs().max() > tolerance} == {}


def assert_close_rows(ours, theirs):
    a, b = rows(ours), rows(theirs)
    assert [row.keys() for row in a] == [row.keys() for row in b]
    for mine, other in zip(a, b):
        for key, value in mine.items():
            assert value == (pytest.approx(other[key], rel=1e-6, abs=1e-9) if isinstance(value, float) else other[key]), key


@pytest.mark.parametrize("name", POLICIES)
def test_the_policy_is_the_one_that_a_single_process_trains(name, alone, together):
    """Whitening, sibling baselines, the KL controller, denominators, the gradient and its norm are of the whole batch. A
    local mean of any of them trains another model, which looks as good (several well-known trainers have done so)."""
    assert_close_weights(together / name / "policy.pt", alone / name / "policy.pt", "policy")
    assert_close_rows(together / name / "policy_metrics.jsonl", alone / name / "policy_metrics.jsonl")
    coefs = [row["kl_coef"] for row in rows(alone / name / "policy_metrics.jsonl")[1:]]
    assert any(abs(new / old - 1) < 0.03 for old, new in zip(coefs, coefs[1:]))  # not clipped (3.2%): it follows the measured KL
    assert (together / name / "samples.md").read_text() == (alone / name / "samples.md").read_text()


def test_sharded_gradients_are_sums_in_float32_too(alone, together):
    """FSDP reduces float32 in another way than float64, and one that gloo does not know unless it is told to sum."""
    a, b = (weights(folder / "float32" / "sharded" / "policy.pt", "policy") for folder in (alone, together))
    assert max(float((a[key] - b[key]).abs().max()) for key in a) < 1e-4  # steps are of 1e-2


@pytest.mark.parametrize("name", REWARDS)
def test_the_reward_model_is_the_one_that_a_single_process_trains(name, alone, together):
    """Also where the last batch of an epoch leaves a process without a prompt."""
    for kind in ("base", "reward"):
        assert_close_weights(together / name / f"{kind}.pt", alone / name / f"{kind}.pt", kind)
    assert_close_rows(together / name / "reward_metrics.jsonl", alone / name / "reward_metrics.jsonl")


def test_a_run_of_several_processes_leaves_the_files_of_one(alone, together):
    """One writer: the same files, and in the checkpoints the same tensors, sharded or not."""
    for name in [*POLICIES, *REWARDS]:
        ours, theirs = ([path.relative_to(folder / name) for path in sorted((folder / name).rglob("*"))]
                        for folder in (together, alone))
        assert ours == theirs
        for path in (together / name / "checkpoints").iterdir():
            kind = path.name.partition("-")[0]
            mine, other = (load_checkpoint(folder / name / "checkpoints" / path.name, kind)[1]["optimizer"]
                           for folder in (together, alone))
            assert mine["param_groups"] == other["param_groups"] and mine["state"].keys() == other["state"].keys()
            for number, kept in other["state"].items():
                for key, value in kept.items():
                    assert torch.allclose(mine["state"][number][key], value, rtol=1e-6, atol=1e-9)


# ---- shares ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("length", [1, 5, 8, 13])
@pytest.mark.parametrize("size", [0, 1, 2, 4])
def test_shares_and_micro_batches_hold_every_row_once_and_are_as_many_everywhere(length, count, size, monkeypatch):
    """Sharded passes wait for each other: a process with one micro-batch less than the others hangs the run."""
    monkeypatch.setattr(parallel, "processes", lambda: count)
    seen, numbers = [], set()
    for rank in range(count):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        pieces = list(parallel.micro_batches(list(range(length)), size, torch.nn.Module()))
        assert sum(pieces, []) == parallel.share(list(range(length)))
        assert size < 2 or max(map(len, pieces)) <= size
        seen, numbers = seen + sum(pieces, []), numbers | {len(pieces)}
        assert length < count or all(pieces)
    assert seen == list(range(length)) and len(numbers) == 1


def test_gathered_rows_end_and_begin_in_the_columns_of_those_of_one_process(monkeypatch):
    """The runs above have prompts of one length. A prompt filled up on the right has a gap before its response."""
    class Rows(NamedTuple):
        texts: list[str]
        prompt_ids: torch.Tensor
        response_mask: torch.Tensor
        scores: torch.Tensor

    parts = [Rows(["a"], torch.tensor([[1, 2]]), torch.ones(1, 1, dtype=torch.bool), torch.tensor([0.5])),
             Rows(["b", "c"], torch.tensor([[3], [4]]), torch.ones(2, 3, dtype=torch.bool), torch.tensor([1.5, 2.5]))]
    monkeypatch.setattr(parallel, "processes", lambda: 2)
    monkeypatch.setattr(parallel.dist, "all_gather_object", lambda found, mine: found.__setitem__(slice(None), parts))
    found = parallel.gathered(parts[0])
    assert found.texts == ["a", "b", "c"] and found.scores.tolist() == [0.5, 1.5, 2.5]
    assert found.prompt_ids.tolist() == [[1, 2], [0, 3], [0, 4]]
    assert found.response_mask.tolist() == [[True, False, False], [True] * 3, [True] * 3]


def test_a_signal_that_reached_one_process_alone_stops_all(monkeypatch):
    """Each must hear of the largest number brought, 0 being no signal."""
    monkeypatch.setattr(parallel, "processes", lambda: 2)
    kinds = {parallel.dist.ReduceOp.MAX: max, parallel.dist.ReduceOp.MIN: min, parallel.dist.ReduceOp.SUM: lambda a, b: a + b}
    for mine, other in ((0, 2), (2, 0), (15, 2), (0, 0)):
        def all_reduce(box, kind=parallel.dist.ReduceOp.SUM, other=other):
            box.fill_(kinds[kind](int(box), other))

        monkeypatch.setattr(parallel.dist, "all_reduce", all_reduce)
        assert parallel.agreed(mine) == max(mine, other)


def test_more_processes_than_rows_are_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(run_module, "processes", lambda: 3)
    run_module.check_processes(PolicyConfig(), torch.device("cpu"), 3, "the smallest minibatch")
    with pytest.raises(UserError, match=r"3 processes cannot share 2 rows, the smallest minibatch; start 2 at most"):
        run_module.check_processes(PolicyConfig(), torch.device("cpu"), 2, "the smallest minibatch")


def test_sharding_alone_is_refused_in_one_line(reward_run, tmp_path, capsys):
    line = refused(capsys, train_policy.main, PolicyConfig, as_flags(policy_config(reward_run, tmp_path / "run", shard=True)))
    assert "--shard" in line and "torchrun" in line and "--no-shard" in line


def test_no_gathered_copy_of_the_policy_outlives_its_use(reward_run, tmp_path, monkeypatch):
    """One kept since the last evaluation takes, in every process, more than sharding the weights has saved."""
    copies, alive = weakref.WeakSet(), []

    def gathered_copy(model):
        copies.add(copied := copy.deepcopy(model))
        return copied

    def update(*arguments, really=train_policy.update):
        gc.collect()
        alive.append(len(copies))
        return really(*arguments)

    monkeypatch.setattr(train_policy, "whole", gathered_copy)
    monkeypatch.setattr(train_policy, "update", update)
    train_policy.main(policy_config(reward_run, tmp_path / "run", iterations=3, eval_every=1))
    assert alive == [0, 0, 0]


# ---- runs that end early ---------------------------------------------------------------------------------------------


def own_words(stderr):
    """What the processes said, without the agent's report of who ended first."""
    return [line for line in stderr.splitlines() if line.startswith(("error:", "warning:"))]


def test_a_stopped_run_goes_on_with_another_number_of_processes(inputs, reward_run, tmp_path, capsys):
    """Ctrl-C reaches the processes at different instants; all must save and leave after the same step, or the others wait for
    ever. Two sharded processes begin here, and one that is not finishes, to the weights of a run that nobody stopped."""
    changes = dict(iterations=25, save_every=100)
    begun = settings_of("sharded", inputs, reward_run, tmp_path, **changes)
    (tmp_path / "runs.json").write_text(json.dumps([begun]))
    script = ROOT / "tests" / "side_by_side.py"  # as a script of the user's own, which may have brought the algorithm
    process = subprocess.Popen(torchrun(2, script, tmp_path / "runs.json"), env=environment(), cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "sharded" / "policy_metrics.jsonl"
    deadline = time.monotonic() + 240
    while (not metrics.exists() or metrics.read_bytes().count(b"\n") < 3) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    folder = tmp_path / "sharded"
    assert process.returncode != 0 and own_words(errors) == [
        f"error: stopped; go on with: torchrun --standalone --nproc-per-node 2 {script} --out {folder} --resume"], errors
    assert errors.count("stopping after this step") == 1 and "Warning" not in errors
    done = len(rows(metrics)) - 1
    assert 2 <= done < 25 and [path.name for path in (folder / "checkpoints").iterdir()] == [f"policy-{done:08d}.pt"]
    in_float64(*settings_of("sharded", inputs, reward_run, tmp_path, **changes, resume=True, shard=False))
    in_float64(*settings_of("sharded", inputs, reward_run, tmp_path / "whole", **changes, shard=False))
    assert f"going on after step {done}" in capsys.readouterr().out
    assert_close_weights(folder / "policy.pt", tmp_path / "whole" / "sharded" / "policy.pt", "policy")
    assert_close_rows(metrics, tmp_path / "whole" / "sharded" / "policy_metrics.jsonl")


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_sharded_over_three(inputs, reward_run, tmp_path):
    changes = dict(iterations=5, save_every=2)
    in_float64(*settings_of("ppo", inputs, reward_run, tmp_path, **changes))
    for path in [tmp_path / "ppo" / "policy.pt", tmp_path / "ppo" / "checkpoints" / "policy-00000005.pt"]:
        path.rename(tmp_path / path.name)
    resumed = settings_of("ppo", inputs, reward_run, tmp_path, **changes, resume=True, shard=True)
    (tmp_path / "runs.json").write_text(json.dumps([resumed]))
    ended = run(torchrun(3, ROOT / "tests" / "side_by_side.py", tmp_path / "runs.json"))
    assert ended.returncode == 0 and "going on after step 4" in ended.stdout, ended.stderr
    assert_close_weights(tmp_path / "ppo" / "policy.pt", tmp_path / "policy.pt", "policy")


@pytest.mark.parametrize("reward, said", [
    ("fails_in_one", "error: policy step 1: the reward function fails_in_one raised ValueError: no idea; study "),
    pytest.param("fails_in_all", "the reward function fails_in_all raised ValueError: no idea", marks=pytest.mark.slow),
    pytest.param("kills_one", "error: another process of this run was lost", marks=pytest.mark.slow),
])
def test_one_process_that_ends_ends_all_with_one_line(reward, said, reward_run, tmp_path):
    """The others wait for it in the middle of a sum. Left alone they wait for the time-out, which is an hour."""
    config = policy_config(reward_run, tmp_path / "run", reward=f"side_by_side:{reward}")
    start = time.monotonic()
    ended = run(torchrun(2, ROOT / "train_policy.py", *as_flags(config)))
    assert time.monotonic() - start < 120 and ended.returncode != 0  # on one busy core, where starting takes most of it
    assert len(own_words(ended.stderr)) == 1 and said in own_words(ended.stderr)[0], ended.stderr
    assert "Warning" not in ended.stderr
    assert 'train_policy.py", line' not in ended.stderr  # no traceback but the agent's own
    if "study" in said:
        assert Path(own_words(ended.stderr)[0].partition("study ")[2].partition(";")[0]).exists()


@pytest.mark.slow
@pytest.mark.parametrize("script, flags, said", [
    ("train_policy.py", ["--batch-size", "4", "--minibatch-size", "3"], "error: 2 processes cannot share 1 rows"),
    ("train_policy.py", ["--batch-sise", "4"], "error: unknown argument --batch-sise; did you mean --batch-size?"),
    ("train_reward.py", ["--batch-size", "1"], "error: 2 processes cannot share 1 rows"),
])
def test_what_all_processes_refuse_is_said_once(script, flags, said):
    ended = run(torchrun(2, ROOT / script, *flags))
    assert ended.returncode != 0 and len(own_words(ended.stderr)) == 1, ended.stderr
    assert own_words(ended.stderr)[0].startswith(said)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [dict(bf16=True, shard=True), dict(compile=True), dict(compile=True, shard=True)])
def test_precision_and_compilation_go_with_several_processes(flags, reward_run, tmp_path):
    """Rounded to bfloat16 the shares differ a little; compiled, hardly."""
    alone, together = (policy_config(reward_run, tmp_path / name, **flags) for name in ("alone", "together"))
    train_policy.main(dataclasses.replace(alone, shard=False))
    ended = run(torchrun(2, ROOT / "train_policy.py", *as_flags(together)))
    assert ended.returncode == 0, ended.stderr
    start = weights(reward_run / "base.pt", "base")
    a, b = ({key: value - start[key] for key, value in weights(tmp_path / name / "policy.pt", "policy").items()}
            for name in ("alone", "together"))  # how far each has moved
    apart, moved = (sum(float((a[key] - other[key]).norm() ** 2) for key in a) ** 0.5 for other in (b, {key: 0.0 for key in a}))
    assert apart < (0.2 if "bf16" in flags else 1e-3) * moved, (apart, moved)
