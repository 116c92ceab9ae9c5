"""Every setting is checked before any work, and every setting does something."""

import base64
import contextlib
import dataclasses
import io
import json
import os
import platform
import subprocess
import sys
import types
import typing
from pathlib import Path

import pytest
import torch
from tiny import contents, policy_config, refused, reward_config, rows, write_inputs

import train_policy
import train_reward
from minirlhf.config import PolicyConfig, RewardConfig, UserError, run_script
from minirlhf.flags import flag, given_flags, read_config, sealed
from minirlhf.ladder import pick_rung
from minirlhf.model import Transformer

SCRIPTS = {RewardConfig: train_reward.main, PolicyConfig: train_policy.main}
FIELDS = [(config_class, field) for config_class in SCRIPTS for field in dataclasses.fields(config_class)]
EACH_FIELD = pytest.mark.parametrize("config_class, field", FIELDS, ids=lambda x: getattr(x, "name", None) or x.__name__)


# ---- wrong settings --------------------------------------------------------------------------------------------------


def wrong_values(config_class, field):
    """Values that this field must refuse: other types, and what lies past its bounds."""
    wanted, meta = typing.get_type_hints(config_class)[field.name], field.metadata
    yield from {str: (3, None), int: ("3", 1.5, True, None), float: ("1", True, float("nan"), float("inf"), None),
                bool: (1, "yes", None)}.get(wanted, ("one.jsonl", (1,), None))
    if meta["low"] is not None:
        yield meta["low"] - 1
    if meta["high"] is not None:
        yield meta["high"] + 1
    if meta["choices"]:
        yield meta["choices"][0] + "x"


@EACH_FIELD
def test_a_wrong_value_is_refused_by_the_name_of_its_flag(config_class, field):
    """A learning rate that is a string fails an hour later, where the optimiser first uses it."""
    config_class().check()
    for value in wrong_values(config_class, field):
        with pytest.raises(UserError, match=flag(field.name)) as error:
            dataclasses.replace(config_class(), **{field.name: value}).check()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("config_class", SCRIPTS)
def test_a_wrong_setting_fails_before_any_work(config_class, tmp_path, monkeypatch):
    """main itself checks, not only the command line; nothing is read, nothing is made."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--seed"):
        SCRIPTS[config_class](config_class(seed=-1, out="run"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("config, problem", [
    (RewardConfig(d_model=100, n_head=3), "--n-head 3 does not divide --d-model 100"),
    (PolicyConfig(kl_coef=0.0, kl_target=6.0), "--kl-target adapts --kl-coef by factors, and 0 stays 0"),
    (RewardConfig(init="base.pt", init_reward="reward.pt"), "--init-reward brings the base.pt beside it; leave out --init"),
])
def test_settings_that_contradict_each_other_are_refused(config, problem):
    """A view of the wrong shape deep inside says nothing of the two flags that made it."""
    with pytest.raises(UserError, match=problem):
        config.check()


@pytest.mark.parametrize("config, problem", [
    (PolicyConfig(algorithm="rloo", batch_size=30), "--batch-size 30 is not a multiple of --group-size 4"),
    (PolicyConfig(algorithm="grpo", batch_size=30), "--batch-size 30 is not a multiple of --group-size 4"),
    (PolicyConfig(algorithm="pop"), "--algorithm 'pop' is not known; did you mean ppo?"),
])
def test_a_rung_that_cannot_run_is_refused_before_any_work(config, problem, tmp_path, monkeypatch):
    """The ladder is open to rungs of the user's own, so that not the settings but main asks it for the name."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=problem):
        train_policy.main(dataclasses.replace(config, out="run"))
    assert list(tmp_path.iterdir()) == []


