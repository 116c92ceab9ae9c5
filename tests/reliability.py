"""Reliability tests: kill processes, damage files, let writes fail, and compare the results.

    python -m tests.reliability NAME [--count N] [--seed N]

NAME: kill, stop, corrupt, fault, tmpfs, fuzz, soak, cost, or brief for a few cases of most.

The processes are forks of this one. They need not import torch again, so a start takes
milliseconds. All random choices are functions of the seed and the number of the case.
The exit status is 1 after the first case that fails. tmpfs needs root; soak needs Linux.
"""

import argparse
import builtins
import errno
import functools
import gzip
import io
import itertools
import json
import os
import pty
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import train_policy  # noqa: E402
import train_reward  # noqa: E402
from minirlhf.config import PolicyConfig, RewardConfig  # noqa: E402
from minirlhf.run import checkpoint  # noqa: E402
from minirlhf.run import run as run_module  # noqa: E402
from minirlhf.run.errors import UserError  # noqa: E402
from minirlhf.run.metrics import Metrics  # noqa: E402

import tiny  # noqa: E402
import torch._dynamo  # noqa: E402  (otherwise each fork would import it, which takes a second)
from test_data import byte_tokenizer, mutated_file, outcome_of_file  # noqa: E402

FULL = dict(
    kill=200, stop=200, corrupt=1000, fault=200, tmpfs=20, fuzz=10_000, soak=20_000, cost=20
)
BRIEF = dict(
    kill=16, stop=10, corrupt=60, fault=16, tmpfs=3, fuzz=300, soak=600
)  # short enough for CI
MACOS = sys.platform == "darwin"  # its ru_maxrss is in bytes, not in units of 1024 bytes
WAIT = 300  # seconds after which a process counts as hanging


# ---- processes -----------------------------------------------------------------------------------


class Ending(NamedTuple):
    """How a process ended."""

    status: int  # the exit status, or minus the number of the signal that ended it
    out: str
    err: str


def fork(
    action,
    folder: Path,
    kill_after: float | None = None,
    wait: int = WAIT,
    signals=(signal.SIGKILL,),
) -> Ending:
    """Call action() in a forked process that works in `folder`. Returns how the process ended.

    kill_after: seconds until the signals, None for none.  wait: seconds until SIGALRM.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if pid == 0:
            status = 70
            try:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                sys.stdout = open(1, "w", buffering=1, closefd=False)
                sys.stderr = open(2, "w", buffering=1, closefd=False)
                os.chdir(folder)
                signal.alarm(wait)
                status = action() or 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        if kill_after is not None:
            time.sleep(kill_after)
            for number in signals:
                os.kill(pid, number)
                time.sleep(0.1 * (number == signal.SIGSTOP))
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return Ending(status, *texts)


REWARD = (train_reward.main, RewardConfig)
POLICY = (train_policy.main, PolicyConfig)
SCRIPTS = ((REWARD, "reward"), (POLICY, "policy"))  # with the folders of undisturbed runs


def script(which, flags: list[str]):
    """A function that runs a script and returns its exit status. which: REWARD or POLICY."""
    return functools.partial(tiny.ending, *which, flags)


def new_run(which, out: str):
    return script(which, settings(out)[which])


def resume(which, out: str):
    return script(which, ["--out", out, "--resume", *tiny.MODULES])


def resume_or_restart(which, out: str, folder: Path):
    """Resume the run folder/out if it has a configuration, otherwise start it again."""
    started = (folder / out / "config.json").exists()
    return resume(which, out) if started else new_run(which, out)


def settings(out: str, reward_run: str = "reward"):
    """The flags of both scripts; everything that has a state is on, and checkpoints are frequent.

    All paths are relative to one folder.
    """
    reward = tiny.reward_config(Path(), out, sft_sequences=256, epochs=8, save_every=3)
    policy = tiny.policy_config(
        Path(reward_run),
        out,
        iterations=12,
        kl_target=0.01,
        kl_horizon=20,
        eval_every=4,
        save_every=2,
        best_of_n=2,
    )
    return {REWARD: tiny.as_flags(reward), POLICY: tiny.as_flags(policy)}


def check(condition: bool, case: object, *evidence: object) -> None:
    """Exit with the case and the evidence if the condition is false."""
    if not condition:
        raise SystemExit("\n".join(map(str, ("FAILED", case, *evidence))))


def refusal(ending: Ending) -> bool:
    """Whether the process ended with one error line, exit status 2 and no traceback."""
    lines = ending.err.splitlines()
    return (
        ending.status == 2
        and len(lines) == 1
        and lines[0].startswith("error: ")
        and "Traceback" not in ending.out
    )


# ---- the files of a run --------------------------------------------------------------------------


def undisturbed_runs(folder: Path) -> None:
    """Write the inputs to `folder`, and run both scripts there: runs "reward" and "policy"."""
    tiny.write_inputs(folder)
    for which, name in SCRIPTS:
        ending = fork(new_run(which, name), folder)
        check(ending.status == 0, f"undisturbed {name} run", *ending)


def same_tensors(a, b) -> bool:
    """Whether two nested structures have bit-identical tensors and equal other values."""
    if isinstance(a, dict) or isinstance(a, list):
        keys = a if isinstance(a, dict) else range(len(a))
        return (
            type(a) is type(b)
            and len(a) == len(b)
            and all(same_tensors(a[key], b[key]) for key in keys)
        )
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(
            *(x.contiguous().flatten().view(torch.uint8) for x in (a, b))
        )
    return a == b


def file_names(root: Path) -> set[str]:
    """The run's files, relative to its folder, except its lock and renamed damaged files."""
    return {
        str(path.relative_to(root))
        for path in root.rglob("*")
        if path.is_file() and path.name != ".lock" and not path.name.endswith(".damaged")
    }


