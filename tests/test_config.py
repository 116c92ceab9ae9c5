"""Every setting is checked before any work, and every setting has an effect."""

import base64
import contextlib
import dataclasses
import errno
import io
import json
import shutil
import sys
import types
import typing

import minirlhf
import train_policy
import train_reward
from minirlhf.config import PolicyConfig, RewardConfig
from minirlhf.model.transformer import Transformer
from minirlhf.rl.algorithms import pick_algorithm
from minirlhf.run import folder as run_folder
from minirlhf.run import run as run_module
from minirlhf.run.command_line import flag, parse_flags, run_script
from minirlhf.run.errors import UserError
from minirlhf.run.folder import read_config, sealed

import pytest
import torch
from tiny import contents, policy_config, refused, reward_config, rows, write_inputs

VERSION = minirlhf.__version__
SCRIPTS = {RewardConfig: train_reward.main, PolicyConfig: train_policy.main}
FIELDS = [
    (config_class, field) for config_class in SCRIPTS for field in dataclasses.fields(config_class)
]
EACH_FIELD = pytest.mark.parametrize(
    "config_class, field", FIELDS, ids=lambda x: getattr(x, "name", None) or x.__name__
)


# ---- wrong settings ------------------------------------------------------------------------------


def wrong_values(config_class, field):
    """Values that this field must refuse: other types, and values outside its bounds."""
    expected = typing.get_type_hints(config_class)[field.name]
    meta = field.metadata
    yield from {
        str: (3, None),
        int: ("3", 1.5, True, None),
        float: ("1", True, float("nan"), float("inf"), None),
        bool: (1, "yes", None),
    }.get(expected, ("one.jsonl", (1,), None))
    if meta["low"] is not None:
        yield meta["low"] - 1
    if meta["high"] is not None:
        yield meta["high"] + 1
    if meta["choices"]:
        yield meta["choices"][0] + "x"


@EACH_FIELD
def test_a_wrong_value_is_refused_with_the_name_of_its_flag(config_class, field):
    """Without the check, a learning rate of a wrong type would fail late in the run."""
    config_class().check()
    for value in wrong_values(config_class, field):
        with pytest.raises(UserError, match=flag(field.name)) as error:
            dataclasses.replace(config_class(), **{field.name: value}).check()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("config_class", SCRIPTS)
def test_a_wrong_setting_fails_before_any_work(config_class, tmp_path, monkeypatch):
    """main() checks its settings too, before it reads or creates a file."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--seed"):
        SCRIPTS[config_class](config_class(seed=-1, out="run"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "config, problem",
    [
        (RewardConfig(d_model=100, n_head=3), "--n-head 3 does not divide --d-model 100"),
        (
            PolicyConfig(kl_coef=0.0, kl_target=6.0),
            "--kl-target scales --kl-coef up or down, and 0 stays 0",
        ),
        (
            PolicyConfig(kl_target=0.5, kl_horizon=5, batch_size=32),
            "--kl-horizon 5 is smaller than --batch-size 32",
        ),
        (
            RewardConfig(init="base.pt", init_reward="reward.pt"),
            "--init-reward uses the base.pt next to it; leave out --init",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(config, problem):
    """A later error about a tensor's shape would not name the two flags."""
    with pytest.raises(UserError, match=problem):
        config.check()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (
            ["--batch-size", "9" * 20],
            "--batch-size must be from 1 to 65536, not 99999999999999999999",
        ),
        (["--seed", "9" * 20], "--seed must be from 0 to 9223372036854775807, not 9999"),
        (["--save-every", "9" * 20], "--save-every must be from 1 to 9223372036854775807"),
        (["--clip-range", "1e300"], "--clip-range must be from 0 to 1000000.0, not 1e+300"),
        (["--missing-eos-penalty=-1e300"], "--missing-eos-penalty must be from 0 to 1000000.0"),
        (["--lr", "1e6", "--algorithm", "reinforce"], "--lr must be from 0 to 1, not 1000000.0"),
        (["--vf-coef", "inf"], "--vf-coef must be from 0 to 1000000.0, not inf"),
        (["--kl-coef", "nan"], "--kl-coef must be from 0 to 1000000.0, not nan"),
    ],
)
def test_a_number_out_of_any_sensible_range_is_refused(arguments, words, capsys):
    """Numbers that overflow failed later: in torch, in the sampling, or for lack of memory."""
    assert words in refused(capsys, train_policy.main, PolicyConfig, arguments)


