"""What a program prints: safe for the terminal, in any encoding, also if nobody can read it."""

import ast
import dataclasses
import doctest
import errno
import io
import os
import pty
import shlex
import shutil
import subprocess
import sys

import train_reward
from minirlhf.config import PolicyConfig, RewardConfig
from minirlhf.run import terminal
from minirlhf.run.command_line import flag, one_line_errors, parse_flags
from minirlhf.run.terminal import Progress, echo, prepare_output

import pytest
import tiny
from test_structure import SOURCES
from tiny import as_flags, reward_config


def test_only_one_function_prints():
    """Otherwise a name or a text could reach the terminal without being escaped."""
    calls = {}
    for path in SOURCES:
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if type(node) is ast.Call]
        count = sum(ast.unparse(node.func) == "print" for node in nodes)
        if count:
            calls["/".join(path.parts[-2:])] = count
    plain = calls.pop("minirlhf/plain.py")
    assert calls == {"run/terminal.py": 1} and plain


@pytest.mark.parametrize(
    "encoding, shown",
    [
        ("utf-8", "é 你 \\x1b[2J \\udcff\n"),
        ("latin-1", "é \\u4f60 \\x1b[2J \\udcff\n"),
        ("ascii", "\\xe9 \\u4f60 \\x1b[2J \\udcff\n"),
    ],
)
def test_echo_escapes_what_a_stream_cannot_show(encoding, shown):
    """A folder's name may have bytes that are no text, which Python reads as surrogates."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    echo("é 你 \x1b[2J \udcff", stream)
    assert raw.getvalue().decode(encoding) == shown


def test_a_folder_with_any_name_works_in_any_encoding(inputs, tmp_path, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="latin-1"))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(raw, encoding="latin-1"))
    folder = tmp_path / os.fsdecode("你 \x1b \x1b]0;t\x07 ".encode() + b"\xff")
    flags = as_flags(reward_config(inputs, folder))
    assert tiny.ending(train_reward.main, RewardConfig, flags) == 0
    sys.stdout.flush()
    text = raw.getvalue().decode("latin-1")
    assert "\\u4f60 \\x1b \\x1b]0;t\\x07 \\udcff" in text
    assert all(char.isprintable() or char == "\n" for char in text)


def test_a_program_without_output_runs(inputs, tmp_path, monkeypatch):
    """After `>&- 2>&-` in a shell, Python's streams are None."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        patch.setattr(sys, "stderr", None)
        train_reward.main(reward_config(inputs, tmp_path / "main"))
        flags = as_flags(reward_config(inputs, tmp_path / "script"))
        assert tiny.ending(train_reward.main, RewardConfig, flags) == 0
        assert tiny.ending(train_reward.main, RewardConfig, flags) == 2  # the folder exists
    assert (tmp_path / "main" / "reward.pt").exists()
    assert (tmp_path / "script" / "reward.pt").exists()


def test_a_closed_terminal_discards_the_output(monkeypatch):
    """A run then continues until its checkpoint. On Linux, writing there is an EIO."""
    master, slave = pty.openpty()
    stream = open(slave, "w")
    monkeypatch.setattr(sys, "stdout", stream)
    os.close(master)
    for _ in range(3):
        echo("lost")
    print("lost as well", flush=True)
    stream.close()


def test_other_errors_of_a_stream_are_raised():
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OSError, match="full"):
        echo("text", stream=Full())


@pytest.mark.parametrize("columns, length", [(0, 79), (1, 0), (30, 29)])
def test_a_progress_line_fits_a_terminal_of_any_width(columns, length, monkeypatch):
    """A width of 0 means that the terminal does not know it."""
    monkeypatch.delenv("COLUMNS", raising=False)

    class Tty(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdout", Tty())
    monkeypatch.setattr(os, "get_terminal_size", lambda *_: os.terminal_size((columns, 0)))
    Progress("stage", 2).show(1, "loss 0.5 " * 20)
    assert sys.stdout.getvalue().startswith("\rstage"[: length + 1])
    assert len(sys.stdout.getvalue()) == length + 1


def test_other_code_may_print_any_character(monkeypatch):
    """For example a user's reward function."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    prepare_output()
    print("你", flush=True)
    assert raw.getvalue() == b"\\u4f60\n"


def test_examples_are_true():
    assert doctest.testmod(terminal).failed == 0


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_a_printed_command_can_be_pasted(encoding, monkeypatch):
    """A folder's name may contain anything; an escaped name would name another folder."""
    words = ["--out", "", "my run", "a'b", "é 你", "red\x1b[31m\n'\\", "\udcff", "\u202e", "$(x)"]
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    echo(terminal.shell_command(words))
    line = stream.buffer.getvalue()
    monkeypatch.undo()
    assert line.count(b"\n") == 1 and b"\x1b" not in line
    script = b"printf '%s\\0' " + line.decode(encoding).encode()
    done = subprocess.run(["bash", "-c", script], capture_output=True, check=True)
    assert [os.fsdecode(word) for word in done.stdout.split(b"\0")[:-1]] == words


@pytest.mark.parametrize("name", ["-run", "--Run", "--out/x", "-"])
def test_a_folder_whose_name_starts_like_a_flag_can_be_named_by_a_printed_command(name):
    """A user may have written --out=-run, or --out ./-run."""
    words = shlex.split(terminal.shell_command(["--out", name, "--resume"]))
    assert parse_flags(RewardConfig, words) == dict(out=f"./{name}", resume=True)


def test_every_flag_of_both_scripts_is_printed_as_a_flag():
    """A flag with a digit, --bf16, was printed as the path ./--bf16."""
    for config in (RewardConfig, PolicyConfig):
        for field in dataclasses.fields(config):
            for word in (flag(field.name), flag("no_" + field.name)):
                assert terminal.shell_command([word]) == word


def test_every_printed_command_is_quoted_by_one_function():
    """shlex alone keeps characters that the terminal shows escaped."""
    users = [path.name for path in SOURCES if "shlex" in path.read_text()]
    assert users == ["terminal.py"]


def test_an_error_of_the_system_without_a_number_keeps_its_text(capsys):
    """Libraries raise OSError with a text only; the line said "None"."""
    with pytest.raises(SystemExit), one_line_errors():
        raise OSError("the connection was lost")
    assert capsys.readouterr().err.startswith("error: output: the connection was lost; ")
