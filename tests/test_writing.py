"""Files: never written through a link, no file of the user is lost, locks are optional."""

import errno
import fcntl
import os
import signal
import stat
import time

import train_policy
from minirlhf.config import PolicyConfig
from minirlhf.lab import common
from minirlhf.run.checkpoint import save_step
from minirlhf.run.errors import UserError
from minirlhf.run.files import lock_file, sync_folder, write_atomically
from minirlhf.run.folder import PARTIAL
from minirlhf.run.metrics import Metrics
from minirlhf.tools import bpe, helpdesk_data, report

import pytest
import tiny
from tiny import contents, policy_config, refused


def failing(code):
    def fail(*arguments):
        raise OSError(code, os.strerror(code))

    return fail


# ---- file systems that lack a function -----------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks_is_a_warning(code, tmp_path, monkeypatch, capsys):
    """Some network and cluster file systems have no flock; nothing else runs there."""
    monkeypatch.setattr(fcntl, "flock", failing(code))
    lock_file(tmp_path / ".lock", "busy").close()
    assert capsys.readouterr().out == (
        f"warning: {tmp_path}: this file system has no locks; start no second process there\n"
    )


@pytest.mark.parametrize("code", [errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES])
def test_a_lock_of_another_process_is_an_error(code, tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", failing(code))
    with pytest.raises(UserError, match="^busy$"):
        lock_file(tmp_path / ".lock", "busy")


def test_an_error_of_the_disk_is_not_reported_as_another_process(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        lock_file(tmp_path / ".lock", "busy")


def fsync_of_folders(code):
    """os.fsync that fails for folders only."""

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            failing(code)()

    return fsync


@pytest.mark.parametrize(
    "code", [errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EBADF, errno.EISDIR]
)
def test_a_folder_that_cannot_be_flushed_is_no_error(code, tmp_path, monkeypatch):
    """SMB and FUSE refuse it; the file itself is flushed."""
    monkeypatch.setattr(os, "fsync", fsync_of_folders(code))
    write_atomically(tmp_path / "x", b"content")
    assert contents(tmp_path) == {"x": b"content"}


def test_a_folder_that_cannot_be_opened_is_not_flushed(tmp_path, monkeypatch):
    """A folder may allow writing and not reading."""
    monkeypatch.setattr(os, "open", failing(errno.EACCES))
    sync_folder(tmp_path)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_disk_that_fails_is_an_error(code, tmp_path, monkeypatch):
    """Also for a folder: the new name may be lost."""
    monkeypatch.setattr(os, "fsync", fsync_of_folders(code))
    with pytest.raises(OSError):
        write_atomically(tmp_path / "x", b"content")
    monkeypatch.setattr(os, "fsync", failing(code))
    with pytest.raises(OSError):
        write_atomically(tmp_path / "y", b"content")
    assert list(contents(tmp_path)) == ["x"]


def test_a_run_needs_neither_locks_nor_flushed_folders(reward_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOSYS))
    monkeypatch.setattr(os, "fsync", fsync_of_folders(errno.EINVAL))
    config = policy_config(reward_run, tmp_path / "run", iterations=1)
    train_policy.main(config)
    assert (tmp_path / "run" / "policy.pt").exists()
    assert capsys.readouterr().out.count("warning: ") == 1


# ---- links ---------------------------------------------------------------------------------------


def test_a_file_is_replaced_and_not_written_through_a_link(tmp_path):
    """Neither the file's name nor that of the partial file may lead to a file of the user."""
    (tmp_path / "mine").write_bytes(b"mine")
    for name in ("x", ".x.partial"):
        (tmp_path / name).symlink_to(tmp_path / "mine")
    write_atomically(tmp_path / "x", b"content")
    assert (tmp_path / "mine").read_bytes() == b"mine"
    assert (tmp_path / "x").read_bytes() == b"content"
    assert not (tmp_path / "x").is_symlink()


def test_an_unfinished_file_is_a_new_file(tmp_path, monkeypatch):
    """Even if another program guessed its name."""
    monkeypatch.setattr("secrets.token_hex", lambda count: "guess")
    (tmp_path / "mine").write_bytes(b"mine")
    (tmp_path / ".x.guess.partial").symlink_to(tmp_path / "mine")
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "x", b"content")
    assert (tmp_path / "mine").read_bytes() == b"mine"


def test_metrics_and_locks_that_are_links_are_refused(reward_run, tmp_path, capsys):
    """Resuming cuts the metrics after the checkpoint, so it would cut the link's target."""
    run = tmp_path / "run"
    train_policy.main(policy_config(reward_run, run))
    mine = tmp_path / "mine"
    for name in ("policy_metrics.jsonl", ".lock"):
        path = run / name
        before = path.read_bytes()
        mine.write_bytes(b"mine")
        path.unlink()
        path.symlink_to(mine)
        message = refused(
            capsys, train_policy.main, PolicyConfig, ["--out", str(run), "--resume", *tiny.MODULES]
        )
        assert message.startswith(f"error: {path}: is a symbolic link")
        assert mine.read_bytes() == b"mine"
        path.unlink()
        path.write_bytes(before)


# ---- files of the user ---------------------------------------------------------------------------


def test_each_damaged_metrics_file_is_kept(tmp_path):
    """The second one must not replace the first."""
    path = tmp_path / "m.jsonl"
    for content in (b"one", b"two", b"three"):
        path.write_bytes(content)
        Metrics(path, [5, "digest"], False).file.close()
    kept = contents(tmp_path)
    assert kept.pop("m.jsonl") == b"" and sorted(kept.values()) == [b"one", b"three", b"two"]


