"""Crashes, damaged files, hostile input: processes are killed, files damaged, writes made to fail, and the outcome compared.

    python -m tests.reliability kill|corrupt|fault|tmpfs|fuzz|soak|cost|brief [--count N] [--seed N]

What a test does to a process it does to a fork of this one, which has imported torch already: a life costs milliseconds, and
its death is real. Every random choice derives from the seed and the number of the case. Exit status 1 with the first case
that fails. tmpfs needs root; soak reads /proc, so Linux.
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
import random
import resource
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

import tiny  # noqa: E402
import torch._dynamo  # noqa: E402  (the first optimiser of a process imports it, for a second)
from test_data import byte_tokenizer, mutated_file, outcome_of_file  # noqa: E402

import train_policy  # noqa: E402
import train_reward  # noqa: E402
from minirlhf import checkpoint  # noqa: E402
from minirlhf.config import PolicyConfig, RewardConfig, UserError  # noqa: E402
from minirlhf.log import Metrics  # noqa: E402

FULL = dict(kill=200, corrupt=1000, fault=200, tmpfs=20, fuzz=10_000, soak=20_000, cost=20)
BRIEF = dict(kill=16, corrupt=60, fault=16, tmpfs=3, fuzz=300, soak=600)  # what CI has the time for
MACOS = sys.platform == "darwin"  # where memory is counted in bytes
WAIT = 300  # seconds after which a process counts as hanging


# ---- processes -------------------------------------------------------------------------------------------------------


class Ending(NamedTuple):
    status: int  # exit status, or minus the signal that ended it
    out: str
    err: str


def fork(action, folder: Path, kill_after: float | None = None, wait: int = WAIT) -> Ending:
    """What becomes of a process that calls action() in `folder` and is killed after so many seconds, if it still lives."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if pid == 0:
            status = 70
            try:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
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
            os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return Ending(status, *texts)


REWARD, POLICY = (train_reward.main, RewardConfig), (train_policy.main, PolicyConfig)


def script(which, flags: list[str]):
    return functools.partial(tiny.ending, *which, flags)


def resume(which, out: str, *more: str):
    return script(which, ["--out", out, "--resume", *more])


def settings(out: str, reward_run: str = "reward"):
    """Both scripts with everything that has a state, a checkpoint every step or two; all paths relative to one folder."""
    reward = tiny.reward_config(Path(), out, warmup_sequences=256, epochs=8, save_every=3)
    policy = tiny.policy_config(Path(reward_run), out, iterations=12, kl_target=0.01, kl_horizon=20, eval_every=4, save_every=2,
                                best_of_n=2)
    return {REWARD: tiny.as_flags(reward), POLICY: tiny.as_flags(policy)}


def check(condition: bool, case: object, *evidence: object) -> None:
    if not condition:
        raise SystemExit("\n".join(map(str, ("FAILED", case, *evidence))))


def refusal(ending: Ending) -> bool:
    """One line that says what is wrong, exit status 2, no traceback."""
    lines = ending.err.splitlines()
    return ending.status == 2 and len(lines) == 1 and lines[0].startswith("error: ") and "Traceback" not in ending.out


# ---- what a run left -------------------------------------------------------------------------------------------------


def whole_runs(folder: Path) -> None:
    """In `folder`: the inputs, and an undisturbed run of each script, "reward" and "policy"."""
    tiny.write_inputs(folder)
    for which, name in ((REWARD, "reward"), (POLICY, "policy")):
        ending = fork(script(which, settings(name)[which]), folder)
        check(ending.status == 0, f"undisturbed {name} run", *ending)


def same_tensors(a, b) -> bool:
    """Bit for bit, whatever they are nested in."""
    if isinstance(a, dict) or isinstance(a, list):
        keys = a if isinstance(a, dict) else range(len(a))
        return type(a) is type(b) and len(a) == len(b) and all(same_tensors(a[key], b[key]) for key in keys)
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(*(x.contiguous().flatten().view(torch.uint8) for x in (a, b)))
    return a == b