def check_resumed(which, name: str, home: Path, case) -> None:
    """Resume the run of this case: it must end like the undisturbed one. Then remove it."""
    ending = fork(resume_or_restart(which, "run", home), home)
    check(ending.status == 0, case, "resumed", *ending)
    differs = difference(home / "run", home / name)
    check(not differs, case, f"ended with another {differs}")
    shutil.rmtree(home / "run")


def difference(folder: Path, undisturbed: Path, rows_lost: bool = False) -> str:
    """The first file in which a run differs from the undisturbed one, "" if there is none.

    Compares models, checkpoints with their optimizer states, samples, results and metrics, except
    wall-clock values. rows_lost: the first rows of metrics may be missing.
    """
    ours = file_names(folder)
    theirs = file_names(undisturbed)
    saved = [{name for name in names if name.startswith("checkpoints")} for names in (ours, theirs)]
    newest = {name.rsplit("-", 1)[0]: name for name in sorted(saved[1])}
    # A stop saves a checkpoint of its own step, which may take the place of an older one.
    # A process can end after it saved a checkpoint and before it deleted the old one.
    other = saved[0] ^ saved[1]
    if ours ^ theirs != other or other & set(newest.values()) or len(saved[0]) < len(saved[1]):
        return f"files: {sorted(ours ^ theirs)}"
    for name in sorted(ours & theirs):
        if not same_content(folder / name, undisturbed / name, rows_lost):
            return name
    return ""


def same_content(ours: Path, theirs: Path, rows_lost: bool) -> bool:
    """difference() for one file."""
    if ours.suffix == ".pt":
        kind = ours.name.split("-")[0].removesuffix(".pt")
        loaded = [checkpoint.load_checkpoint(path, kind) for path in (ours, theirs)]
        for meta, _ in loaded if rows_lost else ():
            meta.pop("metrics", None)
        return all(map(same_tensors, *loaded))
    if ours.suffix == ".jsonl":
        rows = tiny.rows(ours)
        expected = tiny.rows(theirs)
        return rows == (expected[len(expected) - len(rows) :] if rows_lost else expected)
    if ours.name == "config.json":
        a, b = (json.loads(path.read_text())["settings"] for path in (ours, theirs))
        return dict(a, out="") == dict(b, out="")
    return ours.read_bytes() == theirs.read_bytes()


