"""A task, settings and a model so small that a run of either script takes a tenth of a second.

The task: the response to "b 3:" should be " bb", the letter twice. This module is also the task's
ground truth: --task tiny.
"""

import base64
import json
import math
import os
import signal
import sys
from pathlib import Path

from minirlhf.config import PolicyConfig, RewardConfig
from minirlhf.model.transformer import ModelConfig, Transformer
from minirlhf.rl.sampling import Samples
from minirlhf.run.checkpoint import load_checkpoint
from minirlhf.run.command_line import run_script
from minirlhf.run.metrics import WALL_CLOCK, Metrics

import torch

# Tiny tensors gain nothing from more threads, and sums have the same bits in every process.
torch.set_num_threads(1)

ROOT = Path(__file__).parent.parent
LETTERS = "abcd"
EOS, PAD, VOCAB = 256, 257, 257  # of write_inputs: a token for each byte


# ---- the ground truth ----------------------------------------------------------------------------


def gold(prompt: str, response: str, finished: bool = True) -> float:
    """+1 for each correct one of the first two letters, -0.25 per other character, -1 if cut."""
    said = response.removeprefix(" ")
    right = min(2, said.count(prompt[0]))
    return right - 0.25 * (len(said) - right) - (0.0 if finished else 1.0)


def best_response(prompt: str) -> str:
    return f" {prompt[0] * 2}"


def probes(prompt: str) -> dict[str, str]:
    return {"once": f" {prompt[0]}", "wrong letter": " zz"}


def preference_probability(prompt: str, a: str, b: str) -> float:
    return 1 / (1 + math.exp(gold(prompt, b) - gold(prompt, a)))


# A command must name the modules of the user that a config.json names.
MODULES = ["--task", "tiny"]


def letters_right(prompts: list[str], responses: list[str]) -> list[float]:
    """A user's reward function, for --reward tiny:letters_right."""
    return [gold(prompt, response) for prompt, response in zip(prompts, responses)]


# ---- inputs and settings -------------------------------------------------------------------------


def write_inputs(folder: Path) -> None:
    """pairs.jsonl, 40 pairs of 20 prompts, and bytes.tiktoken."""
    records = [
        dict(prompt=f"{letter} {number}:", chosen=f" {letter * 2}", rejected=rejected)
        for number in range(5)
        for place, letter in enumerate(LETTERS)
        for rejected in (f" {LETTERS[place - 1]}", f" {letter}x")
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "bytes.tiktoken").write_bytes(
        b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))
    )


def reward_config(inputs: Path, out: Path | str, **changes) -> RewardConfig:
    """3 steps of fine-tuning, 4 of preferences. inputs: the folder of write_inputs."""
    settings = dict(
        data=(str(inputs / "pairs.jsonl"),),
        tokenizer=str(inputs / "bytes.tiktoken"),
        task="tiny",
        holdout=0.3,
        n_layer=1,
        n_head=2,
        d_model=16,
        max_prompt_length=6,
        max_response_length=5,
        sft_sequences=24,
        sft_batch_size=8,
        sft_lr=1e-2,
        batch_size=4,
        lr=1e-2,
        normalize_prompts=8,
        device="cpu",
        out=str(out),
    )
    if changes.get("init") or changes.get("init_reward"):  # the sizes come from there
        settings = {k: v for k, v in settings.items() if k not in ("n_layer", "n_head", "d_model")}
    return RewardConfig(**{**settings, **changes})


def policy_config(reward_run: Path, out: Path | str, **changes) -> PolicyConfig:
    """2 iterations of 8 responses."""
    settings = dict(
        reward_run=str(reward_run),
        task="tiny",
        iterations=2,
        batch_size=8,
        minibatch_size=4,
        lr=1e-2,
        eval_prompts=4,
        test_prompts=4,
        best_of_n=0,
        save_every=1,
        device="cpu",
        out=str(out),
    )
    return PolicyConfig(**{**settings, **changes})


POLICY_FILES = {
    "policy.pt",
    "samples.md",
    "result.json",
    "checkpoints",
    "config.json",
    "policy_metrics.jsonl",
}


def as_flags(config) -> list[str]:
    """The command line of a configuration."""
    flags = []
    for name, value in vars(config).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, tuple):
            flags += [flag, *value] if value else []
        else:
            flags += [flag, str(value)]
    return flags


