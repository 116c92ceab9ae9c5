"""Several processes train the same model as one process: same seed, same batches, same weights."""

import contextlib
import copy
import dataclasses
import datetime
import gc
import importlib
import json
import signal
import subprocess
import time
import types
import weakref
from pathlib import Path
from typing import NamedTuple

import train_policy
from minirlhf.config import PolicyConfig
from minirlhf.model.transformer import Transformer
from minirlhf.rl import rollout, sampling
from minirlhf.run import device, parallel
from minirlhf.run.checkpoint import load_checkpoint
from minirlhf.run.errors import UserError

import pytest
import torch
from side_by_side import in_float64
from tiny import (
    ROOT,
    as_flags,
    environment,
    policy_config,
    python,
    random_model,
    refused,
    reward_config,
    rows,
    weights,
)

SIDE_BY_SIDE = ROOT / "tests" / "side_by_side.py"

# Three processes have 5, 5 and 6 of 16 responses; minibatches have 6, 6 and 4. Everything that has
# a state, or is a mean over the batch, is on.
POLICIES = dict(
    ppo=dict(algorithm="ppo", minibatch_size=6, micro_batch_size=2, ent_coef=0.01, kl_target=4.5),
    rloo=dict(algorithm="rloo", micro_batch_size=3, kl_target=1.5),
    grpo=dict(algorithm="grpo", minibatch_size=6, kl_target=1.2),
    sharded=dict(algorithm="ppo", minibatch_size=6, micro_batch_size=1, shard=True, kl_target=4.5),
    mixed=dict(iterations=3, minibatch_size=6, micro_batch_size=2, kl_target=4.5),
    sharded_mixed=dict(iterations=3, minibatch_size=6, shard=True, kl_target=4.5),
    ranking=dict(algorithm="rloo", reward="side_by_side:rank_in_batch", kl_target=1.5),
    online_dpo=dict(algorithm="online-dpo", micro_batch_size=3, kl_target=1.5),
    dpo=dict(algorithm="dpo", minibatch_size=4, micro_batch_size=1, iterations=3),
    sharded_dpo=dict(algorithm="dpo", minibatch_size=4, iterations=3, shard=True),
)
# 14 prompts make batches of 4, 4, 4 and 2: in the last one, one of three processes has no prompt.
# The same is true of 20 texts.
REWARDS = dict(
    reward=dict(micro_batch_size=1, centering=0.1),
    sharded_reward=dict(micro_batch_size=1, shard=True),
    auxiliary=dict(auxiliary_coef=1.0, epochs=1),
    mixed_reward=dict(micro_batch_size=1, epochs=1),
    sharded_mixed_reward=dict(micro_batch_size=1, epochs=1, shard=True),
)


def settings_of(name, inputs, reward_run, folder, **changes):
    """(script, settings) of one of the runs above, in folder/name.

    "mixed" in its name: with a model of this form (tiny.FORMS), whose LM head is untied.
    """
    is_mixed = "mixed" in name
    if name in POLICIES:
        common = dict(iterations=5, batch_size=16, kl_horizon=100, eval_every=2, temperature=0.9)
        source = reward_run.with_name("mixed") if is_mixed else reward_run
        config = policy_config(source, folder / name, **{**common, **POLICIES[name], **changes})
        return "train_policy", dataclasses.asdict(config)
    common = dict(epochs=2, save_every=3)
    if is_mixed:
        common |= dict(init=str(reward_run.with_name("mixed.pt")), sft_init=True)
    config = reward_config(inputs, folder / name, **{**common, **REWARDS[name], **changes})
    return "train_reward", dataclasses.asdict(config)


def torchrun(count, *arguments):
    """The command that starts several processes, on any free port."""
    return python(
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(count),
        *map(str, arguments),
    )