def test_a_list_flag_that_is_given_twice_keeps_all_files():
    """argparse's default keeps only the last one, so a file would be dropped silently."""
    given = parse_flags(RewardConfig, ["--data", "a", "b", "--data", "c"])
    assert given["data"] == ("a", "b", "c")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--bf16", "True"], "unknown argument True; --help lists all flags"),
        (["--data", ""], "--data takes file names, not ('',)"),
        (["--d-model", "130"], "--n-head 4 does not divide --d-model 130; choose a divisor"),
    ],
)
def test_a_flag_that_cannot_be_used_is_one_short_line(arguments, words, capsys):
    def main(config):
        config.check()

    error = refused(capsys, main, RewardConfig, arguments)
    assert words in error and len(error) < 200


@pytest.mark.parametrize(
    "config, problem",
    [
        (
            PolicyConfig(algorithm="rloo", batch_size=30),
            "--batch-size 30 is not a multiple of --group-size 4",
        ),
        (
            PolicyConfig(algorithm="grpo", batch_size=30),
            "--batch-size 30 is not a multiple of --group-size 4",
        ),
        (PolicyConfig(algorithm="pop"), "--algorithm 'pop' is not known; did you mean ppo?"),
    ],
)
def test_an_algorithm_that_cannot_run_is_refused_before_any_work(
    config, problem, tmp_path, monkeypatch
):
    """Users can add algorithms, so main() checks the name, not the configuration."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=problem):
        train_policy.main(dataclasses.replace(config, out="run"))
    assert list(tmp_path.iterdir()) == []


def test_the_group_size_matters_only_for_algorithms_with_groups():
    """ppo has no groups, so its batch size need not be a multiple of the group size."""
    pick_algorithm(PolicyConfig(algorithm="ppo", batch_size=30))


# ---- the command line ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config_class, arguments, words",
    [
        (
            RewardConfig,
            ["--sft-sequence", "8"],
            "unknown argument --sft-sequence; did you mean --sft-sequences?",
        ),
        (
            PolicyConfig,
            ["--algoritm", "ppo"],
            "unknown argument --algoritm; did you mean --algorithm?",
        ),
        (PolicyConfig, ["--kl-cof=0.1"], "unknown argument --kl-cof=0.1; did you mean --kl-coef?"),
        (RewardConfig, ["--preset", "debgu"], "--preset: invalid choice: 'debgu' (choose from"),
        (PolicyConfig, ["--no-seed"], "unknown argument --no-seed"),
        # abbreviations are refused, because a new flag could change their meaning
        (PolicyConfig, ["--iter", "3"], "unknown argument --iter"),
        (PolicyConfig, ["ppo"], "unknown argument ppo"),
        (PolicyConfig, ["--seed", "one"], "--seed: invalid int value: 'one'"),
        (PolicyConfig, ["--seed", "1.5"], "--seed: invalid int value: '1.5'"),
        (PolicyConfig, ["--lr", "nan"], "--lr must be from 0 to 1, not nan"),
        (PolicyConfig, ["--lr", "-1"], "--lr must be from 0 to 1, not -1.0"),
        (PolicyConfig, ["--gamma", "1.5"], "--gamma must be from 0 to 1, not 1.5"),
        (PolicyConfig, ["--seed"], "--seed: expected one argument"),
        (PolicyConfig, ["--device", "gpu"], "'gpu' is not known; choose from auto, cpu, cuda, mps"),
        (PolicyConfig, ["--device", "cuda:3"], "CUDA_VISIBLE_DEVICES=3"),
        (RewardConfig, ["--n-layer", "0"], "--n-layer must be from 1 to 1000, not 0"),
        (RewardConfig, ["--data"], "--data: expected at least one argument"),
        (RewardConfig, ["--resume"], "--resume needs --out"),
        (PolicyConfig, ["--resume"], "--resume needs --out"),
        (PolicyConfig, ["--resume", "--out", "nowhere"], "nowhere/config.json: No such file"),
        # control characters are escaped, so that they cannot change the terminal
        (PolicyConfig, ["--seed", "\x1b[31m1\n2"], r"\\x1b[31m"),
    ],
)
def test_the_error_for_a_wrong_command_line_is_one_line_with_the_closest_flag(
    config_class, arguments, words, capsys, tmp_path, monkeypatch
):
    """A flag that is ignored would start a run with other settings."""

    def only_check(config):
        config.check()
        pytest.fail("the script would start to work")

    monkeypatch.chdir(tmp_path)
    message = refused(capsys, only_check, config_class, arguments)
    assert words.replace("\\\\", "\\") in message
    assert "\x1b" not in message
    assert list(tmp_path.iterdir()) == []


@EACH_FIELD
def test_each_field_is_a_flag(config_class, field):
    """A value has its type after parsing, and flags that are not given are absent."""
    value = {str: "word", int: 7, float: 0.125, bool: not field.default}.get(
        type(field.default), ("a b.jsonl", "c.json")
    )
    if isinstance(value, bool):
        arguments = [flag(field.name) if value else flag("no_" + field.name)]
    else:
        arguments = [flag(field.name), *(value if isinstance(value, tuple) else (str(value),))]
    assert parse_flags(config_class, arguments) == {field.name: value}
    assert type(parse_flags(config_class, arguments)[field.name]) is type(value)


@pytest.mark.parametrize("config_class", SCRIPTS)
def test_help_lists_each_flag_with_its_default_and_reason(config_class, capsys):
    """A % in a reason would crash argparse, but only when --help is used."""
    with pytest.raises(SystemExit) as ending:
        parse_flags(config_class, ["--help"])
    page = " ".join(capsys.readouterr().out.split())
    assert ending.value.code == 0
    for field in dataclasses.fields(config_class):
        reason = field.metadata["reason"]
        assert len(reason) > 10
        assert f"{flag(field.name)} " in page.replace(",", " ")
        expected = " ".join(f"{reason} (default: {field.default!r})".split())
        assert expected in page.replace("- ", "-")


# ---- presets -------------------------------------------------------------------------------------


def resolved(config_class, arguments):
    """The configuration that a script gets for these arguments."""
    configs = []
    run_script(configs.append, config_class, arguments)
    return configs[0]


@pytest.mark.parametrize("config_class", SCRIPTS)
@pytest.mark.parametrize("name", RewardConfig.presets)
def test_flags_override_a_preset_and_a_preset_overrides_the_defaults(name, config_class, capsys):
    """A flag that a preset overrides would have no effect."""
    preset = config_class.presets[name]
    config = resolved(config_class, ["--preset", name])
    config.check()
    assert config == dataclasses.replace(config_class(), **preset)
    changed = dict(seed=7, max_response_length=3, lr=0.125)
    flags = [word for key, value in changed.items() for word in (flag(key), str(value))]
    assert resolved(config_class, [*flags, "--preset", name]) == dataclasses.replace(
        config, **changed
    )
    with pytest.raises(SystemExit):
        parse_flags(config_class, ["--help"])
    assert ", ".join(config_class.presets) in " ".join(capsys.readouterr().out.split())


def test_the_debug_preset_runs_both_scripts_and_resumes_with_recorded_settings(tmp_path):
    """With --data from the help desk the ground truth is known.

    With --resume the settings in the run folder override those of the preset.
    """
    reward = tmp_path / "reward"
    policy = tmp_path / "policy"
    arguments = ["--preset", "debug", "--out", str(reward), "--batch-size", "64"]
    run_script(train_reward.main, RewardConfig, arguments)
    arguments = ["--preset", "debug", "--reward-run", str(reward), "--out", str(policy)]
    arguments += ["--iterations", "2"]
    run_script(train_policy.main, PolicyConfig, arguments)
    settings = json.loads((policy / "config.json").read_text())["settings"]
    expected = {**PolicyConfig.presets["debug"], "iterations": 2}
    assert {name: settings[name] for name in expected} == expected
    assert "sampled_gold" in json.loads((policy / "result.json").read_text())
    assert "probes" in rows(reward / "reward_metrics.jsonl")[-1]
    assert resolved(PolicyConfig, [*arguments[2:-2], "--resume"]).iterations == 2


# ---- config.json ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"3",
        b'"settings"',
        b"{}",
        b'{"settings": 3}',
        b'{"settings": []}',
        b'{"settings": null}',
        b'{"settings": {"seeed": 3}}',
        b'{"settings": {"seed": "3"}}',
        b'{"settings": {"seed": [1]}}',
        b'{"settings": {"lr": NaN}}',
        b'{"settings": {"lr": {"a": 1}}}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"settings": {"seed": -1}}',
        b'{"settings": {"seed": true}}',
        b'{"settings": {"lr": 1' + b"0" * 400 + b"}}",
    ],
)
@pytest.mark.parametrize("config_class", SCRIPTS)
def test_a_damaged_config_file_is_refused_in_one_line(config_class, content, tmp_path):
    """config.json can contain anything, so every value must be checked after it is read."""
    this_version = f'{{"version": "{VERSION}", "facts": {{}}, "settings": '.encode()
    for variant in (content, content.replace(b'{"settings": ', this_version)):
        (tmp_path / "config.json").write_bytes(variant)
        with pytest.raises(UserError) as error:
            read_config(config_class, tmp_path / "config.json")
        message = str(error.value)
        assert "\n" not in message
        assert "written by" not in message


def test_a_config_file_that_cannot_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    """Its permissions or its disk are the problem, and a new run would not help."""

    def fail(*arguments):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(run_folder, "read_file", fail)
    with pytest.raises(UserError, match="config.json: Permission denied;") as error:
        read_config(RewardConfig, tmp_path / "config.json")
    assert "start a new run" not in str(error.value)


def test_settings_read_from_the_file_equal_those_written(tmp_path):
    """A tuple that is read as a list would count as a changed setting when the run is resumed."""
    config = RewardConfig(data=("a.jsonl", "b.jsonl"), lr=3e-4, seed=2**40)
    (tmp_path / "config.json").write_text(json.dumps(sealed(dataclasses.asdict(config), {})))
    assert read_config(RewardConfig, tmp_path / "config.json") == config


def test_the_config_file_records_the_version(reward_run, policy_run):
    """Another version of the program can then refuse the folder."""
    for folder in (reward_run, policy_run):
        content = json.loads((folder / "config.json").read_text())
        assert content["version"] == VERSION


@pytest.mark.parametrize("config_class", SCRIPTS)
@pytest.mark.parametrize("version", ["1.0", "9.9", None])
def test_a_config_file_of_another_version_is_refused_with_both_versions(
    config_class, version, tmp_path
):
    """A setting could have another meaning in another version. Version 1.0 recorded none."""
    content = sealed(dataclasses.asdict(config_class()), {})
    del content["version"]
    if version:
        content["version"] = version
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        read_config(config_class, tmp_path / "config.json")
    message = str(error.value)
    assert f"written by minirlhf {version or '1.0'}, but this is minirlhf {VERSION};" in message
    assert str(tmp_path / "config.json") in message
    assert "\n" not in message


def test_the_version_is_checked_before_the_settings(tmp_path):
    """An error about unknown settings would hide that the version is the reason."""
    settings = dataclasses.asdict(RewardConfig())
    settings["warmup_lr"] = settings.pop("sft_lr")
    content = sealed(settings, {})
    del content["version"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    expected = f"written by minirlhf 1.0, but this is minirlhf {VERSION};"
    with pytest.raises(UserError, match=expected):
        read_config(RewardConfig, tmp_path / "config.json")


def test_both_scripts_refuse_a_run_folder_of_another_version(
    reward_run, policy_run, tmp_path, capsys
):
    """The policy script reads the reward run's folder, and --resume reads the run's own."""
    for folder in (reward_run, policy_run):
        shutil.copytree(folder, tmp_path / folder.name)
    reward = tmp_path / reward_run.name
    policy = tmp_path / policy_run.name
    for folder in (reward, policy):
        content = json.loads((folder / "config.json").read_text())
        del content["version"]
        (folder / "config.json").write_text(json.dumps(content))
    for config_class, arguments in (
        (RewardConfig, ["--resume", "--out", str(reward)]),
        (PolicyConfig, ["--resume", "--out", str(policy)]),
        (PolicyConfig, ["--reward-run", str(reward), "--out", str(tmp_path / "new")]),
    ):
        message = refused(capsys, SCRIPTS[config_class], config_class, arguments)
        assert f"written by minirlhf 1.0, but this is minirlhf {VERSION};" in message
    assert not (tmp_path / "new").exists()


# ---- each setting has an effect ------------------------------------------------------------------

# field -> (other settings, first value or ... for the default, second value). The two values must
# give runs that differ in result, error message or files (except config.json). A field without an
# entry fails.
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
    "sft_init": (dict(init="{reward_run}/base.pt"), False, True),
    "n_layer": ({}, 1, 2),
    "n_head": ({}, 1, 2),
    "d_model": ({}, 8, 16),
    "max_prompt_length": ({}, 6, 3),
    "max_response_length": ({}, 5, 3),
    "sft_sequences": ({}, 16, 24),
    "sft_batch_size": ({}, 8, 12),
    "sft_lr": ({}, 1e-2, 2e-2),
    "epochs": ({}, 1, 2),
    "batch_size": ({}, 4, 7),
    "lr": ({}, 1e-2, 2e-2),
    "centering": ({}, 0.0, 0.5),
    "auxiliary_coef": ({}, 0.0, 0.5),
    "weight_decay": ({}, 0.0, 0.1),
    "max_grad_norm": ({}, 1.0, 0.01),
    "normalize_prompts": ({}, 4, 8),
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
    "task": ({}, "tiny", "none"),
    "prompts": ({}, ..., "more.jsonl"),
    "algorithm": ({}, "ppo", "gae"),
    "data": (dict(algorithm="dpo"), ..., ("more.jsonl",)),
    "dpo_beta": (dict(algorithm="dpo"), 0.1, 0.5),
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
    "eval_temperature": ({}, 0.0, 0.3),
    "eval_top_k": ({}, 0, 2),
    "eval_top_p": ({}, 1.0, 0.3),
    "test_prompts": ({}, 2, 4),
    "best_of_n": ({}, 0, 2),
    "out": ({}, "a", "b"),
    "seed": ({}, 0, 1),
    "resume": (dict(out="finished"), False, True),
    "save_every": (dict(keep_checkpoints=9), 1, 2),
    "keep_checkpoints": (dict(save_every=1), 1, 2),
    "tensorboard": ({}, False, True),
}
# settings that change only speed and memory -> a part of their reason
RESOURCES_ONLY = {
    "device": "cuda",
    "deterministic": "only CUDA kernels with reproducible sums",
    "micro_batch_size": "Less memory, same gradient",
    "compile": "torch.compile the blocks",
    "shard": "with torchrun",
}
# settings with a value for which the run must fail
FAILS_WITH_ONE_VALUE = ("resume", "skip_bad_lines", "max_kl")
FILES = ("pairs.jsonl", "more.jsonl", "bad.jsonl", "bytes.tiktoken", "merged.tiktoken")


@pytest.fixture(scope="module")
def workshop(reward_run, tmp_path_factory):
    """A folder with every file that the settings name, and finished runs to resume and to use."""
    folder = tmp_path_factory.mktemp("workshop")
    write_inputs(folder)
    pairs = (folder / "pairs.jsonl").read_text()
    (folder / "more.jsonl").write_text(pairs.replace(':",', '?",'))
    (folder / "bad.jsonl").write_text(pairs + "{\n")
    ranks = (folder / "bytes.tiktoken").read_bytes()
    (folder / "merged.tiktoken").write_bytes(ranks + base64.b64encode(b" a") + b" 256\n")
    train_reward.main(reward_config(folder, folder / "other", seed=1))
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        use_same_id(patch)
        for config_class, main in SCRIPTS.items():
            out = str(folder / config_class.__name__ / "finished")
            main(small(config_class, folder, reward_run, out=out))
    return folder


def use_same_id(monkeypatch):
    """Give all runs the same id, because checkpoints contain it and it depends on all settings."""
    open_folder = run_module.open_folder
    monkeypatch.setattr(
        run_module, "open_folder", lambda *arguments: (*open_folder(*arguments)[:2], "same")
    )


def small(config_class, folder, trained, **settings):
    """A tiny configuration with these settings; names of the workshop's files become paths."""

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
    """A replacement for TensorBoard's SummaryWriter, which need not be installed."""

    def __init__(self, folder):
        self.path = f"{folder}-events"

    def add_scalar(self, key, value, step):
        with open(self.path, "a") as file:
            file.write(f"{key} {value} {step}\n")