def test_the_group_size_matters_only_where_there_are_groups():
    """ppo must not be refused for a group size that it does not use."""
    pick_rung(PolicyConfig(algorithm="ppo", batch_size=30))


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config_class, arguments, words", [
    (RewardConfig, ["--warmup-sequence", "8"], "unknown argument --warmup-sequence; did you mean --warmup-sequences?"),
    (PolicyConfig, ["--algoritm", "ppo"], "unknown argument --algoritm; did you mean --algorithm?"),
    (PolicyConfig, ["--kl-cof=0.1"], "unknown argument --kl-cof=0.1; did you mean --kl-coef?"),
    (RewardConfig, ["--preset", "debgu"], "--preset: invalid choice: 'debgu' (choose from"),
    (PolicyConfig, ["--no-seed"], "unknown argument --no-seed"),
    (PolicyConfig, ["--iter", "3"], "unknown argument --iter"),  # no abbreviations: a new flag would change their meaning
    (PolicyConfig, ["ppo"], "unknown argument ppo"),
    (PolicyConfig, ["--seed", "one"], "--seed: invalid int value: 'one'"),
    (PolicyConfig, ["--seed", "1.5"], "--seed: invalid int value: '1.5'"),
    (PolicyConfig, ["--lr", "nan"], "--lr must be a finite number"),
    (PolicyConfig, ["--lr", "-1"], "--lr -1.0 is below 0"),
    (PolicyConfig, ["--gamma", "1.5"], "--gamma 1.5 is above 1"),
    (PolicyConfig, ["--seed"], "--seed: expected one argument"),
    (PolicyConfig, ["--device", "gpu"], "--device 'gpu' is not known"),
    (RewardConfig, ["--n-layer", "0"], "--n-layer 0 is below 1"),
    (RewardConfig, ["--data"], "--data: expected at least one argument"),
    (RewardConfig, ["--resume"], "--resume needs --out"),
    (PolicyConfig, ["--resume"], "--resume needs --out"),
    (PolicyConfig, ["--resume", "--out", "nowhere"], "nowhere/config.json: no such file"),
    (PolicyConfig, ["--seed", "\x1b[31m1\n2"], r"\\x1b[31m"),  # what the terminal shows is never what it was told to do
])
def test_a_wrong_command_line_is_one_line_that_names_the_nearest_flag(config_class, arguments, words, capsys, tmp_path,
                                                                      monkeypatch):
    """A flag that is dropped in silence is a run that was not asked for."""
    def only_check(config):
        config.check()
        pytest.fail("work would have begun")

    monkeypatch.chdir(tmp_path)
    message = refused(capsys, only_check, config_class, arguments)
    assert words.replace("\\\\", "\\") in message and "\x1b" not in message
    assert list(tmp_path.iterdir()) == []


@EACH_FIELD
def test_each_field_is_a_flag(config_class, field):
    """A value given as text arrives with its type, and only what was given arrives."""
    value = {str: "word", int: 7, float: 0.125, bool: not field.default}.get(type(field.default), ("a b.jsonl", "c.json"))
    if isinstance(value, bool):
        arguments = [flag(field.name) if value else flag("no_" + field.name)]
    else:
        arguments = [flag(field.name), *(value if isinstance(value, tuple) else (str(value),))]
    assert given_flags(config_class, arguments) == {field.name: value}
    assert type(given_flags(config_class, arguments)[field.name]) is type(value)


@pytest.mark.parametrize("config_class", SCRIPTS)
def test_help_lists_each_flag_with_its_default_and_reason(config_class, capsys):
    """A % in a reason is a crash of argparse's formatter, seen only when somebody asks for help."""
    with pytest.raises(SystemExit) as ending:
        given_flags(config_class, ["--help"])
    page = " ".join(capsys.readouterr().out.split())
    assert ending.value.code == 0
    for field in dataclasses.fields(config_class):
        assert f"{flag(field.name)} " in page.replace(",", " ") and len(field.metadata["reason"]) > 10
        assert " ".join(f"{field.metadata['reason']} (default: {field.default!r})".split()) in page.replace("- ", "-")


# ---- presets ---------------------------------------------------------------------------------------------------------


def resolved(config_class, arguments):
    found = []
    run_script(found.append, config_class, arguments)
    return found[0]


@pytest.mark.parametrize("config_class", SCRIPTS)
@pytest.mark.parametrize("name", RewardConfig.presets)
def test_a_preset_lies_between_the_defaults_and_the_flags(name, config_class, capsys):
    """A preset that wins over a flag is a flag dropped in silence."""
    preset = config_class.presets[name]
    config = resolved(config_class, ["--preset", name])
    config.check()
    assert config == dataclasses.replace(config_class(), **preset)
    changed = dict(seed=7, max_response_length=3, lr=0.125)
    flags = [word for key, value in changed.items() for word in (flag(key), str(value))]
    assert resolved(config_class, [*flags, "--preset", name]) == dataclasses.replace(config, **changed)
    with pytest.raises(SystemExit):
        given_flags(config_class, ["--help"])
    assert ", ".join(config_class.presets) in " ".join(capsys.readouterr().out.split())