def test_resuming_deletes_unfinished_files_of_the_run_only(reward_run, tmp_path):
    run = tmp_path / "run"
    config = policy_config(reward_run, run, iterations=1, lr_decay=False)
    train_policy.main(config)
    mark = "0123456789abcdef.partial"
    own = [
        f".{name}.{mark}" for name in ("config.json", "policy.pt", "samples.md", "result.json")
    ] + [f".bad-batch-policy-3.json.{mark}", f"checkpoints/.policy-00000002.pt.{mark}"]
    own += [f"inputs/.my.tiktoken.{mark}", f"inputs/qwen/.tokenizer_config.json.{mark}"]
    users = [
        ".notes.partial",
        f".notes.txt.{mark}",
        "mine/.download.partial",
        f"mine/.policy.pt.{mark}",
        f"inputs/.mine.jsonl.{mark}",
        "checkpoints/.policy-00000002.pt.partial",
    ]
    (run / "mine").mkdir()
    (run / "inputs" / "qwen").mkdir(parents=True)
    for name in own + users:
        (run / name).write_bytes(b"x")
    train_policy.main(policy_config(reward_run, run, iterations=2, lr_decay=False, resume=True))
    assert [name for name in own if (run / name).exists()] == []
    assert [name for name in users if not (run / name).exists()] == []


def test_unfinished_files_have_the_names_that_a_run_deletes(reward_run, tmp_path, monkeypatch):
    """Every write of a run is killed once; then nothing is left when the run has resumed."""
    names = []

    def kill(partial, path):
        names.append((os.path.dirname(partial), os.path.basename(partial)))
        real(partial, path)

    real = os.replace
    monkeypatch.setattr(os, "replace", kill)
    train_policy.main(policy_config(reward_run, tmp_path / "run"))
    assert len(names) >= 6
    assert [name for _, name in names if not PARTIAL.fullmatch(name)] == []
    assert {os.path.relpath(folder, tmp_path) for folder, _ in names} == {"run", "run/checkpoints"}


def test_copies_of_checkpoints_are_neither_deleted_nor_loaded(tmp_path):
    """A user may keep a copy of a good checkpoint under another name."""
    mine = tmp_path / "policy-best.pt"
    mine.write_bytes(b"mine")
    for step in range(1, 5):
        save_step(tmp_path, "policy", dict(step=step), {}, keep=2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["policy-00000003.pt", "policy-00000004.pt", "policy-best.pt"]


def exit_line(capsys, main, arguments) -> str:
    """The error line of a tool, "" if it succeeds."""
    try:
        main(arguments)
    except SystemExit as stop:
        assert stop.code == 2
    return capsys.readouterr().err


def test_tools_replace_a_file_only_with_force(policy_run, tmp_path, monkeypatch, capsys):
    """A wrong argument must not cost a corpus or a model."""
    monkeypatch.setattr(helpdesk_data, "GROUPS", dict(train=4, validation=2, test=2))
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("some words")
    data = tmp_path / "data"
    data.mkdir()
    for out, main, arguments in (
        (tmp_path / "a", bpe.main, [str(tmp_path / "a"), str(corpus), "--size", "257"]),
        (tmp_path / "b", report.main, [str(policy_run), "--out", str(tmp_path / "b")]),
        (data / "helpdesk-test.jsonl", helpdesk_data.main, [str(data)]),
    ):
        out.write_bytes(b"mine")
        before = contents(tmp_path)
        assert exit_line(capsys, main, arguments) == (
            f"error: {out}: already exists; name another file, or add --force to replace it\n"
        )
        assert contents(tmp_path) == before
        assert exit_line(capsys, main, [*arguments, "--force"]) == ""
        assert out.read_bytes() != b"mine"


def test_an_earlier_report_is_replaced_and_another_page_is_not(policy_run, capsys):
    page = policy_run / "report.html"
    try:
        for _ in range(2):
            assert exit_line(capsys, report.main, [str(policy_run)]) == ""
        page.write_text("<!doctype html> mine")
        assert "already exists" in exit_line(capsys, report.main, [str(policy_run)])
        assert page.read_text() == "<!doctype html> mine"
    finally:
        page.unlink()


def test_a_lab_writes_into_its_own_folder_only(tmp_path):
    """Its pages and pictures have fixed names, and it replaces them."""
    for _ in range(2):
        common.lab_folder(str(tmp_path / "new"))
    (tmp_path / "mine.md").write_text("mine")
    with pytest.raises(UserError, match="not a lab's; use a new folder"):
        common.lab_folder(str(tmp_path))


# ---- forks ---------------------------------------------------------------------------------------


def test_a_forked_process_does_not_keep_the_lock(tmp_path):
    """A reward function may start processes that run longer than the run."""
    lock = lock_file(tmp_path / ".lock", "busy")
    pid = os.fork()
    if pid == 0:
        time.sleep(60)
        os._exit(0)
    try:
        with pytest.raises(UserError, match="busy"):
            lock_file(tmp_path / ".lock", "busy")
        lock.close()
        deadline = time.monotonic() + 10  # the fork may need a moment to close it
        while True:
            try:
                lock_file(tmp_path / ".lock", "busy").close()
                break
            except UserError:
                assert time.monotonic() < deadline
                time.sleep(0.01)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