def difference(folder: Path, whole: Path, rows_lost: bool = False) -> str:
    """The first file in which a run differs from the undisturbed one, "" if there is none: models, checkpoints with their
    optimiser states, samples, results, and rows of metrics but for the wall clock. rows_lost: the first rows may be missing."""
    names = [{str(path.relative_to(root)) for path in root.rglob("*")
              if path.is_file() and path.name != ".lock" and not path.name.endswith(".damaged")}
             for root in (folder, whole)]
    more = {name for name in names[0] - names[1] if name.startswith("checkpoints")}  # it ended between a save and a deletion
    if names[0] - more != names[1]:
        return f"files: {sorted(names[0] ^ names[1])}"
    for name in sorted(names[1]):
        ours, theirs = folder / name, whole / name
        if name.endswith(".pt"):
            kind = ours.name.split("-")[0].removesuffix(".pt")
            loaded = [checkpoint.load_checkpoint(path, kind) for path in (ours, theirs)]
            for meta, _ in loaded if rows_lost else ():
                meta.pop("metrics", None)
            same = all(map(same_tensors, *loaded))
        elif name.endswith(".jsonl"):
            found, wanted = tiny.rows(ours), tiny.rows(theirs)
            same = found == (wanted[len(wanted) - len(found):] if rows_lost else wanted)
        elif name == "config.json":
            stored = [json.loads(path.read_text()) for path in (ours, theirs)]
            same = all(dict(s["settings"], out="") == dict(stored[0]["settings"], out="") for s in stored)
        else:
            same = ours.read_bytes() == theirs.read_bytes()
        if not same:
            return name
    return ""


# ---- kill ------------------------------------------------------------------------------------------------------------


def kill(count: int, seed: int, home: Path) -> str:
    """SIGKILL at random instants, resume, until the run ends; then it must equal the undisturbed one."""
    whole_runs(home)
    kills, cut_short, ended, life = Counter(), 0, Counter(), {}
    for which, name in ((REWARD, "reward"), (POLICY, "policy")):
        start = time.monotonic()
        check(fork(script(which, settings("timed")[which]), home).status == 0, f"timing the {name} run")
        life[which] = time.monotonic() - start
        shutil.rmtree(home / "timed")
    for number in itertools.count():
        which, name = ((REWARD, "reward"), (POLICY, "policy"))[number % 2]
        if kills.total() >= count:
            break
        if kills[name] >= count / 2:
            continue
        rng, lives = random.Random(f"{seed} {number}"), 0
        while True:
            begun = (home / "run" / "config.json").exists()
            action = resume(which, "run") if begun else script(which, settings("run")[which])
            ending = fork(action, home, kill_after=rng.uniform(0, life[which] * (0.6 if lives < 30 else 2)))
            if ending.status != -signal.SIGKILL:
                break
            kills[name], lives = kills[name] + 1, lives + 1
            cut_short += any((home / "run").rglob("*.partial"))
        check(ending.status == 0, f"run {number}, {name}, life {lives + 1}", *ending)
        differs = difference(home / "run", home / name)
        check(not differs, f"run {number}, {name}, after {lives} kills differs in {differs}")
        shutil.rmtree(home / "run")
        ended[name] += 1
    return (f"{kills.total()} kills survived ({kills['reward']} of train_reward.py, {kills['policy']} of train_policy.py; "
            f"{cut_short} in the middle of a save); all {ended.total()} runs ended bit-equal to the undisturbed one")


# ---- corruption ------------------------------------------------------------------------------------------------------


def damaged(rng: random.Random, content: bytes, other: bytes) -> bytes:
    """content with bits flipped, cut, overwritten, shifted, or exchanged for another file's; never the same."""
    size, result = len(content), bytearray(content)
    action = rng.choice(["flip"] * 6 + ["cut"] * 3 + ["overwrite", "zero", "insert", "remove", "append", "empty", "other"])
    start = rng.randrange(size) if size else 0
    end = min(size, start + rng.randrange(1, 2 ** rng.randrange(1, 12)))
    if action == "flip" and size:
        for place in rng.choices(range(size), k=rng.choice((1, 1, 1, 2, 8))):
            result[place] ^= 1 << rng.randrange(8)
    elif action in ("overwrite", "zero", "remove", "insert"):
        result[start:end if action != "insert" else start] = {
            "overwrite": rng.randbytes(end - start), "insert": rng.randbytes(rng.randrange(1, 99)), "zero": bytes(end - start),
            "remove": b""}[action]
    elif action == "append":
        result += rng.randbytes(rng.randrange(1, 99))
    else:
        result = {"other": other}.get(action, content[:start] if action == "cut" else b"")
    return bytes(result) if bytes(result) != content else content + b"\0"