def test_the_debug_preset_runs_both_scripts_and_resumes_with_the_settings_it_recorded(tmp_path):
    """On its way to every stage: the truth of the task is known, although --data is not empty. What lies in the run folder
    wins over the preset when the same command line is given again with --resume."""
    folders = [str(tmp_path / name) for name in ("reward", "policy")]
    run_script(train_reward.main, RewardConfig, ["--preset", "debug", "--out", folders[0], "--batch-size", "64"])
    arguments = ["--preset", "debug", "--reward-run", folders[0], "--out", folders[1], "--iterations", "2"]
    run_script(train_policy.main, PolicyConfig, arguments)
    settings = json.loads((tmp_path / "policy" / "config.json").read_text())["settings"]
    wanted = {**PolicyConfig.presets["debug"], "iterations": 2}
    assert {name: settings[name] for name in wanted} == wanted
    result = json.loads((tmp_path / "policy" / "result.json").read_text())
    assert "sampled_gold" in result and "probes" in rows(tmp_path / "reward" / "reward_metrics.jsonl")[-1]
    assert resolved(PolicyConfig, [*arguments[:-2], "--resume"]).iterations == 2


# ---- config.json -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [
    b"", b"{", b"[]", b"null", b"3", b'"settings"', b"{}", b'{"settings": 3}', b'{"settings": []}', b'{"settings": null}',
    b'{"settings": {"seeed": 3}}', b'{"settings": {"seed": "3"}}', b'{"settings": {"seed": [1]}}', b'{"settings": {"lr": NaN}}',
    b'{"settings": {"lr": {"a": 1}}}', b"\xff\xfe", b"[" * 100_000, b'{"settings": {"seed": -1}}',
    b'{"settings": {"seed": true}}', b'{"settings": {"lr": 1' + b"0" * 400 + b"}}",
])
@pytest.mark.parametrize("config_class", SCRIPTS)
def test_a_damaged_config_file_is_refused_in_one_line(config_class, content, tmp_path):
    """A stranger's config.json reaches the program before anything has been checked."""
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError) as error:
        read_config(config_class, tmp_path / "config.json")
    assert "\n" not in str(error.value)


def test_settings_survive_the_file(tmp_path):
    """A tuple that comes back as a list is "another setting" when the run is resumed."""
    config = RewardConfig(data=("a.jsonl", "b.jsonl"), lr=3e-4, seed=2 ** 40)
    (tmp_path / "config.json").write_text(json.dumps(sealed(dataclasses.asdict(config), {})))
    assert read_config(RewardConfig, tmp_path / "config.json") == config


# ---- each setting does something -------------------------------------------------------------------------------------