def run(command, **variables):
    """Run a command to its end. variables: more environment variables."""
    return subprocess.run(
        command,
        env=environment() | variables,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def alone(inputs, reward_run, mixed_run, tmp_path_factory):
    """Every run in this process alone, in float64."""
    folder = tmp_path_factory.mktemp("alone")
    for name in [*POLICIES, *REWARDS]:
        in_float64(*settings_of(name, inputs, reward_run, folder, shard=False))
    in_float64(
        *settings_of("sharded", inputs, reward_run, folder / "float32", shard=False, iterations=2),
        "float32",
    )
    return folder


@pytest.fixture(scope="module", params=[2, 3])
def together(request, inputs, reward_run, tmp_path_factory):
    """The same runs in two or three processes."""
    folder = tmp_path_factory.mktemp(f"together-{request.param}")
    runs = [settings_of(name, inputs, reward_run, folder) for name in [*POLICIES, *REWARDS]]
    runs.append(
        (*settings_of("sharded", inputs, reward_run, folder / "float32", iterations=2), "float32")
    )
    (folder / "runs.json").write_text(json.dumps(runs))
    command = torchrun(request.param, SIDE_BY_SIDE, folder / "runs.json")
    ended = run(command, CALLS=str(folder / "calls.txt"))
    assert ended.returncode == 0, ended.stderr
    return folder


def assert_close_weights(ours, theirs, kind, tolerance=1e-9):
    a, b = weights(ours, kind), weights(theirs, kind)
    assert a.keys() == b.keys() and {x.dtype for x in a.values()} == {torch.float64}
    differences = {name: float((a[name] - b[name]).abs().max()) for name in a}
    assert {name: value for name, value in differences.items() if value > tolerance} == {}


def assert_close_rows(ours, theirs):
    a, b = rows(ours), rows(theirs)
    assert [row.keys() for row in a] == [row.keys() for row in b]
    for mine, other in zip(a, b):
        for key, value in mine.items():
            expected = other[key]
            if isinstance(value, float):
                expected = pytest.approx(expected, rel=1e-6, abs=1e-9)
            assert value == expected, key


@pytest.mark.parametrize("name", POLICIES)
def test_several_processes_train_the_policy_of_one(name, alone, together):
    """Whitening, group baselines, KL controller, denominators, gradient and its norm use all rows.

    A mean over one process's rows would train another model, which can look as good (several
    well-known trainers have had this bug).
    """
    assert_close_weights(together / name / "policy.pt", alone / name / "policy.pt", "policy")
    assert_close_rows(
        together / name / "policy_metrics.jsonl", alone / name / "policy_metrics.jsonl"
    )
    assert (together / name / "samples.md").read_text() == (alone / name / "samples.md").read_text()
    if "kl_target" not in POLICIES[name]:
        return
    coefs = [row["kl_coef"] for row in rows(alone / name / "policy_metrics.jsonl")[1:]]
    changes = [abs(new / old - 1) for old, new in zip(coefs, coefs[1:])]
    assert min(changes) < 0.03  # clipping would give 3.2%: here the controller uses the measured KL


def test_a_reward_function_is_called_in_rank_0_with_all_responses(together):
    """A reward that depends on the whole batch, such as a rank within it, needs all responses.

    That the scores reach every process is tested above: the run "ranking" trains the same policy.
    """
    calls = [line.split() for line in (together / "calls.txt").read_text().splitlines()]
    assert {rank for rank, _ in calls} == {"0"}
    sizes = [int(size) for _, size in calls]
    assert sizes.count(16) == 5  # one call in each iteration
    assert set(sizes) == {16, 4}  # 4: the evaluations


def test_sharded_gradients_are_sums_in_float32_too(alone, together):
    """FSDP reduces float32 in another way than float64; gloo has only the sum."""
    a, b = (
        weights(folder / "float32" / "sharded" / "policy.pt", "policy")
        for folder in (alone, together)
    )
    assert max(float((a[key] - b[key]).abs().max()) for key in a) < 1e-4  # steps are of 1e-2


@pytest.mark.parametrize("name", REWARDS)
def test_several_processes_train_the_reward_model_of_one(name, alone, together):
    """Also if the last batch of an epoch leaves a process without a prompt."""
    for kind in ("base", "reward"):
        assert_close_weights(together / name / f"{kind}.pt", alone / name / f"{kind}.pt", kind)
    assert_close_rows(
        together / name / "reward_metrics.jsonl", alone / name / "reward_metrics.jsonl"
    )


def test_several_processes_write_the_files_of_one(alone, together):
    """The files are the same, and so are the tensors of the checkpoints, sharded or not."""
    for name in [*POLICIES, *REWARDS]:
        ours, theirs = (
            [path.relative_to(folder / name) for path in sorted((folder / name).rglob("*"))]
            for folder in (together, alone)
        )
        assert ours == theirs
        for path in (together / name / "checkpoints").iterdir():
            kind = path.name.partition("-")[0]
            mine, other = (
                load_checkpoint(folder / name / "checkpoints" / path.name, kind)[1]["optimizer"]
                for folder in (together, alone)
            )
            assert mine["param_groups"] == other["param_groups"]
            assert mine["state"].keys() == other["state"].keys()
            for number, moments in other["state"].items():
                for key, value in moments.items():
                    assert torch.allclose(mine["state"][number][key], value, rtol=1e-6, atol=1e-9)


# ---- rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("length", [1, 5, 8, 13])
@pytest.mark.parametrize("size", [0, 1, 2, 4])
def test_micro_batches_of_all_processes_hold_every_row_once(length, count, size, monkeypatch):
    """All processes also have the same number of micro-batches.

    Sharded passes wait for each other, so a process with one less would stop the run forever.
    """
    monkeypatch.setattr(parallel, "process_count", lambda: count)
    all_rows = []
    numbers = set()
    for rank in range(count):
        monkeypatch.setattr(parallel, "process_rank", lambda rank=rank: rank)
        batches = list(parallel.micro_batches(list(range(length)), size, torch.nn.Module()))
        assert sum(batches, []) == parallel.local_rows(list(range(length)))
        assert size < 2 or max(map(len, batches)) <= size
        assert length < count or all(batches)
        all_rows += sum(batches, [])
        numbers.add(len(batches))
    assert all_rows == list(range(length)) and len(numbers) == 1


def test_gathered_rows_are_padded_like_those_of_one_process(monkeypatch):
    """A prompt is padded on the left: otherwise there would be a gap before its response.

    The runs above do not test this, because their prompts have the same length.
    """

    class Rows(NamedTuple):
        texts: list[str]
        prompt_ids: torch.Tensor
        response_mask: torch.Tensor
        scores: torch.Tensor

    parts = [
        Rows(
            ["a"], torch.tensor([[1, 2]]), torch.ones(1, 1, dtype=torch.bool), torch.tensor([0.5])
        ),
        Rows(
            ["b", "c"],
            torch.tensor([[3], [4]]),
            torch.ones(2, 3, dtype=torch.bool),
            torch.tensor([1.5, 2.5]),
        ),
    ]
    monkeypatch.setattr(parallel, "process_count", lambda: 2)
    monkeypatch.setattr(
        parallel.dist,
        "all_gather_object",
        lambda result, mine: result.__setitem__(slice(None), parts),
    )
    gathered = parallel.all_gather_rows(parts[0])
    assert gathered.texts == ["a", "b", "c"] and gathered.scores.tolist() == [0.5, 1.5, 2.5]
    assert gathered.prompt_ids.tolist() == [[1, 2], [0, 3], [0, 4]]
    assert gathered.response_mask.tolist() == [[True, False, False], [True] * 3, [True] * 3]


def test_replicas_exchange_gradients_in_the_last_pass_only(monkeypatch):
    monkeypatch.setattr(parallel, "Replica", FakeReplica)
    learner = FakeReplica()
    exchanges = [not learner.is_alone for _ in parallel.micro_batches(range(6), 2, learner)]
    assert exchanges == [False, False, True]


class FakeReplica:
    is_alone = False

    @contextlib.contextmanager
    def no_sync(self):
        self.is_alone = True
        yield
        self.is_alone = False


def test_sharded_gradients_are_summed_and_not_averaged(monkeypatch):
    """The losses divide by the whole batch. Each block is sharded, and then the rest."""
    calls = []

    def fully_shard(part, mesh):
        calls.append((part, mesh))
        return types.SimpleNamespace(
            set_gradient_divide_factor=lambda factor: calls.append(("divide", factor)),
            set_force_sum_reduction_for_comms=lambda on: calls.append(("sum", on)),
        )

    fsdp = importlib.import_module("torch.distributed.fsdp")
    monkeypatch.setattr(fsdp, "fully_shard", fully_shard)
    monkeypatch.setattr(parallel.dist, "init_device_mesh", lambda device, sizes: (device, sizes))
    model = random_model()
    parallel.shard(model, torch.device("cpu"))
    parts = [*model.blocks, model]
    settings = [("divide", 1.0), ("sum", True)]
    assert calls == [call for part in parts for call in [(part, ("cpu", (1,))), *settings]]


def test_an_unsharded_copy_has_all_weights(monkeypatch):
    """FSDP2 gives a sharded model a class that is derived from its own."""
    model = random_model()
    assert parallel.unsharded(model) is model
    model.__class__ = type("Sharded", (Mixin, Transformer), {})
    model.bf16 = True
    monkeypatch.setattr(parallel, "is_sharded", lambda x: True)
    monkeypatch.setattr(parallel, "full_tensor", torch.clone)
    plain = parallel.unsharded(model)
    assert type(plain) is Transformer and plain.bf16
    for name, value in model.state_dict().items():
        assert torch.equal(plain.state_dict()[name], value)


class Mixin:
    pass


def test_a_full_tensor_is_split_like_the_sharded_one(monkeypatch):
    """Without src_data_rank=None the first process would send its copy to all others."""
    calls = []
    monkeypatch.setattr(parallel, "is_sharded", lambda tensor: tensor is like)
    tensors = importlib.import_module("torch.distributed.tensor")
    monkeypatch.setattr(tensors, "distribute_tensor", lambda *a, **k: calls.append((a, k)))
    like = types.SimpleNamespace(
        device="cpu", device_mesh="mesh", placements="placements", shape=torch.Size([3])
    )
    value = torch.ones(3)
    parallel.split_like(value, like)
    assert calls == [((value, "mesh", "placements"), dict(src_data_rank=None))]
    other = torch.zeros(3)
    assert parallel.split_like(value, other) is value


@pytest.mark.parametrize("cuda, backend", [(False, "gloo"), (True, "cpu:gloo,cuda:nccl")])
def test_a_process_joins_the_others(cuda, backend, monkeypatch):
    """It waits an hour for the evaluation in the main process; torch's default is ten minutes."""
    joined = []
    devices = []
    monkeypatch.setattr(parallel, "STORE", [])
    monkeypatch.setattr(parallel.dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(parallel.dist, "rendezvous", lambda url: iter([("store", 0, 4)]))
    monkeypatch.setattr(parallel.dist, "init_process_group", lambda *a, **k: joined.append((a, k)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    parallel.init_processes()
    an_hour = datetime.timedelta(seconds=3600)
    assert joined == [((backend,), dict(store="store", rank=0, world_size=4, timeout=an_hour))]
    assert parallel.STORE == ["store"]
    assert devices == ([1] if cuda else [])  # more processes than GPUs share them


def test_one_of_several_processes_ends_without_a_shutdown(monkeypatch):
    """Its output is written and its status kept."""
    done = []
    stream = types.SimpleNamespace(flush=lambda: done.append("flush"))
    monkeypatch.setattr(parallel, "STORE", ["store"])
    monkeypatch.setattr(parallel.atexit, "_run_exitfuncs", lambda: done.append("atexit"))
    monkeypatch.setattr(parallel.sys, "stdout", stream)
    monkeypatch.setattr(parallel.sys, "stderr", stream)
    monkeypatch.setattr(parallel.os, "_exit", done.append)
    with pytest.raises(SystemExit):
        parallel.exit_process(3)
    monkeypatch.undo()
    assert done == ["atexit", "flush", "flush", 3]


@pytest.mark.parametrize("main_process", [True, False])
def test_only_the_main_process_keeps_full_states(main_process, monkeypatch):
    """Every process takes part in the exchange of each sharded tensor, at any depth."""
    shards = {name: torch.tensor([float(name)]) for name in "123"}
    exchanged = []

    def full_tensor(value):
        if value is shards["3"]:
            return value  # not sharded
        exchanged.append(value)
        return torch.cat([value, value])

    monkeypatch.setattr(parallel, "full_tensor", full_tensor)
    monkeypatch.setattr(parallel, "is_main", lambda: main_process)
    states = parallel.full_states({"a": {"b": shards["1"]}, "c": shards["2"], "d": shards["3"]})
    assert len(exchanged) == 2
    assert states["d"] is shards["3"]
    if main_process:
        assert states["a"]["b"].tolist() == [1.0, 1.0] and states["c"].tolist() == [2.0, 2.0]
    else:
        assert states["a"]["b"] is None and states["c"] is None


def test_a_signal_to_one_process_stops_all(monkeypatch):
    """Every process gets the largest signal number; 0 means no signal."""
    monkeypatch.setattr(parallel, "process_count", lambda: 2)
    operations = {
        parallel.dist.ReduceOp.MAX: max,
        parallel.dist.ReduceOp.MIN: min,
        parallel.dist.ReduceOp.SUM: lambda a, b: a + b,
    }
    for mine, other in ((0, 2), (2, 0), (15, 2), (0, 0)):

        def all_reduce(box, kind=parallel.dist.ReduceOp.SUM, other=other):
            box.fill_(operations[kind](int(box), other))

        monkeypatch.setattr(parallel.dist, "all_reduce", all_reduce)
        assert parallel.all_reduce_max(mine) == max(mine, other)


def test_more_processes_than_rows_are_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(device, "process_count", lambda: 3)
    cpu = torch.device("cpu")
    device.check_processes(PolicyConfig(), cpu, 3, "the smallest minibatch")
    message = "3 processes cannot share 2 rows, the smallest minibatch; start at most 2"
    with pytest.raises(UserError, match=message):
        device.check_processes(PolicyConfig(), cpu, 2, "the smallest minibatch")


def test_sharding_with_one_process_is_refused_in_one_line(reward_run, tmp_path, capsys):
    flags = as_flags(policy_config(reward_run, tmp_path / "run", shard=True))
    line = refused(capsys, train_policy.main, PolicyConfig, flags)
    assert "--shard" in line and "torchrun" in line and "--no-shard" in line


def test_unsharded_copies_of_the_policy_are_freed_after_use(reward_run, tmp_path, monkeypatch):
    """A copy kept in every process would take more memory than sharding the weights saves."""
    copies = weakref.WeakSet()
    alive = []

    def unsharded_copy(model):
        copies.add(copied := copy.deepcopy(model))
        return copied

    def update(*arguments, real=train_policy.update):
        gc.collect()
        alive.append(len(copies))
        return real(*arguments)

    for module in (train_policy, sampling, rollout):
        monkeypatch.setattr(module, "unsharded", unsharded_copy)
    monkeypatch.setattr(train_policy, "update", update)
    train_policy.main(policy_config(reward_run, tmp_path / "run", iterations=3, eval_every=1))
    assert alive == [0, 0, 0]


# ---- runs that end early -------------------------------------------------------------------------


def own_lines(stderr):
    """The errors and warnings of the processes, without torchrun's report of their exit."""
    return [line for line in stderr.splitlines() if line.startswith(("error:", "warning:"))]


def test_a_stopped_run_resumes_with_another_number_of_processes(
    inputs, reward_run, tmp_path, capsys
):
    """Ctrl-C reaches the processes at different times; all must save and end after the same step.

    Otherwise the others would wait forever. Here two sharded processes start the run and one
    process finishes it. Its weights are those of a run that was never stopped.
    """
    changes = dict(iterations=25, save_every=100)
    settings = settings_of("sharded", inputs, reward_run, tmp_path, **changes)
    (tmp_path / "runs.json").write_text(json.dumps([settings]))
    process = subprocess.Popen(
        torchrun(2, SIDE_BY_SIDE, tmp_path / "runs.json"),
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "sharded" / "policy_metrics.jsonl"
    deadline = time.monotonic() + 240
    while (
        not metrics.exists() or metrics.read_bytes().count(b"\n") < 3
    ) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    folder = tmp_path / "sharded"
    # the command names the script that was started, which may define the algorithm
    launcher = "torchrun --standalone --nproc-per-node 2"
    command = f"{launcher} {SIDE_BY_SIDE} --out {folder} --resume --task tiny"
    assert process.returncode != 0
    assert own_lines(errors) == [f"error: stopped; resume with: {command}"], errors
    assert errors.count("stopping after this step") == 1 and "Warning" not in errors
    done = len(rows(metrics)) - 1
    checkpoints = [path.name for path in (folder / "checkpoints").iterdir()]
    assert 2 <= done < 25 and checkpoints == [f"policy-{done:08d}.pt"]
    in_float64(
        *settings_of("sharded", inputs, reward_run, tmp_path, **changes, resume=True, shard=False)
    )
    in_float64(
        *settings_of("sharded", inputs, reward_run, tmp_path / "other", **changes, shard=False)
    )
    assert f"resuming after step {done}" in capsys.readouterr().out
    uninterrupted = tmp_path / "other" / "sharded"
    assert_close_weights(folder / "policy.pt", uninterrupted / "policy.pt", "policy")
    assert_close_rows(metrics, uninterrupted / "policy_metrics.jsonl")


@pytest.mark.slow
def test_a_run_of_one_process_resumes_sharded_over_three(inputs, reward_run, tmp_path):
    changes = dict(iterations=5, save_every=2)
    in_float64(*settings_of("ppo", inputs, reward_run, tmp_path, **changes))
    for path in [
        tmp_path / "ppo" / "policy.pt",
        tmp_path / "ppo" / "checkpoints" / "policy-00000005.pt",
    ]:
        path.rename(tmp_path / path.name)
    resumed = settings_of("ppo", inputs, reward_run, tmp_path, **changes, resume=True, shard=True)
    (tmp_path / "runs.json").write_text(json.dumps([resumed]))
    ended = run(torchrun(3, SIDE_BY_SIDE, tmp_path / "runs.json"))
    assert ended.returncode == 0 and "resuming after step 4" in ended.stdout, ended.stderr
    assert_close_weights(tmp_path / "ppo" / "policy.pt", tmp_path / "policy.pt", "policy")


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(reward="side_by_side:fails_in_training"),
            "error: policy step 1: the reward function fails_in_training raised ValueError: "
            "no idea (side_by_side.py:",
        ),
        (dict(algorithm="fails-in-rank-1"), "raised UserError: no idea (side_by_side.py:"),
        pytest.param(
            dict(algorithm="fails-in-all"),
            "raised UserError: no idea (side_by_side.py:",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            dict(algorithm="rank-1-is-killed"),
            "error: another process of this run ended",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_process_that_fails_ends_all_with_one_line(changes, message, reward_run, tmp_path):
    """The other process waits for its result, and the timeout is an hour.

    The reward function fails in rank 0, the algorithms in rank 1 or in both.
    """
    config = policy_config(reward_run, tmp_path / "run", **changes)
    start = time.monotonic()
    ended = run(torchrun(2, SIDE_BY_SIDE, *as_flags(config)))
    # on one busy core, starting the processes takes most of this time
    assert time.monotonic() - start < 120 and ended.returncode != 0
    (line,) = own_lines(ended.stderr)
    assert message in line, ended.stderr
    assert "Warning" not in ended.stderr
    assert 'train_policy.py", line' not in ended.stderr  # no traceback except torchrun's own
    if "no idea" in message:
        path = line.partition("the batch is in ")[2].partition(";")[0]
        assert path and Path(path).exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, flags, message",
    [
        (
            "train_policy.py",
            ["--batch-size", "4", "--minibatch-size", "3"],
            "error: 2 processes cannot share 1 rows",
        ),
        (
            "train_policy.py",
            ["--batch-sise", "4"],
            "error: unknown argument --batch-sise; did you mean --batch-size?",
        ),
        ("train_reward.py", ["--batch-size", "1"], "error: 2 processes cannot share 1 rows"),
    ],
)
def test_an_error_of_all_processes_is_printed_once(script, flags, message):
    ended = run(torchrun(2, ROOT / script, *flags))
    assert ended.returncode != 0 and len(own_lines(ended.stderr)) == 1, ended.stderr
    assert own_lines(ended.stderr)[0].startswith(message)


def distance(a, b):
    """The Euclidean distance of two models' weights."""
    return sum(float((a[name] - b[name]).norm() ** 2) for name in a) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [dict(bf16=True, shard=True), dict(compile=True), dict(compile=True, shard=True)]
)
def test_bf16_and_compile_work_with_several_processes(flags, reward_run, tmp_path):
    """In bfloat16 the weights differ a little from those of one process, compiled hardly."""
    config = policy_config(reward_run, tmp_path / "alone", **flags)
    train_policy.main(dataclasses.replace(config, shard=False))
    config = policy_config(reward_run, tmp_path / "together", **flags)
    ended = run(torchrun(2, ROOT / "train_policy.py", *as_flags(config)))
    assert ended.returncode == 0, ended.stderr
    start = weights(reward_run / "base.pt", "base")
    alone = weights(tmp_path / "alone" / "policy.pt", "policy")
    together = weights(tmp_path / "together" / "policy.pt", "policy")
    difference = distance(alone, together)
    change = distance(alone, start)
    assert difference < (0.2 if "bf16" in flags else 1e-3) * change, (difference, change)
