"""GPT-2's weights, as people have them on disk, into this project's transformer; no other package is needed.

    model.safetensors    8 bytes: length of the header; the header: JSON {name: {dtype, shape, data_offsets}}; the numbers
    pytorch_model.bin    a pickled dictionary of tensors, read by torch.load's restricted unpickler
    base.pt              this project's own (checkpoint.py)

The two models are one: pre-LayerNorm (eps 1e-5), GELU in its tanh form, learned positions, tied LM head, heads of 64. Only
names differ, and that GPT-2 stores its matrices as [in, out] ("Conv1D") where nn.Linear wants [out, in]. Its queries, keys
and values lie side by side in that order, each split into heads, as in model.py.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minirlhf.flags import UserError
from minirlhf.json_files import unique_keys
from minirlhf.model import ModelConfig, Transformer

MAX_HEADER = 2**20  # bytes; GPT-2 XL's has 60,000
HEAD_WIDTH = 64  # in all four sizes
WEIGHTS = (torch.float32, torch.float16, torch.bfloat16)
DTYPES = dict(F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16, BOOL=torch.bool, U8=torch.uint8)  # the last two: masks
MASK = re.compile(r"h\.\d+\.attn\.(masked_)?bias")
BLOCK = {"ln_1": "ln_1", "attention_in": "attn.c_attn", "attention_out": "attn.c_proj", "ln_2": "ln_2",
         "mlp_in": "mlp.c_fc", "mlp_out": "mlp.c_proj"}


def checkpoint_file(path: Path) -> Path:
    """The file that --init means: itself, or the first of the known names in a folder. Raises UserError."""
    names = ("model.safetensors", "pytorch_model.bin", "base.pt")
    files = [path / name for name in names if (path / name).is_file()] if path.is_dir() else [path]
    if not files:
        raise UserError(f"--init {path}: the folder holds none of {', '.join(names)}; name a file")
    return files[0]


def load_gpt2(path: Path, vocab_size: int, table_rows: int) -> Transformer:
    """The transformer in a .safetensors or .bin file of GPT-2's, in float32 on the CPU; its sizes are inferred from the shapes.

    The file's rows of the token table must be the tokenizer's vocab_size. The rest of table_rows, PAD and the rounding, is
    in no softmax and behind every mask, and is 0; the reward and value heads are 0. Raises UserError that names the file,
    the tensor and what is wrong with it.
    """
    try:
        tensors = plain_names(read_safetensors(path) if path.suffix == ".safetensors" else read_pickled(path))
        if tensors and "wte.weight" not in tensors:
            raise UserError(f"{path}: another family's weights (it has no wte.weight, but {min(tensors)[:80]!r}); "
                            "--init takes GPT-2's and this project's own")
        (rows, width), (context, _) = shape_of(tensors, "wte.weight", 2), shape_of(tensors, "wpe.weight", 2)
        shape_of(tensors, "h.0.ln_1.weight", 1)
        if rows != vocab_size:
            raise UserError(f"{path}: wte.weight has {rows} rows, but the tokenizer has {vocab_size} tokens; GPT-2's weights "
                            "go with --tokenizer gpt2")
        if width % HEAD_WIDTH:
            raise ValueError(f"wte.weight: its width of {width} is no multiple of {HEAD_WIDTH}, the width of a head")
        n_layer = sum(name.endswith(".ln_1.weight") for name in tensors)
        with torch.device("meta"):  # shapes alone: nothing is allocated for a file before it has been found to fit
            model = Transformer(ModelConfig(vocab_size, table_rows, n_layer, width // HEAD_WIDTH, width, context))
        model.load_state_dict(converted(tensors, model), assign=True)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; --init takes a checkpoint, or the folder that holds one") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a whole checkpoint of GPT-2's ({error}); fetch the file again") from None
    return model


def converted(tensors: dict[str, Tensor], model: Transformer) -> dict[str, Tensor]:
    """A state_dict for model, of which only the shapes are looked at, from tensors under GPT-2's names. Raises ValueError."""
    state, left = {}, dict(tensors)
    for ours, wanted in model.state_dict().items():
        state[ours] = target = torch.ones(()) if ours == "score_scale" else torch.zeros(wanted.shape)
        if ours.startswith(("reward_head", "value_head", "score_")):
            continue
        part = ours.split(".")
        theirs = f"h.{part[1]}.{BLOCK[part[2]]}.{part[3]}" if part[0] == "blocks" else ours
        found = shape_of(left, theirs, wanted.ndim)
        tensor = left.pop(theirs).T if part[0] == "blocks" and wanted.ndim == 2 else left.pop(theirs)
        fitting = (model.config.vocab_size, *wanted.shape[1:]) if ours == "wte.weight" else tuple(wanted.shape)
        if tensor.shape != fitting:
            raise ValueError(f"{theirs}: its shape {list(found)} does not fit those of wte.weight and wpe.weight")
        if not tensor.isfinite().all():
            raise ValueError(f"{theirs}: holds a number that is not finite")
        target[: len(tensor)] = tensor  # copied: what is mapped from a file would change with the file
    if "lm_head.weight" in left:
        shape_of(left, "lm_head.weight", 2)
        if not torch.equal(left.pop("lm_head.weight"), tensors["wte.weight"]):
            raise ValueError("lm_head.weight: differs from wte.weight, to which GPT-2 ties it")
    if left:
        raise ValueError(f"{min(left)[:80]!r} is none of its tensors")
    return state


