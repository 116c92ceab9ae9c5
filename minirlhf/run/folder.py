"""Run folders: created or resumed, and locked while a process runs."""

import dataclasses
import hashlib
import itertools
import json
import os
import re
from pathlib import Path
from typing import IO

import minirlhf
from minirlhf.run.checkpoint import version_error
from minirlhf.run.errors import UserError
from minirlhf.run.files import lock_file, read_file, write_atomically
from minirlhf.run.parallel import broadcast, is_main
from minirlhf.run.terminal import echo, shell_command

MAX_CONFIG = 2**20  # bytes of a config.json; one has about 3,000
MODULES = ("task", "reward")  # settings that may name a module
SCHEDULE = ("iterations", "epochs")  # a resumed run may be extended
# These settings do not affect results.
NO_EFFECT = ("out", "resume", "device", "tensorboard", "save_every", "keep_checkpoints", "max_kl",
             "shard")
# These settings name files. The facts identify files by their content, so these paths may change.
# A file or folder that is missing is looked for here, seen from the run folder.
MOVED = {"data": "inputs", "heldout_data": "inputs", "test_data": "inputs", "prompts": "inputs",
         "tokenizer": "inputs", "reward_run": ".."}
PATHS = (*MOVED, "init", "init_reward")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json",
                   "chat_template.jinja", "generation_config.json", "config.json")
SCRIPTS = ("train_reward.py", "train_policy.py")
DIGEST = 64  # characters of a SHA-256
# What write_atomically leaves of a run's own files if the process is killed.
PARTIAL = re.compile(r"\.(result\.json|samples\.md|bad-batch-[a-z0-9-]+\.json|.*\.tiktoken|"
                     rf"(base|sft|reward|policy)(-[0-9]{{8}})?\.pt|{'|'.join(TOKENIZER_FILES)})"
                     r"\.[0-9a-f]{16}\.partial")


def open_folder(config, name: str, facts: dict) -> tuple[Path, IO | None, str]:
    """Claim the run folder and write config.json. An existing folder is refused unless resumed.

    name: of a new folder under runs/ if --out is empty.
    facts: {description: "SHA-256  PATH"} of the input files.
    Returns (folder, lock in the main process, run_id). Closing the lock frees the folder.
    """
    path, lock = claim_folder(config, name, facts) if is_main() else (None, None)
    path = broadcast(path)
    settings = dict(dataclasses.asdict(config), out=str(path), resume=False)
    if is_main():
        content = json.dumps(sealed(settings, facts), indent=1) + "\n"
        write_atomically(path / "config.json", content.encode())
        keep_tokenizer(settings.get("tokenizer", ""), path / "inputs")
    return path, lock, run_id(settings, facts)


def keep_tokenizer(name: str, inputs: Path) -> None:
    """Copy the tokenizer's files, if it has any, so that the run does not need the model's folder.

    name: a path, or the name of an encoding, such as "helpdesk".
    """
    source = Path(name)
    for file in [source, *map(source.joinpath, TOKENIZER_FILES)]:
        if file.is_file() and ("/" in name or source.suffix == ".tiktoken"):
            target = inputs / file.relative_to(source.parent)
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(target, file.read_bytes())


def run_id(settings: dict, facts: dict[str, str]) -> str:
    """Hash of the settings and input files that affect results."""
    fixed = {key: value for key, value in identity(settings).items() if key not in SCHEDULE}
    return json_digest([fixed, {name: facts[name][:DIGEST] for name in facts}])


def identity(settings: dict) -> dict:
    """The settings that affect results. Of a module only the name: its file may have moved."""
    return {key: Path(value).name if key in MODULES else value
            for key, value in settings.items() if key not in NO_EFFECT + PATHS}


