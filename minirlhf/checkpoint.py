"""Files that are whole or absent: written beside their place, flushed to disk, renamed; checksummed; never unpickled freely.

A checkpoint is a torch.save archive followed by 82 bytes: a newline, the word sha256, and the digest of all before it.
Tensors load with weights_only=True; everything else in it is one JSON string.
"""

import contextlib
import hashlib
import io
import json
import os
import re
from pathlib import Path

import torch

from minirlhf.flags import UserError
from minirlhf.log import printable
from minirlhf.model import ModelConfig, Transformer
from minirlhf.parallel import is_main, split_like, whole_states

FORMAT = "minirlhf 1"
SEAL = re.compile(rb"\nminirlhf sha256 ([0-9a-f]{64})\Z")
SEAL_LENGTH = len("\nminirlhf sha256 ") + 64


def write_atomically(path: Path, content: bytes) -> None:
    """Put content at path so that a reader, or a crash at any instant, finds the old file or the new one, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:  # the end that a signal asks for, too
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)  # the rename itself lives in the folder
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save_checkpoint(path: Path, kind: str, meta: dict, states: dict) -> None:
    """kind: "base", "reward", "policy", or a stage's name. meta: JSON. states: name -> state_dict. Raises OSError."""
    buffer = io.BytesIO()
    torch.save(dict(format=FORMAT, kind=kind, meta=json.dumps(meta), states=states), buffer)
    content = buffer.getvalue()
    seal = f"\nminirlhf sha256 {hashlib.sha256(content).hexdigest()}".encode()
    write_atomically(path, content + seal)


def load_checkpoint(path: Path, kind: str) -> tuple[dict, dict]:
    """(meta, states) of a checkpoint of this kind, on the CPU. Raises UserError that names the file and what ails it."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; is this the folder of a finished run?") from None
    seal = SEAL.match(content[-SEAL_LENGTH:])
    if seal is None:
        raise UserError(f"{path}: torn, or not a checkpoint of this program; use an older checkpoint or train again")
    payload = content[:-SEAL_LENGTH]
    if hashlib.sha256(payload).hexdigest().encode() != seal[1]:
        raise UserError(f"{path}: damaged, its checksum does not match; use an older checkpoint or train again")
    try:
        loaded = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
        found, meta, states = loaded["kind"], json.loads(loaded["meta"]), loaded["states"]
        if loaded["format"] != FORMAT or not isinstance(states, dict) or not isinstance(meta, dict):
            raise ValueError("another format")
    except Exception:  # whatever a hostile file makes the restricted unpickler raise
        raise UserError(f"{path}: refused, it is not a plain checkpoint of this program; train again") from None
    if found != kind:
        raise UserError(f"{path}: holds a {found} model, not a {kind} model; name the right folder")
    return meta, states


def save_model(path: Path, kind: str, model: Transformer, meta: dict) -> None:
    """One of base.pt, reward.pt, policy.pt: weights, sizes, and whatever meta tells of their making."""
    save_checkpoint(path, kind, dict(meta, model=vars(model.config)), dict(model=model.state_dict()))


def load_model(path: Path, kind: str, fingerprint: str) -> tuple[Transformer, dict]:
    """The model that save_model wrote, and its meta. fingerprint: of the tokenizer it must have been trained with."""
    meta, states = load_checkpoint(path, kind)
    if meta.get("tokenizer") != fingerprint:
        raise UserError(f"{path}: was trained with another tokenizer than its config.json names now; restore that tokenizer, "
                        "or train again")
    try:
        model = Transformer(ModelConfig(**meta["model"]))
        model.load_state_dict(states["model"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{path}: tensors do not fit the sizes it states ({str(error).splitlines()[0]}); train again") from None
    return model, meta


def newest_checkpoint(folder: Path, kind: str, run_id: str) -> tuple[dict, dict] | None:
    """The newest whole checkpoint of this kind in a run's checkpoints/; torn and foreign ones are named and passed over."""
    for path in sorted(folder.glob(f"{kind}-*.pt"), reverse=True):
        try:
            meta, states = load_checkpoint(path, kind)
            if meta.get("run") != run_id:
                raise UserError(f"{path}: belongs to a run with other settings or data; passed over")
            return meta, states
        except UserError as error:
            print(printable(f"warning: {error}"))
    return None


def restore(found: tuple[dict, dict] | None, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Give model and optimizer what newest_checkpoint found. Returns how many steps are done, 0 with nothing found."""
    if found is None:
        return 0
    meta, states = found
    try:
        own, params = model.state_dict(), [p for group in optimizer.param_groups for p in group["params"]]
        model.load_state_dict({name: split_like(value, own.get(name)) for name, value in states["model"].items()})
        for number, kept in states["optimizer"]["state"].items():
            kept.update({key: split_like(value, params[number]) for key, value in kept.items()})
        optimizer.load_state_dict(states["optimizer"])
        done = int(meta["step"])
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        first, *_ = str(error).splitlines() or [type(error).__name__]
        raise UserError(f"a checkpoint does not fit its run ({first}); delete it, or start a new run") from None
    print(f"going on after step {done}")
    return done


def save_step(folder: Path, kind: str, step: int, meta: dict, states: dict, keep: int) -> None:
    """Write checkpoints/KIND-STEP.pt, then delete all but the newest `keep` of its kind."""
    states = whole_states(states)
    if not is_main():
        return
    folder.mkdir(exist_ok=True)
    newest = folder / f"{kind}-{step:08d}.pt"
    save_checkpoint(newest, kind, dict(meta, step=step), states)
    # one of a later step is torn, else the run would have gone on from it: it must not outlive a whole one
    for path in sorted(folder.glob(f"{kind}-*.pt"), key=lambda path: (path <= newest, path))[:-keep]:
        path.unlink()