def durations(home: Path) -> dict:
    """script -> seconds of an undisturbed run."""
    seconds = {}
    for which, name in SCRIPTS:
        start = time.monotonic()
        check(fork(new_run(which, "timed"), home).status == 0, f"timing the {name} run")
        seconds[which] = time.monotonic() - start
        shutil.rmtree(home / "timed")
    return seconds


# ---- kill ----------------------------------------------------------------------------------------


def kill(count: int, seed: int, home: Path) -> str:
    """Kill a run at random times and resume it until it is complete; compare it."""
    undisturbed_runs(home)
    duration = durations(home)
    kills = Counter()
    during_save = 0
    complete = 0
    for number in itertools.count():
        which, name = SCRIPTS[number % 2]
        if kills.total() >= count:
            break
        if kills[name] >= count / 2:
            continue
        rng = random.Random(f"{seed} {number}")
        starts = 0
        while True:
            starts += 1
            longest = duration[which] * (0.6 if starts <= 30 else 2)
            action = resume_or_restart(which, "run", home)
            ending = fork(action, home, kill_after=rng.uniform(0, longest))
            if ending.status != -signal.SIGKILL:
                break
            kills[name] += 1
            during_save += any((home / "run").rglob("*.partial"))
        check(ending.status == 0, f"run {number}, {name}, start {starts}", *ending)
        differs = difference(home / "run", home / name)
        check(not differs, f"run {number}, {name}, {starts - 1} kills: differs in {differs}")
        shutil.rmtree(home / "run")
        complete += 1
    return (
        f"{kills.total()} kills ({kills['reward']} of train_reward.py, {kills['policy']} of "
        f"train_policy.py; {during_save} during a save); "
        f"all {complete} runs ended bit-identical to the undisturbed one"
    )


# ---- signals that end a run in order -------------------------------------------------------------

STOPS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGSTOP and SIGCONT", "closed terminal")


def in_terminal(action, folder: Path, close_after: float) -> int:
    """Call action() in a process with a terminal of its own, which closes after some seconds.

    Returns the exit status.
    """
    pid, terminal = pty.fork()
    if pid == 0:
        status = 70
        try:
            sys.stdout = open(1, "w", buffering=1, closefd=False)
            sys.stderr = open(2, "w", buffering=1, closefd=False)
            os.chdir(folder)
            signal.alarm(WAIT)
            status = action() or 0
        except BaseException:
            Path(folder / "traceback").write_text(traceback.format_exc())
        finally:
            os._exit(status)
    end = time.monotonic() + close_after
    while (left := end - time.monotonic()) > 0:  # read, or the process would wait
        if select.select([terminal], [], [], left)[0]:
            try:
                os.read(terminal, 65536)
            except OSError:  # the process has ended
                break
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def stop(count: int, seed: int, home: Path) -> str:
    """Stop a run at a random time by a signal or a closed terminal, and resume it.

    It must end with one line and the right status, and the resumed run must be bit-identical to
    the undisturbed one. Times include evaluations and the last saves.
    """
    undisturbed_runs(home)
    # as in a program of the project, see minirlhf/__init__.py
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    endings = Counter()
    duration = durations(home)
    for number in range(count):
        which, name = SCRIPTS[number % 2]
        how = STOPS[number % len(STOPS)]
        rng = random.Random(f"{seed} {number}")
        delay = rng.uniform(0.02, 1.0) * duration[which]
        case = f"case {number}: {name}, {how} after {delay:.2f} s"
        if how == "closed terminal":
            status = in_terminal(new_run(which, "run"), home, delay)
            check(status in (0, -signal.SIGHUP, 128 + signal.SIGHUP), case, status)
            check(not (home / "traceback").exists(), case)
        else:
            signals = [getattr(signal, word) for word in how.split(" and ")]
            ending = fork(new_run(which, "run"), home, delay, signals=signals)
            status = ending.status
            allowed = (0,) if len(signals) > 1 else (0, -signals[0], 128 + signals[0])
            check(status in allowed and "Traceback" not in ending.out + ending.err, case, *ending)
            lines = [line for line in ending.err.splitlines() if "stopping after" not in line]
            expected = "error: stopped; " if status > 0 else ""
            check("".join(lines).startswith(expected) and len(lines) <= 2, case, *ending)
        endings["complete" if status == 0 else "in order" if status > 0 else "at once"] += 1
        check_resumed(which, name, home, case)
    counts = ", ".join(f"{n} {ending}" for ending, n in endings.items())
    return (
        f"{count} runs stopped by {len(STOPS)} kinds of signals: they ended {counts}; all resumed "
        "runs ended bit-identical to the undisturbed one"
    )