def loads(path: Path) -> bool:
    try:
        return bool(checkpoint.load_checkpoint(path, path.name.split("-")[0]))
    except UserError:
        return False


def stopped_runs(home: Path) -> dict[str, tuple]:
    """Beside the whole runs, runs to go on with. name -> (script, folder it stands in, what it must end as)."""
    def stop_after(row, which, flags):
        def action():
            write, written = Metrics.write, []

            def counting(metrics, entry):
                write(metrics, entry)
                written.append(entry)
                if len(written) == row:
                    os.kill(os.getpid(), signal.SIGTERM)
            Metrics.write = counting
            return tiny.ending(*which, flags)
        return action

    for name, which, row in (("warming", REWARD, 20), ("learning", REWARD, 50), ("policing", POLICY, 8)):
        ending = fork(stop_after(row, which, settings(name)[which]), home)
        check(ending.status == 128 + signal.SIGTERM, name, *ending)
    return dict(warming=(REWARD, "reward"), learning=(REWARD, "reward"), reward=(REWARD, "reward"), policing=(POLICY, "policy"),
                policy=(POLICY, "policy"), fresh=(POLICY, "policy"))


def corrupt(count: int, seed: int, home: Path) -> str:
    """Damage one file of a run folder, or of what it reads; then resume. Refused in one line, or ended as if undisturbed."""
    (home / "whole").mkdir()
    whole_runs(home / "whole")
    plans, outcomes, kinds = stopped_runs(home / "whole"), Counter(), Counter()
    work = home / "work"
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        plan = rng.choice(list(plans))
        which, ends_as = plans[plan]
        shutil.copytree(home / "whole", work)
        read = [work / "pairs.jsonl", work / "bytes.tiktoken"] + (sorted((work / "reward").rglob("*")) if which is POLICY else [])
        own = sorted((work / plan).rglob("*")) if plan != "fresh" else []
        files = [path for path in (own * 3 + read) if path.is_file()]
        victim, other = rng.choice(files), rng.choice(files).read_bytes()
        before = victim.read_bytes()
        bad = damaged(rng, before, other)
        victim.write_bytes(bad)
        action = script(which, settings("fresh")[which]) if plan == "fresh" else resume(which, plan)
        ending = fork(action, work)
        case = f"case {number}: {plan}, {victim.relative_to(work)}"
        check(ending.status in (0, 2) and "Traceback" not in ending.out + ending.err, case, *ending)
        if ending.status == 2:
            check(refusal(ending), case, *ending)
            outcome = "refused"
        else:
            if victim.parent.name == "checkpoints" and victim.exists() and victim.read_bytes() == bad:  # older, and not asked for
                check(bad == other or not loads(victim), case, "is taken for whole")
                victim.write_bytes(before)
            rows_lost = victim.suffix == ".jsonl" and f"warning: {plan}/{victim.name}: damaged" in ending.out
            differs = difference(work / plan, home / "whole" / ends_as, rows_lost)
            check(not differs, case, f"ended with another {differs}", *ending)
            outcome = "named and passed over" if "warning: " in ending.out else "harmless"
        outcomes[outcome] += 1
        kinds[f"{victim.suffix or victim.name} {outcome}"] += 1
        shutil.rmtree(work)
    print("  " + ", ".join(f"{kind}: {n}" for kind, n in sorted(kinds.items())))
    counts = ", ".join(f"{n} {outcome}" for outcome, n in outcomes.items())
    return f"{count} corruptions: {counts}; no wrong resume, no traceback"


# ---- write faults ----------------------------------------------------------------------------------------------------