# field -> (settings in common, the value before or ... for the default, the value after). Each is tested to change what a
# run returns, prints as its error, or leaves in its folder (config.json apart); a field without an entry fails.
REWARD_CHANGES = {
    "data": ({}, ("pairs.jsonl",), ("pairs.jsonl", "more.jsonl")),
    "heldout_data": ({}, ..., ("more.jsonl",)),
    "test_data": ({}, ..., ("more.jsonl",)),
    "holdout": ({}, 0.3, 0.6),
    "skip_bad_lines": (dict(data=("bad.jsonl",)), False, True),
    "tokenizer": ({}, "bytes.tiktoken", "merged.tiktoken"),
    "init": ({}, ..., "{reward_run}/base.pt"),
    "init_reward": ({}, ..., "{reward_run}/reward.pt"),
    "bf16": ({}, False, True),
    "warmup_init": (dict(init="{reward_run}/base.pt"), False, True),
    "n_layer": ({}, 1, 2),
    "n_head": ({}, 1, 2),
    "d_model": ({}, 8, 16),
    "max_prompt_length": ({}, 6, 3),
    "max_response_length": ({}, 5, 3),
    "warmup_sequences": ({}, 16, 24),
    "warmup_batch_size": ({}, 8, 12),
    "warmup_lr": ({}, 1e-2, 2e-2),
    "epochs": ({}, 1, 2),
    "batch_size": ({}, 4, 7),
    "lr": ({}, 1e-2, 2e-2),
    "centering": ({}, 0.0, 0.5),
    "verdict_coef": ({}, 0.0, 0.5),
    "weight_decay": ({}, 0.0, 0.1),
    "max_grad_norm": ({}, 1.0, 0.01),
    "normalise_prompts": ({}, 4, 8),
    "task": ({}, "none", "tiny"),
    "out": ({}, "a", "b"),
    "seed": ({}, 0, 1),
    "resume": (dict(out="finished"), False, True),
    "save_every": (dict(keep_checkpoints=9), 1, 2),
    "keep_checkpoints": (dict(save_every=1), 1, 2),
    "tensorboard": ({}, False, True),
}
POLICY_CHANGES = {
    "bf16": ({}, False, True),
    "reward_run": ({}, "{reward_run}", "other"),
    "prompts": ({}, ..., "more.jsonl"),
    "algorithm": ({}, "ppo", "gae"),
    "reward": ({}, ..., "tiny:letters_right"),
    "iterations": ({}, 1, 2),
    "batch_size": ({}, 8, 4),
    "group_size": (dict(algorithm="rloo"), 2, 4),
    "ppo_epochs": ({}, 1, 2),
    "minibatch_size": ({}, 4, 8),
    "lr": ({}, 1e-2, 1e-3),
    "lr_decay": ({}, True, False),
    "kl_coef": ({}, 0.0, 0.5),
    "kl_target": ({}, 0.0, 0.001),
    "kl_horizon": (dict(kl_target=0.001), 10, 100),
    "gamma": ({}, 1.0, 0.5),
    "lam": ({}, 0.95, 0.5),
    "clip_range": ({}, 0.2, 0.001),
    "value_clip_range": ({}, 0.0, 0.001),
    "vf_coef": ({}, 0.1, 0.5),
    "value_lr_scale": ({}, 1.0, 10.0),
    "ent_coef": ({}, 0.0, 0.1),
    "whiten": ({}, "on", "off"),
    "temperature": ({}, 1.0, 0.5),
    "missing_eos_penalty": (dict(max_response_length=2), 0.0, 2.0),
    "max_response_length": ({}, 0, 2),
    "max_grad_norm": ({}, 1.0, 0.01),
    "max_kl": (dict(lr=0.3, iterations=4), 200.0, 0.01),
    "eval_every": ({}, 1, 2),
    "eval_prompts": ({}, 2, 4),
    "test_prompts": ({}, 2, 4),
    "best_of_n": ({}, 0, 2),
    "out": ({}, "a", "b"),
    "seed": ({}, 0, 1),
    "resume": (dict(out="finished"), False, True),
    "save_every": (dict(keep_checkpoints=9), 1, 2),
    "keep_checkpoints": (dict(save_every=1), 1, 2),
    "tensorboard": ({}, False, True),
}
RESOURCES_ONLY = {  # and what --help says of it
    "device": "cuda", "deterministic": "no CUDA kernel whose sums vary", "micro_batch_size": "Less memory, the same gradient",
    "compile": "torch.compile the blocks", "shard": "under torchrun"}
FILES = ("pairs.jsonl", "more.jsonl", "bad.jsonl", "bytes.tiktoken", "merged.tiktoken")


@pytest.fixture(scope="module")
def workshop(reward_run, tmp_path_factory):
    """A folder with every file that the settings name, and finished runs to resume and to learn from."""
    folder = tmp_path_factory.mktemp("workshop")
    write_inputs(folder)
    pairs = (folder / "pairs.jsonl").read_text()
    (folder / "more.jsonl").write_text(pairs.replace(":", "?"))
    (folder / "bad.jsonl").write_text(pairs + "{\n")
    ranks = (folder / "bytes.tiktoken").read_bytes()
    (folder / "merged.tiktoken").write_bytes(ranks + base64.b64encode(b" a") + b" 256\n")
    train_reward.main(reward_config(folder, folder / "other", seed=1))
    for config_class in SCRIPTS:
        with contextlib.redirect_stdout(io.StringIO()):
            SCRIPTS[config_class](small(config_class, folder, reward_run, out=str(folder / config_class.__name__ / "finished")))
    return folder


def small(config_class, folder, trained, **settings):
    """A tiny configuration with these settings; names of the workshop's files stand for their paths."""
    def path(value):
        if isinstance(value, tuple):
            return tuple(map(path, value))
        if value in FILES or value == "other":
            return str(folder / value)
        return value.format(reward_run=trained) if isinstance(value, str) else value

    settings = {name: path(value) for name, value in settings.items()}
    if config_class is RewardConfig:
        return reward_config(folder, settings.pop("out", ""), **settings)
    return policy_config(settings.pop("reward_run", trained), settings.pop("out", ""), **settings)


class FakeWriter:
    """TensorBoard need not be installed for this."""

    def __init__(self, folder):
        self.path = f"{folder}-events"

    def add_scalar(self, key, value, step):
        with open(self.path, "a") as file:
            file.write(f"{key} {value} {step}\n")


