"""Checkpoint files: complete or absent, checksummed, and never unpickled without restrictions.

A checkpoint is a torch.save archive followed by 81 bytes: a newline, "minirlhf sha256 " and the
digest of everything before it. Tensors are loaded with weights_only=True; the rest is one JSON
string.
"""

import hashlib
import io
import json
import os
import re
from pathlib import Path

import minirlhf
from minirlhf.run.errors import UserError, raise_if_out_of_memory
from minirlhf.run.files import open_regular, read_file, write_atomically
from minirlhf.run.parallel import full_states, is_main, split_like
from minirlhf.run.terminal import echo, printable

import torch

FORMAT = f"minirlhf {minirlhf.__version__}"
SEAL = re.compile(rb"\nminirlhf sha256 ([0-9a-f]{64})\Z")
SEAL_LENGTH = len("\nminirlhf sha256 ") + 64


def version_error(path: Path, version: str) -> UserError:
    """The error for a file of another version of this program."""
    return UserError(f"{path}: written by minirlhf {printable(version[:20])}, but this is minirlhf "
                     f"{minirlhf.__version__}; use that version, or start a new run")


def save_checkpoint(path: Path, kind: str, meta: dict, states: dict) -> None:
    """kind: "base", "reward", "policy" or a stage.  meta: JSON.  states: name -> state_dict.

    Raises OSError, or UserError if a number is not finite.
    """
    if name := first_not_finite(states):
        raise UserError(f"{path}: not saved, because {name} is not finite; "
                        "try a smaller learning rate")
    buffer = io.BytesIO()
    torch.save(dict(format=FORMAT, kind=kind, meta=json.dumps(meta), states=states), buffer)
    content = buffer.getvalue()
    seal = f"\nminirlhf sha256 {hashlib.sha256(content).hexdigest()}".encode()
    write_atomically(path, content + seal)


def read_seal(path: Path) -> str:
    """The digest that a checkpoint states of its content; "" if the file is no checkpoint.

    load_checkpoint verifies it, so it identifies a large model without hashing it again.
    """
    with open_regular(path) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - SEAL_LENGTH))
        seal = SEAL.match(file.read())
    return seal[1].decode() if seal else ""


def first_not_finite(states, name: str = "") -> str:
    """The name of the first tensor of nested dicts with a NaN or an infinity, or ""."""
    if isinstance(states, torch.Tensor):
        return "" if states.isfinite().all() else name
    items = states.items() if isinstance(states, dict) else ()
    names = (first_not_finite(value, f"{name} {key}".strip()) for key, value in items)
    return next(filter(None, names), "")


def load_checkpoint(path: Path, kind: str) -> tuple[dict, dict]:
    """(meta, states) of a checkpoint of this kind, on the CPU.

    Raises UserError that names the file and the problem.
    """
    try:
        content = read_file(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; "
                        "is this the folder of a finished run?") from None
    seal = SEAL.match(content[-SEAL_LENGTH:])
    if seal is None:
        raise UserError(f"{path}: incomplete, or not a checkpoint of this program; "
                        "use an older checkpoint or train again")
    payload = content[:-SEAL_LENGTH]
    if hashlib.sha256(payload).hexdigest().encode() != seal[1]:
        raise UserError(f"{path}: damaged (its checksum does not match); "
                        "use an older checkpoint or train again")
    try:
        loaded = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
        file_format = loaded["format"]
        file_kind = loaded["kind"]
        meta = json.loads(loaded["meta"])
        states = loaded["states"]
        if [type(x) for x in (file_format, file_kind, meta, states)] != [str, str, dict, dict]:
            raise ValueError("another format")
        broken = first_not_finite(states)
    except Exception as error:  # a malicious file can raise anything in the restricted unpickler
        raise_if_out_of_memory(error)
        raise UserError(f"{path}: refused, because it is not a plain checkpoint of this program; "
                        "train again") from None
    if file_format != FORMAT:
        raise version_error(path, file_format.removeprefix("minirlhf "))
    if file_kind != kind:
        raise UserError(f"{path}: contains a {file_kind} model, not a {kind} model; "
                        "name the right folder")
    if broken:
        raise UserError(f"{path}: {broken} is not finite; use an older checkpoint or train again")
    return meta, states


def own_names(kind: str) -> str:
    """A glob pattern for the checkpoints of a run, which leaves out copies that the user made."""
    return f"{kind}-{'[0-9]' * 8}.pt"


def newest_checkpoint(folder: Path, kind: str, run_id: str) -> tuple[dict, dict] | None:
    """(meta, states) of the newest valid checkpoint of this kind, or None.

    Prints a warning for each newer one that it skips.

    folder: the run's checkpoints/.
    """
    for path in sorted(folder.glob(own_names(kind)), reverse=True):
        try:
            meta, states = load_checkpoint(path, kind)
            if meta.get("run") != run_id:
                raise UserError(f"{path}: belongs to a run with other settings or data; skipped")
            if not is_valid_meta(meta):
                raise UserError(f"{path}: its step or its state is not valid; skipped")
            return meta, states
        except UserError as error:
            echo(f"warning: {error}")
    return None


def is_valid_meta(meta: dict) -> bool:
    """Whether step, mark of the metrics and state have the types and sizes that a run writes."""
    mark = meta.get("metrics", [0, ""])
    is_mark = isinstance(mark, list) and [type(part) for part in mark] == [int, str]
    numbers = [value for key, value in meta.items() if key not in ("run", "metrics", "environment")]
    are_numbers = all(type(x) in (int, float) and abs(x) < 2**53 for x in numbers)
    return is_mark and are_numbers and type(meta.get("step")) is int and meta["step"] >= 0


def restore(checkpoint: tuple[dict, dict] | None, model: torch.nn.Module,
            optimizer: torch.optim.Optimizer) -> int:
    """Load a checkpoint of newest_checkpoint into model and optimizer.

    Returns the number of finished steps, 0 without a checkpoint. Raises UserError.
    """
    if checkpoint is None:
        return 0
    meta, states = checkpoint
    try:
        current = model.state_dict()
        weights = {name: split_like(value, current.get(name))
                   for name, value in states["model"].items()}
        model.load_state_dict(weights)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state = states["optimizer"]["state"]
        for number, moments in state.items():
            shape = parameters[number].shape
            shapes = [moments[key].shape for key in ("step", "exp_avg", "exp_avg_sq")]
            if shapes != [(), shape, shape]:
                raise ValueError(f"the optimizer's state of parameter {number} has another shape")
            for key, value in moments.items():
                moments[key] = split_like(value, parameters[number])
        optimizer.load_state_dict(dict(optimizer.state_dict(), state=state))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise_if_out_of_memory(error)
        reason = (str(error).splitlines() or [type(error).__name__])[-1].strip()[:200]
        raise UserError(f"a checkpoint does not fit its run ({reason}); "
                        "delete it, or start a new run") from None
    echo(f"resuming after step {meta['step']}")
    return meta["step"]


def save_step(folder: Path, kind: str, meta: dict, states: dict, keep: int) -> None:
    """Write folder/KIND-STEP.pt, then delete all but the newest `keep` files of its kind.

    meta["step"]: the number of finished steps. Every process must call this.
    """
    states = full_states(states)
    if not is_main():
        return
    folder.mkdir(exist_ok=True)
    newest = folder / f"{kind}-{meta['step']:08d}.pt"
    save_checkpoint(newest, kind, meta, states)
    # A file of a later step is damaged, or the run would have resumed from it: delete it first.
    by_age = sorted(folder.glob(own_names(kind)), key=lambda path: (path <= newest, path))
    for path in by_age[:-keep]:
        path.unlink()