class Disk:
    """Counts what a process does to the disk; the number-th operation goes wrong, and with `sticky` all after it."""

    def __init__(self, number: int, kind: str, sticky: bool):
        self.number, self.kind, self.sticky, self.done = number, kind, sticky, 0
        real_open, disk = builtins.open, self

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
        os.fsync, os.replace = self.failing(os.fsync), self.failing(os.replace)

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
    """Every checkpoint that this process has wholly saved is noted in a file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)  # not through a disk that fails

    def noting(folder, kind, step, *others):
        checkpoint.save_step(folder, kind, step, *others)
        os.write(descriptor, f"{folder} {kind} {step}\n".encode())
    train_reward.save_step = train_policy.save_step = noting


def assert_saves_load(notes: Path, home: Path, case: str) -> int:
    """The newest of the noted checkpoints, or a newer one, loads. Returns its step."""
    if not notes.exists() or not (lines := notes.read_text().splitlines()):
        return 0
    folder, kind, step = lines[-1].rsplit(" ", 2)
    found = [path for path in (home / folder).glob(f"{kind}-*.pt")]
    loaded = [checkpoint.load_checkpoint(path, kind)[0]["step"] for path in found]  # raises for one that is not whole
    check(max(loaded, default=0) >= int(step), case, f"step {step} was saved, of {loaded} is left")
    notes.unlink()
    return max(loaded)


def fault(count: int, seed: int, home: Path) -> str:
    """One write, flush or rename fails, or is cut: one line, every checkpoint loads, and the resumed run ends as undisturbed."""
    whole_runs(home)
    operations, kept, kinds = {}, 0, Counter()
    for which in (REWARD, POLICY):
        def counted(which=which):
            disk = Disk(0, "", False)
            tiny.ending(*which, settings("counted")[which])
            os.write(2, f"{disk.done}".encode())
        operations[which] = int(fork(counted, home).err)
        shutil.rmtree(home / "counted")
    number = failed = 0
    while failed < count:
        rng, number = random.Random(f"{seed} {number}"), number + 1
        which, name = ((REWARD, "reward"), (POLICY, "policy"))[number % 2]
        kind, sticky = rng.choice(["short write", "ENOSPC", "ENOSPC", "EIO"]), rng.random() < 0.5
        place = rng.randrange(1, operations[which] + 1)
        case = f"case {number}: {name}, operation {place} of {operations[which]}, {kind}, {'sticky' if sticky else 'once'}"

        def action(which=which, place=place, kind=kind, sticky=sticky):
            note_saves(home / "notes")
            Disk(place, kind, sticky)
            return tiny.ending(*which, settings("run")[which])
        ending = fork(action, home)
        check(ending.status == 0 and kind == "short write" or refusal(ending), case, *ending)
        failed += 1
        kinds[kind] += 1
        kept += assert_saves_load(home / "notes", home, case) > 0
        begun = (home / "run" / "config.json").exists()
        ending = fork(resume(which, "run") if begun else script(which, settings("run")[which]), home)
        check(ending.status == 0, case, "resumed", *ending)
        differs = difference(home / "run", home / name)
        check(not differs, case, f"ended with another {differs}")
        shutil.rmtree(home / "run")
    counts = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
    return (f"{failed} write faults ({counts}): in {kept} a checkpoint had been saved, and it loads; "
            "all runs ended bit-equal once resumed")


def tmpfs(count: int, seed: int, home: Path) -> str:
    """A file system of a fixed size fills up; then it is enlarged, and the run resumed."""
    if os.geteuid() != 0:
        return "left out: mounting needs root"
    whole_runs(home)
    mounted = home / "mounted"
    mounted.mkdir()

    def mount(options):
        return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", mounted], capture_output=True, text=True)

    full = kept = 0
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        which, name = ((REWARD, "reward"), (POLICY, "policy"))[number % 2]
        used = sum(path.stat().st_size for path in (home / name).rglob("*") if path.is_file())
        result = mount(f"size={rng.randrange(8192, int(used * 0.95))}")
        if result.returncode:
            return f"left out: no tmpfs can be mounted here ({result.stderr.strip()})"
        try:
            def action(which=which):
                note_saves(home / "notes")
                return tiny.ending(*which, settings("mounted/run")[which])
            ending = fork(action, home)
            check(refusal(ending) and "No space left" in ending.err, f"case {number}", *ending)
            full += 1
            kept += assert_saves_load(home / "notes", home, f"case {number}") > 0
            check(mount("remount,size=64m").returncode == 0, f"case {number}", "cannot be enlarged")
            begun = (mounted / "run" / "config.json").exists()
            ending = fork(resume(which, "mounted/run") if begun else script(which, settings("mounted/run")[which]), home)
            check(ending.status == 0, f"case {number}, resumed", *ending)
            differs = difference(mounted / "run", home / name)
            check(not differs, f"case {number} ended with another {differs}")
        finally:
            subprocess.run(["umount", mounted], check=True)
    return f"{full} full file systems: one line each, in {kept} a checkpoint had been saved, and it loads; all ended bit-equal"


# ---- hostile preference files ----------------------------------------------------------------------------------------


def huge(rng: random.Random) -> tuple[str, bytes]:
    """A file with a token of 10 MB, or nested a million deep, or unpacking to a thousand times its size."""
    million = 10 ** 6
    record = b'{"prompt": "b 3:", "chosen": " bb", "rejected": " b"}\n'
    hostile = rng.choice([
        lambda: b'{"prompt": "' + b"a" * 10 * million + b'", "chosen": "x", "rejected": "y"}\n',
        lambda: b'{"prompt": "b", "chosen": "' + b"\\ud800" * million + b'", "rejected": "y"}\n',
        lambda: b'{"prompt": "b", "chosen": "x", "rejected": "y", "weight": ' + b"9" * 10 * million + b"}\n",
        lambda: b'{"prompt": "b", "chosen": "x", "rejected": "y", "weight": 1e' + b"9" * 10 * million + b"}\n",
        lambda: b"[" * 10 * million, lambda: b'{"a":' * million, lambda: b"[" + b"[" * million + b"]" * million + b"]",
        lambda: b" " * 10 * million + record, lambda: b"\n" * 10 * million + record, lambda: b"\0" * 10 * million,
        lambda: b'{"prompt": "b", "responses": [' + b'"x",' * million + b'"y"], "preferences": [[0, 1000000]]}\n',
        lambda: b"[" + record * 3 + b"x" * 10 * million, lambda: record + b"\xff" * 10 * million + b"\n" + record,
        lambda: b"[" + b",".join([record.strip()] * 20_000) + b"]",
        lambda: b'{"prompt": "b", ' + b'"k": 1, ' * million + b'"x": 1}',
    ])()
    if rng.random() < 0.3:
        return "x.jsonl.gz", gzip.compress(hostile, 1)
    if rng.random() < 0.1:
        return "x.jsonl.gz", gzip.compress(b"a" * 200 * million, 1)
    return "x.jsonl", hostile


def fuzz(count: int, seed: int, home: Path) -> str:
    """Mutated preference files of every format: loaded clean, or refused in one line, in 10 s and 1 GB."""
    def some(first, last):
        encoding, outcomes, slowest = byte_tokenizer(str(home)), Counter(), 0.0
        for number in range(first, last):
            rng, start = random.Random(f"{seed} {number}"), time.process_time()
            signal.setitimer(signal.ITIMER_PROF, 10)  # of its own time: other processes are none of its fault
            name, content = huge(rng) if number % 50 == 0 else mutated_file(rng)
            path = home / name
            path.write_bytes(content)
            print(number, flush=True)
            outcomes += outcome_of_file(path, encoding)
            slowest = max(slowest, time.process_time() - start)
        print(json.dumps(dict(outcomes=outcomes, slowest=slowest, memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)))

    total, slowest, memory = Counter(), 0.0, 0
    for first in range(0, count, 500):
        ending = fork(functools.partial(some, first, min(first + 500, count)), home, wait=3600)
        *numbers, last = ending.out.splitlines()[-2:] or ["0"]
        check(ending.status == 0, f"file {last}: {'hangs' if ending.status == -signal.SIGPROF else ''}", *ending[::2])
        figures = json.loads(last)
        total += Counter(figures["outcomes"])
        slowest, memory = max(slowest, figures["slowest"]), max(memory, figures["memory"] * (1 if MACOS else 1024))
    check(memory < 1e9, f"{memory / 1e6:.0f} MB of memory")
    counts = ", ".join(f"{n} {kind}" for kind, n in sorted(total.items()))
    return (f"{count} files, each read strictly and with skipping: {counts}; "
            f"slowest {slowest:.1f} s, at most {memory / 1e6:.0f} MB, torch included")


# ---- soak and cost ---------------------------------------------------------------------------------------------------


def soak(count: int, seed: int, home: Path) -> str:
    """Many iterations in one process: memory, file handles and the shape of the metrics stay as they are."""
    whole_runs(home)
    every = max(1, count // 100)

    def action():
        write, page = Metrics.write, os.sysconf("SC_PAGE_SIZE")
        samples = os.open(home / "samples", os.O_WRONLY | os.O_CREAT)

        def watching(metrics, row):
            write(metrics, row)
            if row["step"] % every == 0:
                resident = int(Path("/proc/self/statm").read_text().split()[1]) * page
                os.write(samples, f"{row['step']} {resident} {len(os.listdir('/proc/self/fd'))}\n".encode())
        Metrics.write = watching
        config = tiny.policy_config(Path("reward"), "soaked", iterations=count, save_every=10, eval_every=100, lr=1e-4,
                                    kl_target=1.0, seed=seed)
        return tiny.ending(*POLICY, tiny.as_flags(config))

    ending = fork(action, home, wait=3600)
    check(ending.status == 0, "soak", ending.status, ending.err, ending.out[-2000:])
    step, memory, handles = zip(*(map(int, line.split()) for line in (home / "samples").read_text().splitlines()), strict=True)
    early = len(step) // 10  # the first tenth is for caches to fill
    growth = max(memory[early:]) / memory[early] - 1
    check(growth <= 0.05, f"memory grew by {growth:.1%}", memory)
    check(max(handles[early:]) <= handles[early] * 1.05, "file handles", handles)
    rows = tiny.rows(home / "soaked" / "policy_metrics.jsonl")
    shapes = Counter(tuple((key, type(value).__name__) for key, value in row.items()) for row in rows)
    check([row["step"] for row in rows] == list(range(count + 1)), "rows are missing or doubled")
    check(len(shapes) == 3, "the shape of the metrics drifts", *shapes)  # the opening row, plain rows, rows with an evaluation
    first, last = memory[early] / 1e6, max(memory[early:]) / 1e6
    return (f"{count} iterations: memory {first:.0f} MB after a tenth, at most {last:.0f} MB later ({growth:+.1%}); "
            f"file handles {handles[early]}, at most {max(handles[early:])}; {len(rows)} rows of one shape each kind")


def cost(count: int, seed: int, home: Path) -> str:
    """The share of a default run's iterations that goes into saving every 10 of them."""
    data = [str(tiny.ROOT / "data" / f"helpdesk-{name}.jsonl") for name in ("validation", "test")]
    reward = RewardConfig(data=(data[0],), heldout_data=(data[1],), task="minirlhf.helpdesk", warmup_sequences=4096, out="reward")
    policy = PolicyConfig(reward_run="reward", out="policy", iterations=count, eval_every=count, test_prompts=16, best_of_n=0)

    def action():
        spent = Counter()

        def timed(name, function):
            def call(*arguments):
                start = time.perf_counter()
                result = function(*arguments)
                spent[name] += time.perf_counter() - start
                return result
            return call

        status = tiny.ending(*REWARD, tiny.as_flags(reward))
        train_policy.save_step, Metrics.mark = timed("save", checkpoint.save_step), timed("save", Metrics.mark)
        status = status or tiny.ending(*POLICY, tiny.as_flags(policy))
        os.write(2, json.dumps(spent).encode())
        return status

    ending = fork(action, home, wait=1200)
    check(ending.status == 0, "cost", *ending)
    saving = json.loads(ending.err.splitlines()[-1])["save"]
    rows = [json.loads(line) for line in (home / "policy" / "policy_metrics.jsonl").read_text().splitlines()[1:]]
    working = sum(value for row in rows for key, value in row.items() if key.startswith("seconds") and key != "seconds_evaluate")
    check(saving < 0.03 * working, f"saving takes {saving:.2f} s of {working:.2f} s")
    each = saving / (count / policy.save_every) * 1000
    return (f"saving every {policy.save_every} iterations: {each:.0f} ms a save, {saving:.2f} s in {count} default "
            f"iterations of {working:.1f} s, evaluations apart: {saving / working:.2%}")


TESTS = dict(kill=kill, corrupt=corrupt, fault=fault, tmpfs=tmpfs, fuzz=fuzz, soak=soak, cost=cost)


def run_test(name: str, count: int, seed: int = 0) -> str:
    """The result of one test in a scratch folder of its own, and its seconds; SystemExit for the first case that fails."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as home:
        result = TESTS[name](count, seed, Path(home))
    return f"{name}: {result}  [{time.monotonic() - start:.0f} s]"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("test", choices=[*TESTS, "brief"])
    parser.add_argument("--count", type=int, help="how many (default: the full figure)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for test in BRIEF if given.test == "brief" else [given.test]:
        print(run_test(test, given.count or (BRIEF if given.test == "brief" else FULL)[test], given.seed), flush=True)