def outcome(config_class, workshop, reward_run, folder, monkeypatch, settings):
    """The error of a run, or its result, files and metrics without wall-clock values."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    use_same_id(monkeypatch)
    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = FakeWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    if settings.get("out") == "finished":
        settings = dict(settings, out=str(workshop / config_class.__name__ / "finished"))
    try:
        result = SCRIPTS[config_class](small(config_class, workshop, reward_run, **settings))
    except UserError as error:
        return str(error)
    files = {
        name: content
        for name, content in contents(folder).items()
        if not name.endswith(("config.json", ".jsonl"))
    }
    return result, files, [rows(path) for path in folder.rglob("*.jsonl")]


@EACH_FIELD
def test_each_setting_has_an_effect(
    config_class, field, workshop, reward_run, tmp_path, monkeypatch
):
    """A setting without an effect would make every experiment with it useless."""
    if field.name in RESOURCES_ONLY:
        assert RESOURCES_ONLY[field.name] in field.metadata["reason"]
        return
    changes = REWARD_CHANGES if config_class is RewardConfig else POLICY_CHANGES
    others, first, second = changes[field.name]
    if first is ...:
        first = field.default
    outcomes = []
    for name, value in (("first", first), ("second", second)):
        settings = {**others, field.name: value}
        outcomes.append(
            outcome(config_class, workshop, reward_run, tmp_path / name, monkeypatch, settings)
        )
    assert outcomes[0] != outcomes[1]
    assert field.name in FAILS_WITH_ONE_VALUE or not any(isinstance(o, str) for o in outcomes)


def test_the_same_settings_give_the_same_run(workshop, reward_run, tmp_path, monkeypatch):
    """If equal runs differed, the test above would pass for a setting without an effect."""
    for config_class in SCRIPTS:
        outcomes = []
        for number in (1, 2):
            folder = tmp_path / f"{config_class.__name__}-{number}"
            outcomes.append(outcome(config_class, workshop, reward_run, folder, monkeypatch, {}))
        assert outcomes[0] == outcomes[1]
        assert not isinstance(outcomes[0], str)


@pytest.mark.parametrize(
    "config_class, name",
    [(RewardConfig, "reward_metrics.jsonl"), (PolicyConfig, "policy_metrics.jsonl")],
)
def test_micro_batches_do_not_change_the_results(
    config_class, name, workshop, reward_run, tmp_path, monkeypatch
):
    """A mean of means over micro-batches of different sizes would be another gradient."""
    metrics = []
    batch_sizes = []
    forward = Transformer.forward

    def recording_forward(model, ids, attention_mask, cache=None):
        batch_sizes.append(len(ids) if torch.is_grad_enabled() else 0)
        return forward(model, ids, attention_mask, cache)

    monkeypatch.setattr(Transformer, "forward", recording_forward)
    # a prompt of the tiny task has three responses
    rows_per_item = 3 if config_class is RewardConfig else 1
    for size in (0, 1, 3):
        out = tmp_path / str(size)
        batch_sizes.clear()
        config = small(config_class, workshop, reward_run, out=str(out), micro_batch_size=size)
        SCRIPTS[config_class](config)
        assert max(batch_sizes) > 0
        assert not size or max(batch_sizes) <= size * rows_per_item
        metrics.append([row for row in rows(out / name) if "grad_norm" in row])
    for other in metrics[1:]:
        for expected, row in zip(metrics[0], other, strict=True):
            keys = {"loss", "grad_norm", "value_loss", "entropy", "accuracy"} & row.keys()
            expected_values = {key: expected[key] for key in keys}
            values = {key: row[key] for key in keys}
            assert values == pytest.approx(expected_values, rel=1e-3, abs=1e-4)