# ---- corruption ----------------------------------------------------------------------------------


def damaged(rng: random.Random, content: bytes, other: bytes) -> bytes:
    """The content after a random damage; it is never equal to the content.

    Bits are flipped, bytes cut, overwritten or shifted, or the content of another file is used.
    """
    size = len(content)
    result = bytearray(content)
    action = rng.choice(
        ["flip"] * 6
        + ["cut"] * 3
        + ["overwrite", "zero", "insert", "remove", "append", "empty", "other"]
    )
    start = rng.randrange(size) if size else 0
    end = min(size, start + rng.randrange(1, 2 ** rng.randrange(1, 12)))
    if action == "flip" and size:
        for place in rng.choices(range(size), k=rng.choice((1, 1, 1, 2, 8))):
            result[place] ^= 1 << rng.randrange(8)
    elif action in ("overwrite", "zero", "remove", "insert"):
        result[start : end if action != "insert" else start] = {
            "overwrite": rng.randbytes(end - start),
            "insert": rng.randbytes(rng.randrange(1, 99)),
            "zero": bytes(end - start),
            "remove": b"",
        }[action]
    elif action == "append":
        result += rng.randbytes(rng.randrange(1, 99))
    else:
        result = {"other": other}.get(action, content[:start] if action == "cut" else b"")
    return bytes(result) if bytes(result) != content else content + b"\0"


def loads(path: Path) -> bool:
    """Whether the checkpoint is accepted."""
    try:
        return bool(checkpoint.load_checkpoint(path, path.name.split("-")[0]))
    except UserError:
        return False


def stopped_runs(home: Path) -> dict[str, tuple]:
    """Runs to resume, next to the undisturbed ones.

    Returns folder -> (script, folder of the undisturbed run that it must be equal to).
    "new" is a run that is not started yet.
    """

    def stop_after(row, which, flags):
        def action():
            write = Metrics.write
            written = []

            def counting_write(metrics, entry):
                write(metrics, entry)
                written.append(entry)
                if len(written) == row:
                    os.kill(os.getpid(), signal.SIGTERM)

            Metrics.write = counting_write
            return tiny.ending(*which, flags)

        return action

    for name, which, row in (
        ("stopped-sft", REWARD, 20),
        ("stopped-reward", REWARD, 50),
        ("stopped-policy", POLICY, 8),
    ):
        ending = fork(stop_after(row, which, settings(name)[which]), home)
        check(ending.status == 128 + signal.SIGTERM, name, *ending)
    return {
        "stopped-sft": (REWARD, "reward"),
        "stopped-reward": (REWARD, "reward"),
        "reward": (REWARD, "reward"),
        "stopped-policy": (POLICY, "policy"),
        "policy": (POLICY, "policy"),
        "new": (POLICY, "policy"),
    }