# Forms of the transformer, as changes to ModelConfig. "mixed" has every difference from GPT-2.
LLAMA = dict(
    n_head=4, n_kv_head=2, d_mlp=24, swiglu=True, rms_norm=True, rope_base=100.0, biases="none"
)
MIXED = dict(
    d_head=6,
    norm_eps=1e-6,
    rope_scaling=(4.0, 1.0, 4.0, 32.0),
    biases="qkv",
    qk_norm=True,
    tied=False,
)
FORMS = dict(
    gpt2=dict(n_head=2),
    mixed=LLAMA | MIXED,
    llama=LLAMA,
    llama3=LLAMA | dict(rope_scaling=(4.0, 1.0, 4.0, 32.0)),
    qwen2=LLAMA | dict(biases="qkv", tied=False),
    qwen3=LLAMA | dict(d_head=6, qk_norm=True),
)
FORM = FORMS["gpt2"]  # of random_model; the fixture `form` changes it


def random_model(
    seed: int = 0, vocab: int = 11, context: int = 24, spread: float = 0.3
) -> Transformer:
    """2 layers, far from uniform, with nonzero heads."""
    model = Transformer(
        ModelConfig(vocab, table_rows=64, n_layer=2, d_model=16, context=context, **FORM)
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += spread * torch.randn(weight.shape, generator=generator)
    return model.requires_grad_(False)


class OnCuda(torch.Tensor):
    """A tensor that claims to be on a GPU."""

    is_cuda = True


def make_samples(
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    response_ids: torch.Tensor,
    response_mask: torch.Tensor,
) -> Samples:
    """Samples without texts, all of them finished."""
    texts = [""] * len(prompt_ids)
    finished = [True] * len(prompt_ids)
    return Samples(
        texts, list(texts), finished, prompt_ids, prompt_mask, response_ids, response_mask
    )


# ---- files of a run ------------------------------------------------------------------------------


def weights(path: Path, kind: str) -> dict[str, torch.Tensor]:
    return load_checkpoint(path, kind)[1]["model"]


def assert_same_weights(ours: Path, theirs: Path, kind: str) -> None:
    a, b = weights(ours, kind), weights(theirs, kind)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def rows(path: Path) -> list[dict]:
    """Metrics without wall-clock values. Every line must be one complete JSON object."""
    lines = path.read_text().split("\n")
    assert lines.pop() == ""
    return [
        {key: value for key, value in json.loads(line).items() if not key.startswith(WALL_CLOCK)}
        for line in lines
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# ---- runs that fail ------------------------------------------------------------------------------


def ending(main, config_class, arguments: list[str]) -> int:
    """The exit status of a script run in this process; 0 if it returns.

    pytest.raises would keep the frames of the run, and with them the lock on its folder.
    """
    try:
        run_script(main, config_class, arguments)
    except SystemExit as error:
        return error.code
    return 0


def refused(capsys, main, config_class, arguments: list[str]) -> str:
    """The one error line of a script: exit status 2, "error: ..." alone on stderr."""
    capsys.readouterr()
    status = ending(main, config_class, arguments)
    output = capsys.readouterr()
    assert output.err.startswith("error: ") and output.err.endswith("\n"), output.err
    assert output.err.count("\n") == 1 and "Traceback" not in output.out + output.err, output.err
    assert status == 2
    return output.err


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def after_row(monkeypatch, number: int, action) -> None:
    """Call action(metrics, row) once, instead of writing the number-th row from now (from 1)."""
    write, written = Metrics.write, []

    def counting_write(metrics, row):
        written.append(row)
        if len(written) == number:
            monkeypatch.setattr(Metrics, "write", write)
            action(metrics, row)
        else:
            write(metrics, row)

    monkeypatch.setattr(Metrics, "write", counting_write)


def write_and_signal(number: int = signal.SIGINT):
    def action(metrics, row):
        metrics.write(row)
        os.kill(os.getpid(), number)

    return action


def tear_and_die(metrics, row) -> None:
    """A kill in the middle of a step that leaves half a row."""
    line = json.dumps(row, default=str).encode()
    metrics.file.write(line[: len(line) // 2])
    raise Killed


def environment() -> dict[str, str]:
    """For scripts that run in a process of their own."""
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]
