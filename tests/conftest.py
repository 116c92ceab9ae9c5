"""Set-up that must precede every import of a test file."""

import os
import signal
import sys
from pathlib import Path

import minirlhf  # noqa: F401 (before torch: sets how its threads wait)

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

# Without a GPU the Triton kernels run in Triton's interpreter. It must be chosen before triton is
# imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import train_policy  # noqa: E402
import train_reward  # noqa: E402
from minirlhf.data.tokenizer import fingerprint, load_tokenizer  # noqa: E402
from minirlhf.model import ModelConfig, Transformer  # noqa: E402
from minirlhf.model.loading import save_model  # noqa: E402
from minirlhf.run.signals import SIGNALS  # noqa: E402

import tiny  # noqa: E402
from terminals import Terminal  # noqa: E402


@pytest.fixture(autouse=True)
def own_signal_handlers():
    """Some tests install signal handlers; Ctrl-C must still stop pytest after them."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def no_flushing():
    """Every save waits twice for the disk, which takes most of the time on a busy machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(
    params=[
        pytest.param(name, marks=() if name in ("gpt2", "mixed") else pytest.mark.slow)
        for name in tiny.FORMS
    ]
)
def form(request, monkeypatch) -> str:
    """tiny.random_model has this form of the transformer."""
    monkeypatch.setattr(tiny, "FORM", tiny.FORMS[request.param])
    return request.param


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Path:
    """The folder of the tiny task's files."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny.write_inputs(folder)
    return folder


@pytest.fixture(scope="session")
def reward_run(inputs, tmp_path_factory) -> Path:
    """A finished reward run on the tiny task whose base model ends most responses."""
    folder = tmp_path_factory.mktemp("run") / "reward"
    train_reward.main(
        tiny.reward_config(inputs, folder, sft_sequences=480, epochs=3, normalize_prompts=14)
    )
    return folder


@pytest.fixture(scope="session")
def mixed_run(inputs, reward_run) -> Path:
    """A finished reward run next to reward_run, with the form "mixed" of the transformer."""
    folder = reward_run.with_name("mixed")
    config = ModelConfig(tiny.VOCAB, 320, n_layer=1, d_model=16, context=11, **tiny.FORMS["mixed"])
    facts = dict(tokenizer=fingerprint(load_tokenizer(str(inputs / "bytes.tiktoken"))))
    base = folder.with_name("mixed.pt")
    save_model(base, "base", Transformer(config), facts)
    settings = dict(sft_sequences=480, epochs=3, normalize_prompts=14)
    train_reward.main(tiny.reward_config(inputs, folder, init=str(base), sft_init=True, **settings))
    return folder


@pytest.fixture(scope="session")
def policy_run(reward_run, tmp_path_factory) -> Path:
    """A finished policy run on the tiny task."""
    folder = tmp_path_factory.mktemp("policy") / "run"
    train_policy.main(tiny.policy_config(reward_run, folder))
    return folder


@pytest.fixture
def open_terminal():
    """Terminals, whose processes are ended whatever the test comes to."""
    opened = []

    def begin(main, *arguments, **settings):
        opened.append(Terminal(main, *arguments, **settings))
        return opened[-1]

    yield begin
    for terminal in opened:
        terminal.abandon()