def corrupt(count: int, seed: int, home: Path) -> str:
    """Damage one file of a run folder or of the run's inputs, then resume the run.

    It must be refused in one line, or end bit-identical to the undisturbed run.
    """
    intact = home / "intact"
    intact.mkdir()
    undisturbed_runs(intact)
    runs = stopped_runs(intact)
    outcomes = Counter()
    kinds = Counter()
    work = home / "work"
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        run = rng.choice(list(runs))
        which, undisturbed = runs[run]
        shutil.copytree(intact, work)
        inputs = [work / "pairs.jsonl", work / "bytes.tiktoken"]
        if which is POLICY:
            inputs += sorted((work / "reward").rglob("*"))
        own = sorted((work / run).rglob("*")) if run != "new" else []
        files = [path for path in (own * 3 + inputs) if path.is_file()]
        victim = rng.choice(files)
        other = rng.choice(files).read_bytes()
        before = victim.read_bytes()
        bad = damaged(rng, before, other)
        victim.write_bytes(bad)
        ending = fork(new_run(which, run) if run == "new" else resume(which, run), work)
        case = f"case {number}: {run}, {victim.relative_to(work)}"
        check(ending.status in (0, 2) and "Traceback" not in ending.out + ending.err, case, *ending)
        if ending.status == 2:
            check(refusal(ending), case, *ending)
            outcome = "refused"
        else:
            is_checkpoint = victim.parent.name == "checkpoints"
            if is_checkpoint and victim.exists() and victim.read_bytes() == bad:
                # an older checkpoint, which the run did not need
                check(bad == other or not loads(victim), case, "is accepted")
                victim.write_bytes(before)
            warning = f"warning: {run}/{victim.name}: damaged"
            rows_lost = victim.suffix == ".jsonl" and warning in ending.out
            differs = difference(work / run, intact / undisturbed, rows_lost)
            check(not differs, case, f"ended with another {differs}", *ending)
            outcome = "skipped with a warning" if "warning: " in ending.out else "harmless"
        outcomes[outcome] += 1
        kinds[f"{victim.suffix or victim.name} {outcome}"] += 1
        shutil.rmtree(work)
    print("  " + ", ".join(f"{kind}: {n}" for kind, n in sorted(kinds.items())))
    counts = ", ".join(f"{n} {outcome}" for outcome, n in outcomes.items())
    return f"{count} damaged files: {counts}; no wrong resume, no traceback"


# ---- write faults --------------------------------------------------------------------------------