def plain_names(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefix that some files have, and without the causal masks."""
    tensors = {}
    for name, tensor in stored.items():
        plain = name.removeprefix("transformer.")
        if plain in tensors:
            raise ValueError(f"{plain[:80]!r} is there with and without the prefix")
        if not MASK.fullmatch(plain):
            tensors[plain] = tensor
    return tensors


def shape_of(tensors: dict[str, Tensor], name: str, ndim: int) -> tuple[int, ...]:
    """The shape of a tensor that has to be there, of so many dimensions. Raises ValueError."""
    if name not in tensors:
        raise ValueError(f"{name}: is missing")
    tensor = tensors[name]
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.dtype in WEIGHTS
    # an expanded number takes no room in the file, and any amount of it once it is copied
    if not plain or tensor.ndim != ndim or not 0 < tensor.nbytes <= tensor.untyped_storage().nbytes():
        raise ValueError(f"{name}: is {tensor.dtype} {list(tensor.shape)[:8]}, not 16- or 32-bit floats in {ndim} dimension(s)")
    return tuple(tensor.shape)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, mapped into memory. Raises OSError, ValueError or RecursionError."""
    content = np.memmap(path, mode="c")
    length = int.from_bytes(content[:8].tobytes(), "little")
    size = len(content) - 8 - length  # bytes of numbers
    if length > MAX_HEADER or size < 1:
        raise ValueError(f"it states a header of {length} bytes: torn, or another format")
    header = json.loads(content[8:8 + length].tobytes(), object_pairs_hook=unique_keys)
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    header.pop("__metadata__", None)
    tensors, position = {}, 0
    for start, stop, name, dtype, shape in sorted(read_entry(name, entry) for name, entry in header.items()):
        if start != position or stop > size:
            raise ValueError(f"{name[:80]!r}: bytes {start} to {stop} of {size} overlap others, leave a gap, or are not there")
        numbers = torch.frombuffer(content, dtype=DTYPES[dtype], count=math.prod(shape), offset=8 + length + start)
        tensors[name], position = numbers.view(shape), stop
    if position != size:
        raise ValueError(f"{size - position} bytes at its end belong to no tensor")
    return tensors


def read_entry(name: str, entry: Any) -> tuple[int, int, str, str, list[int]]:
    """(first byte, byte after the last, name, dtype, shape) of a tensor by its entry in the header. Raises ValueError."""
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        whole = all(type(number) is int and 0 <= number < 2**48 for number in [start, stop, *shape])
        if whole and 1 <= stop - start == math.prod(shape[:8]) * DTYPES[dtype].itemsize and len(shape) <= 8:
            return start, stop, name, dtype, shape
    except (KeyError, TypeError, ValueError):
        pass
    raise ValueError(f"{name[:80]!r}: its entry {entry!r:.80} is malformed, empty, or of another type than {', '.join(DTYPES)}")


def read_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a pytorch_model.bin; nothing that the file says is executed. Raises OSError or ValueError."""
    with open(path, "rb") as file:
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a hostile file makes the restricted unpickler raise
            raise ValueError(f"{type(error).__name__} while it was unpickled without executing anything") from None
    if not isinstance(loaded, dict) or not all(type(k) is str and isinstance(v, Tensor) for k, v in loaded.items()):
        raise ValueError("it is no dictionary of tensors")
    return loaded