def outcome(config_class, workshop, reward_run, folder, monkeypatch, settings):
    """All that can be seen of a run: its error, or what it returned and left behind, the wall clock's figures apart."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr("minirlhf.run.digest", lambda content: "")  # checkpoints name the run, and a run is its settings
    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = FakeWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    if settings.get("out") == "finished":
        settings = dict(settings, out=str(workshop / config_class.__name__ / "finished"))
    try:
        result = SCRIPTS[config_class](small(config_class, workshop, reward_run, **settings))
    except UserError as error:
        return str(error)
    files = {name: content for name, content in contents(folder).items() if not name.endswith(("config.json", ".jsonl"))}
    return result, files, [rows(path) for path in folder.rglob("*.jsonl")]


@EACH_FIELD
def test_each_setting_changes_something(config_class, field, workshop, reward_run, tmp_path, monkeypatch):
    """A setting that does nothing is a promise broken in silence, and a sweep over it is time lost."""
    if field.name in RESOURCES_ONLY:
        assert RESOURCES_ONLY[field.name] in field.metadata["reason"]
        return
    common, before, after = (REWARD_CHANGES if config_class is RewardConfig else POLICY_CHANGES)[field.name]
    before = field.default if before is ... else before
    seen = [outcome(config_class, workshop, reward_run, tmp_path / name, monkeypatch, {**common, field.name: value})
            for name, value in (("before", before), ("after", after))]
    assert seen[0] != seen[1]


def test_the_same_settings_give_the_same_run(workshop, reward_run, tmp_path, monkeypatch):
    """Without this, the test above would pass for a setting that does nothing."""
    for config_class in SCRIPTS:
        seen = [outcome(config_class, workshop, reward_run, tmp_path / f"{config_class.__name__}-{i}", monkeypatch, {})
                for i in (1, 2)]
        assert seen[0] == seen[1] and not isinstance(seen[0], str)


@pytest.mark.parametrize("config_class, name", [(RewardConfig, "reward_metrics.jsonl"), (PolicyConfig, "policy_metrics.jsonl")])
def test_micro_batches_change_memory_alone(config_class, name, workshop, reward_run, tmp_path, monkeypatch):
    """A mean of the means of ragged micro-batches is another gradient: the last, smallest one would count too much."""
    found, trained_on, forward = [], [], Transformer.forward

    def listening(model, ids, *rest, **more):
        trained_on.append(len(ids) if torch.is_grad_enabled() else 0)
        return forward(model, ids, *rest, **more)

    monkeypatch.setattr(Transformer, "forward", listening)
    for size in (0, 1, 3):
        out = tmp_path / str(size)
        trained_on.clear()
        SCRIPTS[config_class](small(config_class, workshop, reward_run, out=str(out), micro_batch_size=size))
        rows_each = 3 if config_class is RewardConfig else 1  # a prompt of its data has three responses
        assert not size or max(trained_on) <= size * rows_each
        found.append([row for row in rows(out / name) if "grad_norm" in row])
    for other in found[1:]:
        for ours, theirs in zip(found[0], other, strict=True):
            same = [key for key in ("loss", "grad_norm", "value_loss", "entropy", "accuracy") if key in theirs]
            assert [ours[key] for key in same] == pytest.approx([theirs[key] for key in same], rel=1e-3, abs=1e-4)


# ---- memory that is used again ---------------------------------------------------------------------------------------

FAULTS = """
import resource, sys, torch
from minirlhf.flags import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for turn in range(12):
    tensors = [torch.zeros(2**22) for _ in range(3)]  # 16 MiB each
    del tensors
    if turn == 3:  # by then the heap has grown to what it needs
        first = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - first)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such thresholds")
def test_freed_tensors_are_used_again_instead_of_fresh_pages_from_the_system():
    """Eight turns of 48 MiB are 98,304 pages if each is fetched anew, and next to none if the freed ones are used again.

    The environment holds glibc to the thresholds that it starts with: left alone it raises them by luck, now and then enough.
    """
    environment = os.environ | dict(MALLOC_MMAP_THRESHOLD_="131072", MALLOC_TRIM_THRESHOLD_="131072")
    faults = {how: int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True,
                                      cwd=Path(__file__).parent.parent, env=environment).stdout) for how in ("keep", "leave")}
    assert 3 * faults["keep"] < faults["leave"] and faults["leave"] > 10_000  # a system short of memory may take a turn's away