class Disk:
    """Counts a process's operations on the disk; the number-th one fails.

    kind: "short write", "ENOSPC" or "EIO".  sticky: all later operations fail too.
    """

    def __init__(self, number: int, kind: str, sticky: bool):
        self.number = number
        self.kind = kind
        self.sticky = sticky
        self.done = 0
        real_open = builtins.open
        disk = self

        class File(io.FileIO):
            def write(self, content):
                if not disk.faulty():
                    return super().write(content)
                if disk.kind == "short write":
                    return super().write(bytes(content)[: max(1, len(content) // 2)])
                super().write(bytes(content)[: len(content) // 2])
                disk.fail(self.name)

        def opened(path, mode="r", buffering=-1, **others):
            if "b" not in mode or mode == "rb":
                return real_open(path, mode, buffering, **others)
            raw = File(path, mode.replace("b", ""))
            return raw if buffering == 0 else io.BufferedWriter(raw)

        builtins.open = opened
        os.fsync = self.failing(os.fsync)
        os.replace = self.failing(os.replace)

    def faulty(self) -> bool:
        self.done += 1
        return self.done == self.number or self.sticky and self.done > self.number

    def fail(self, name=None):
        code = errno.EIO if self.kind == "EIO" else errno.ENOSPC
        raise OSError(code, os.strerror(code), name)

    def failing(self, function):
        def call(*arguments):
            if self.faulty() and self.kind != "short write":
                self.fail(*arguments[1:])
            return function(*arguments)

        return call


def note_saves(path: Path) -> None:
    """Append folder, kind and step of every completely saved checkpoint to a file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)  # Disk does not affect it

    def noting_save(folder, kind, meta, states, keep):
        checkpoint.save_step(folder, kind, meta, states, keep)
        os.write(descriptor, f"{folder} {kind} {meta['step']}\n".encode())

    run_module.save_step = noting_save


def assert_saves_load(notes: Path, home: Path, case: str) -> int:
    """Check that the newest noted checkpoint, or a newer one, can be loaded. Returns its step."""
    if not notes.exists() or not (lines := notes.read_text().splitlines()):
        return 0
    folder, kind, step = lines[-1].rsplit(" ", 2)
    paths = (home / folder).glob(f"{kind}-*.pt")
    steps = [checkpoint.load_checkpoint(path, kind)[0]["step"] for path in paths]  # or raises
    check(max(steps, default=0) >= int(step), case, f"step {step} was saved, but there is {steps}")
    notes.unlink()
    return max(steps)


def fault(count: int, seed: int, home: Path) -> str:
    """Let one write, flush or rename fail, or write too little; then resume the run.

    The failure must be one line, every checkpoint must load, and the resumed run must be
    bit-identical to the undisturbed one.
    """
    undisturbed_runs(home)
    operations = {}
    for which, _ in SCRIPTS:

        def counted(which=which):
            disk = Disk(0, "", False)
            tiny.ending(*which, settings("counted")[which])
            os.write(2, f"{disk.done}".encode())

        operations[which] = int(fork(counted, home).err)
        shutil.rmtree(home / "counted")
    with_checkpoint = 0
    kinds = Counter()
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        which, name = SCRIPTS[number % 2]
        kind = rng.choice(["short write", "ENOSPC", "ENOSPC", "EIO"])
        sticky = rng.random() < 0.5
        place = rng.randrange(1, operations[which] + 1)
        case = (
            f"case {number}: {name}, operation {place} of {operations[which]}, {kind}, "
            f"{'sticky' if sticky else 'once'}"
        )

        def action(which=which, place=place, kind=kind, sticky=sticky):
            note_saves(home / "notes")
            Disk(place, kind, sticky)
            return tiny.ending(*which, settings("run")[which])

        ending = fork(action, home)
        check(ending.status == 0 and kind == "short write" or refusal(ending), case, *ending)
        kinds[kind] += 1
        with_checkpoint += assert_saves_load(home / "notes", home, case) > 0
        check_resumed(which, name, home, case)
    counts = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
    return (
        f"{count} write faults ({counts}); in {with_checkpoint} cases a checkpoint had been saved, "
        "and it loads; all resumed runs ended bit-identical"
    )


def tmpfs(count: int, seed: int, home: Path) -> str:
    """Fill a small file system, then enlarge it and resume the run."""
    if os.geteuid() != 0:
        return "skipped: mounting needs root"
    undisturbed_runs(home)
    mounted = home / "mounted"
    mounted.mkdir()

    def mount(options):
        return subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", mounted],
            capture_output=True,
            text=True,
        )

    with_checkpoint = 0
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        which, name = SCRIPTS[number % 2]
        used = sum(path.stat().st_size for path in (home / name).rglob("*") if path.is_file())
        result = mount(f"size={rng.randrange(8192, int(used * 0.95))}")
        if result.returncode:
            return f"skipped: no tmpfs can be mounted here ({result.stderr.strip()})"
        try:

            def action(which=which):
                note_saves(home / "notes")
                return tiny.ending(*which, settings("mounted/run")[which])

            ending = fork(action, home)
            check(refusal(ending) and "No space left" in ending.err, f"case {number}", *ending)
            with_checkpoint += assert_saves_load(home / "notes", home, f"case {number}") > 0
            check(mount("remount,size=64m").returncode == 0, f"case {number}", "cannot be enlarged")
            ending = fork(resume_or_restart(which, "mounted/run", home), home)
            check(ending.status == 0, f"case {number}, resumed", *ending)
            differs = difference(mounted / "run", home / name)
            check(not differs, f"case {number} ended with another {differs}")
        finally:
            subprocess.run(["umount", mounted], check=True)
    return (
        f"{count} full file systems: one line each; in {with_checkpoint} cases a checkpoint had "
        "been saved, and it loads; all resumed runs ended bit-identical"
    )


# ---- hostile preference files --------------------------------------------------------------------


def huge(rng: random.Random) -> tuple[str, bytes]:
    """A file with a token of 10 MB, a million levels deep, or a thousand times larger unpacked."""
    million = 10**6
    record = b'{"prompt": "b 3:", "chosen": " bb", "rejected": " b"}\n'
    hostile = rng.choice(
        [
            lambda: b'{"prompt": "' + b"a" * 10 * million + b'", "chosen": "x", "rejected": "y"}\n',
            lambda: (
                b'{"prompt": "b", "chosen": "' + b"\\ud800" * million + b'", "rejected": "y"}\n'
            ),
            lambda: (
                b'{"prompt": "b", "chosen": "x", "rejected": "y", "weight": '
                + b"9" * 10 * million
                + b"}\n"
            ),
            lambda: (
                b'{"prompt": "b", "chosen": "x", "rejected": "y", "weight": 1e'
                + b"9" * 10 * million
                + b"}\n"
            ),
            lambda: b"[" * 10 * million,
            lambda: b'{"a":' * million,
            lambda: b"[" + b"[" * million + b"]" * million + b"]",
            lambda: b" " * 10 * million + record,
            lambda: b"\n" * 10 * million + record,
            lambda: b"\0" * 10 * million,
            lambda: (
                b'{"prompt": "b", "responses": ['
                + b'"x",' * million
                + b'"y"], "preferences": [[0, 1000000]]}\n'
            ),
            lambda: b"[" + record * 3 + b"x" * 10 * million,
            lambda: record + b"\xff" * 10 * million + b"\n" + record,
            lambda: b"[" + b",".join([record.strip()] * 20_000) + b"]",
            lambda: b'{"prompt": "b", ' + b'"k": 1, ' * million + b'"x": 1}',
        ]
    )()
    if rng.random() < 0.3:
        return "x.jsonl.gz", gzip.compress(hostile, 1)
    if rng.random() < 0.1:
        return "x.jsonl.gz", gzip.compress(b"a" * 200 * million, 1)
    return "x.jsonl", hostile


def fuzz(count: int, seed: int, home: Path) -> str:
    """Read mutated preference files of every format.

    Each is accepted, or refused in one line, within 10 seconds and 1 GB.
    """

    def read_files(first, last):
        encoding = byte_tokenizer(str(home))
        outcomes = Counter()
        slowest = 0.0
        for number in range(first, last):
            rng = random.Random(f"{seed} {number}")
            start = time.process_time()
            signal.setitimer(signal.ITIMER_PROF, 10)  # seconds of this process only
            name, content = huge(rng) if number % 50 == 0 else mutated_file(rng)
            path = home / name
            path.write_bytes(content)
            print(number, flush=True)
            outcomes += outcome_of_file(path, encoding)
            slowest = max(slowest, time.process_time() - start)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if MACOS else 1024)
        print(json.dumps(dict(outcomes=outcomes, slowest=slowest, memory=memory)))

    total = Counter()
    slowest = 0.0
    memory = 0
    for first in range(0, count, 500):
        action = functools.partial(read_files, first, min(first + 500, count))
        ending = fork(action, home, wait=3600)
        last = (ending.out.splitlines() or ["0"])[-1]
        problem = "hangs" if ending.status == -signal.SIGPROF else "fails"
        check(ending.status == 0, f"file {last} {problem}", ending.status, ending.err)
        result = json.loads(last)
        total += Counter(result["outcomes"])
        slowest = max(slowest, result["slowest"])
        memory = max(memory, result["memory"])
    check(memory < 1e9, f"{memory / 1e6:.0f} MB of memory")
    counts = ", ".join(f"{n} {kind}" for kind, n in sorted(total.items()))
    return (
        f"{count} files, each read strictly and with --skip-bad-lines: {counts}; "
        f"slowest {slowest:.1f} s, at most {memory / 1e6:.0f} MB, torch included"
    )


# ---- soak and cost -------------------------------------------------------------------------------


def soak(count: int, seed: int, home: Path) -> str:
    """Run many iterations in one process; memory, open files and the keys of rows must not grow."""
    undisturbed_runs(home)
    every = max(1, count // 100)

    def action():
        write = Metrics.write
        page = os.sysconf("SC_PAGE_SIZE")
        samples = os.open(home / "samples", os.O_WRONLY | os.O_CREAT)

        def measuring_write(metrics, row):
            write(metrics, row)
            if row["step"] % every == 0:
                resident = int(Path("/proc/self/statm").read_text().split()[1]) * page
                open_files = len(os.listdir("/proc/self/fd"))
                os.write(samples, f"{row['step']} {resident} {open_files}\n".encode())

        Metrics.write = measuring_write
        config = tiny.policy_config(
            Path("reward"),
            "soaked",
            iterations=count,
            save_every=10,
            eval_every=100,
            lr=1e-4,
            kl_target=1.0,
            seed=seed,
        )
        return tiny.ending(*POLICY, tiny.as_flags(config))

    ending = fork(action, home, wait=3600)
    check(ending.status == 0, "soak", ending.status, ending.err, ending.out[-2000:])
    lines = (home / "samples").read_text().splitlines()
    _, memory, open_files = zip(*(map(int, line.split()) for line in lines), strict=True)
    early = len(lines) // 10  # caches fill in the first tenth
    growth = max(memory[early:]) / memory[early] - 1
    check(growth <= 0.05, f"memory grew by {growth:.1%}", memory)
    check(max(open_files[early:]) <= open_files[early] * 1.05, "open files", open_files)
    rows = tiny.rows(home / "soaked" / "policy_metrics.jsonl")
    kinds = Counter(
        tuple((key, type(value).__name__) for key, value in row.items()) for row in rows
    )
    check([row["step"] for row in rows] == list(range(count + 1)), "rows are missing or doubled")
    # the row of step 0, rows with an evaluation, and all others
    check(len(kinds) == 3, "the keys or types of the metrics change", *kinds)
    first = memory[early] / 1e6
    last = max(memory[early:]) / 1e6
    return (
        f"{count} iterations: memory {first:.0f} MB after a tenth, at most {last:.0f} MB later "
        f"({growth:+.1%}); open files {open_files[early]}, at most {max(open_files[early:])}; "
        f"{len(rows)} rows with the same keys and types"
    )


def cost(count: int, seed: int, home: Path) -> str:
    """The share of a default run's time that saving takes."""
    data = [str(tiny.ROOT / "data" / f"helpdesk-{name}.jsonl") for name in ("validation", "test")]
    reward = RewardConfig(
        data=(data[0],),
        heldout_data=(data[1],),
        task="minirlhf.data.helpdesk",
        sft_sequences=4096,
        out="reward",
    )
    policy = PolicyConfig(
        reward_run="reward",
        out="policy",
        iterations=count,
        eval_every=count,
        test_prompts=16,
        best_of_n=0,
    )

    def action():
        spent = []

        def timed(function):
            def call(*arguments):
                start = time.perf_counter()
                result = function(*arguments)
                spent.append(time.perf_counter() - start)
                return result

            return call

        status = tiny.ending(*REWARD, tiny.as_flags(reward))
        run_module.save_step = timed(checkpoint.save_step)
        Metrics.mark = timed(Metrics.mark)
        status = status or tiny.ending(*POLICY, tiny.as_flags(policy))
        os.write(2, json.dumps(sum(spent)).encode())
        return status

    ending = fork(action, home, wait=1200)
    check(ending.status == 0, "cost", *ending)
    saving = json.loads(ending.err.splitlines()[-1])
    rows = [
        json.loads(line)
        for line in (home / "policy" / "policy_metrics.jsonl").read_text().splitlines()[1:]
    ]
    working = sum(
        value
        for row in rows
        for key, value in row.items()
        if key.startswith("seconds") and key != "seconds_evaluate"
    )
    check(saving < 0.03 * working, f"saving takes {saving:.2f} s of {working:.2f} s")
    each = saving / (count / policy.save_every) * 1000
    return (
        f"saving every {policy.save_every} iterations: {each:.0f} ms for each save, "
        f"{saving:.2f} s in {count} default iterations, which take {working:.1f} s without "
        f"evaluations: {saving / working:.2%}"
    )


TESTS = dict(
    kill=kill, stop=stop, corrupt=corrupt, fault=fault, tmpfs=tmpfs, fuzz=fuzz, soak=soak, cost=cost
)


def run_test(name: str, count: int, seed: int = 0) -> str:
    """The result of one test in a temporary folder, and its seconds.

    Raises SystemExit for the first case that fails.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as home:
        result = TESTS[name](count, seed, Path(home))
    return f"{name}: {result}  [{time.monotonic() - start:.0f} s]"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("test", choices=[*TESTS, "brief"])
    parser.add_argument("--count", type=int, help="number of cases (default: see FULL, BRIEF)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    counts = BRIEF if given.test == "brief" else {given.test: FULL[given.test]}
    for test, count in counts.items():
        print(run_test(test, given.count or count, given.seed), flush=True)