def claim_folder(config, name: str, facts: dict) -> tuple[Path, IO]:
    """An empty folder, or that of a run that may be resumed; and its lock."""
    folder = Path(config.out) if config.out else unused_folder(name)
    if config.resume:
        stored, stored_facts = read_run(type(config), folder / "config.json")
        check_same_run(config, stored)
        check_inputs(stored_facts, facts, "this run")
    else:
        refuse_existing(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = lock_file(folder / ".lock", f"{folder}: another process is running there; "
                                       "wait for it to end, or use another --out")
    for path in [*folder.iterdir(), *folder.glob("checkpoints/*"), *folder.glob("inputs/**/*")]:
        if PARTIAL.fullmatch(path.name):  # from a write that was killed
            path.unlink()
    return folder, lock


def refuse_existing(folder: Path) -> None:
    """Raise UserError if there is something in the folder of a new run."""
    # Hidden files may be left of a process that was killed before it wrote config.json.
    if folder.is_file() or any(folder.glob("[!.]*")):
        raise UserError(f"{folder}: already exists; add --resume to resume this run, "
                        "or use another --out")


def unused_folder(name: str) -> Path:
    """The first of runs/NAME-1, runs/NAME-2, ... that does not exist."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip(".-")
    paths = (Path("runs") / f"{name}-{number}" for number in itertools.count(1))
    return next(path for path in paths if not os.path.lexists(path))


def check_same_run(config, stored) -> None:
    """Raise UserError for any setting that would change the results of a resumed run."""
    before = identity(dataclasses.asdict(stored))
    for name, new in identity(dataclasses.asdict(config)).items():
        old = before[name]
        if name in SCHEDULE and new > old:
            echo(f"new schedule: {name} {old} -> {new}; "
                 f"the results will differ from those of a run of {old}")
        elif new != old:
            # a module must be named again, because a file alone must not make code run
            fix = f"name {old!r}" if name in MODULES and old else "leave the flag out"
            raise UserError(f"--resume with {name} = {new!r}, but the run has {old!r}; "
                            f"{fix}, or start a new run")


def check_inputs(stored: dict[str, str], facts: dict[str, str], run: str) -> None:
    """Raise UserError for the first input file whose content is not that of the stored facts."""
    for name in stored | facts:
        if stored.get(name, "")[:DIGEST] != facts.get(name, "")[:DIGEST]:
            path = facts.get(name, stored.get(name, ""))[DIGEST + 2:]
            raise UserError(f"{path}: not the file with which {run} started ({name}), or its "
                            "content has changed; restore it, or start a new run")


# ---- config.json ---------------------------------------------------------------------------------


def read_config(config_class, path: Path):
    """The checked configuration of a run folder's config.json. Raises UserError naming the file."""
    return read_run(config_class, path)[0]


def read_run(config_class, path: Path):
    """(configuration, facts) of a run folder's config.json. Raises UserError naming the file."""
    try:
        content = json.loads(read_file(path, MAX_CONFIG))
        version = content.get("version", "1.0")
        settings, facts = content["settings"], content["facts"]
        if version != minirlhf.__version__:
            raise version_error(path, str(version))
        made_by, needed = "reward_run" in settings, hasattr(config_class, "reward_run")
        if made_by != needed:
            raise UserError(f"{path.parent}: is a run of {SCRIPTS[made_by]}; "
                            f"name one of {SCRIPTS[needed]}")
        config = config_class(**with_tuples(settings))
        config.check()
        intact = content == sealed(settings, facts)
        facts = {name: str(value) for name, value in facts.items()}
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; is {path.parent} a run folder?") from None
    except KeyError:
        raise UserError(f"{path}: not that of a run; name a run folder") from None
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path}: not a configuration of this program ({error}); "
                        "start a new run") from None
    if not intact:
        raise UserError(f"{path}: was changed or damaged since the run started; start a new run")
    moved = {name: find_moved(getattr(config, name), (path.parent / place).resolve())
             for name, place in MOVED.items() if hasattr(config, name)}
    return dataclasses.replace(config, **moved), facts


def find_moved(value, folder: Path):
    """The path or paths of a setting. One that is missing is looked for in the folder, by name."""
    if isinstance(value, tuple):
        return tuple(find_moved(each, folder) for each in value)
    moved = folder / Path(value).name
    return str(moved) if moved.exists() and not Path(value).exists() else value


def is_users_module(name: str) -> bool:
    """Whether --task or --reward names code that is not part of this project.

    >>> [is_users_module(name) for name in ("auto", "minirlhf.data.helpdesk", "mine", "mine.py:f")]
    [False, False, True, True]
    """
    is_own = name.startswith("minirlhf.") and ".py" not in name
    return name not in ("", "auto", "none") and not is_own


def trusted_module(stored: str, given: str, flag: str, path: Path) -> str:
    """The module to import: the one on the command line, otherwise the one in a config.json.

    stored, path: the name in that file, and the file.  given: the value of the flag, or "".
    Raises UserError if only the file names a user's module: it may come from another person, and
    importing a module runs its code.
    """
    if not given and is_users_module(stored):
        raise UserError(f"{path}: names the module {stored}, which is not part of minirlhf; "
                        f"if you trust its code, add {shell_command([flag, stored])}")
    return given or stored


def module_flags(config) -> list[str]:
    """The flags that name a user's modules. A later command has to repeat them."""
    names = {f"--{field}": getattr(config, field, "") for field in MODULES}
    return [word for item in names.items() if is_users_module(item[1]) for word in item]


def sealed(settings: dict, facts: dict) -> dict:
    """The content of config.json, with a checksum that detects any change to the file."""
    return dict(version=minirlhf.__version__, settings=settings, facts=facts,
                sha256=json_digest([settings, facts]))


def json_digest(content) -> str:
    """SHA-256 of the content written as JSON."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def with_tuples(settings: dict) -> dict:
    """The settings with tuples in place of the lists that argparse and JSON create."""
    return {name: tuple(value) if isinstance(value, list) else value
            for name, value in settings.items()}
