"""GPT-2's weights from its published files, without any other package.

    model.safetensors    8 bytes: length of the header; the header: JSON
                         {name: {dtype, shape, data_offsets}}; the numbers
    pytorch_model.bin    a pickled dictionary of tensors, read by torch.load's restricted unpickler
    base.pt              this project's own format (loading.py)

Both models are the same: pre-LayerNorm (eps 1e-5), tanh GELU, learned positions, tied LM head,
heads of width 64. Only names differ, and GPT-2 stores matrices as [in, out] ("Conv1D") where
nn.Linear expects [out, in]. Queries, keys and values are concatenated in that order in both.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

from minirlhf.data.json_files import unique_keys
from minirlhf.model.transformer import ModelConfig, Transformer
from minirlhf.run.errors import UserError
from minirlhf.run.files import open_regular

import numpy as np
import torch
from torch import Tensor

MAX_HEADER = 2**20  # bytes; GPT-2 XL's has 60,000
HEAD_WIDTH = 64  # in all four sizes
WEIGHTS = (torch.float32, torch.float16, torch.bfloat16)
DTYPES = dict(F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16,
              BOOL=torch.bool, U8=torch.uint8)  # the last two: causal masks
MASK = re.compile(r"h\.\d+\.attn\.(masked_)?bias")
BLOCK = {"ln_1": "ln_1", "attention_in": "attn.c_attn", "attention_out": "attn.c_proj",
         "ln_2": "ln_2", "mlp_in": "mlp.c_fc", "mlp_out": "mlp.c_proj"}


def checkpoint_file(path: Path) -> Path:
    """The file that --init means: path itself, or the first known name in a folder.

    Raises UserError.
    """
    names = ("model.safetensors", "pytorch_model.bin", "base.pt")
    files = [path]
    if path.is_dir():
        files = [path / name for name in names if (path / name).is_file()]
    if not files:
        raise UserError(f"--init {path}: the folder has none of {', '.join(names)}; name a file")
    return files[0]


def load_gpt2(path: Path, vocab_size: int, table_rows: int) -> Transformer:
    """The transformer of a GPT-2 file, in float32 on the CPU. Sizes are inferred from the shapes.

    vocab_size: of the tokenizer; must equal the rows of the file's token table.
    table_rows: of the model's token table. The rows after vocab_size (PAD, and those that fill up
    to a multiple of 64) are 0, and so are the reward and value heads.
    Raises UserError that names the file, the tensor and the problem.
    """
    try:
        is_safetensors = path.suffix == ".safetensors"
        tensors = plain_names(read_safetensors(path) if is_safetensors else read_pickled(path))
        if tensors and "wte.weight" not in tensors:
            raise UserError(f"{path}: the weights of another model family (no wte.weight, but "
                            f"{min(tensors)[:80]!r}); --init takes GPT-2's and this project's own")
        sizes = gpt2_sizes(path, tensors, vocab_size, table_rows)
        with torch.device("meta"):  # allocate nothing before the file is known to fit
            model = Transformer(sizes)
        model.load_state_dict(convert(tensors, model), assign=True)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; "
                        "--init takes a checkpoint, or the folder that contains it") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a complete GPT-2 checkpoint ({error}); "
                        "download the file again") from None
    return model


def gpt2_sizes(path: Path, tensors: dict[str, Tensor], vocab_size: int,
               table_rows: int) -> ModelConfig:
    """Sizes from the shapes of GPT-2's tensors. Raises UserError or ValueError."""
    rows, width = shape_of(tensors, "wte.weight", 2)
    context, _ = shape_of(tensors, "wpe.weight", 2)
    shape_of(tensors, "h.0.ln_1.weight", 1)
    if rows != vocab_size:
        raise UserError(f"{path}: wte.weight has {rows} rows, but the tokenizer has {vocab_size} "
                        "tokens; GPT-2's weights need --tokenizer gpt2")
    if width % HEAD_WIDTH:
        raise ValueError(f"wte.weight: its width of {width} is not a multiple of {HEAD_WIDTH}, "
                         "the width of a head")
    n_layer = sum(name.endswith(".ln_1.weight") for name in tensors)
    return ModelConfig(vocab_size, table_rows, n_layer, width // HEAD_WIDTH, width, context)


def convert(tensors: dict[str, Tensor], model: Transformer) -> dict[str, Tensor]:
    """A state_dict for model from tensors with GPT-2's names. Raises ValueError.

    Only the shapes of model are used.
    """
    state = {}
    remaining = dict(tensors)
    for name, expected in model.state_dict().items():
        is_scale = name == "score_scale"
        state[name] = target = torch.ones(()) if is_scale else torch.zeros(expected.shape)
        if name.startswith(("reward_head", "value_head", "score_")):  # not in GPT-2's file
            continue
        part = name.split(".")
        is_block = part[0] == "blocks"
        theirs = f"h.{part[1]}.{BLOCK[part[2]]}.{part[3]}" if is_block else name
        shape = shape_of(remaining, theirs, expected.ndim)
        tensor = remaining.pop(theirs)
        if is_block and expected.ndim == 2:
            tensor = tensor.T
        fitting = tuple(expected.shape)
        if name == "wte.weight":
            fitting = (model.config.vocab_size, *expected.shape[1:])
        if tensor.shape != fitting:
            raise ValueError(f"{theirs}: its shape {list(shape)} does not fit "
                             "those of wte.weight and wpe.weight")
        if not tensor.isfinite().all():
            raise ValueError(f"{theirs}: contains a number that is not finite")
        target[: len(tensor)] = tensor  # a copy, because the memory-mapped file may change later
    check_remaining(remaining, tensors)
    return state


def check_remaining(remaining: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """Raise ValueError for tensors that GPT-2 does not have, or an untied LM head."""
    if "lm_head.weight" in remaining:
        shape_of(remaining, "lm_head.weight", 2)  # only for its ValueError
        if not torch.equal(remaining.pop("lm_head.weight"), tensors["wte.weight"]):
            raise ValueError("lm_head.weight: differs from wte.weight, but GPT-2 ties them")
    if remaining:
        raise ValueError(f"{min(remaining)[:80]!r} is not a tensor of GPT-2")


def plain_names(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the prefix that some files have, and without causal masks."""
    tensors = {}
    for name, tensor in stored.items():
        plain = name.removeprefix("transformer.")
        if plain in tensors:
            raise ValueError(f"{plain[:80]!r} occurs with and without the prefix")
        if not MASK.fullmatch(plain):
            tensors[plain] = tensor
    return tensors


def shape_of(tensors: dict[str, Tensor], name: str, ndim: int) -> tuple[int, ...]:
    """The shape of a required tensor with this number of dimensions. Raises ValueError."""
    if name not in tensors:
        raise ValueError(f"{name}: is missing")
    tensor = tensors[name]
    is_plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    # an expanded tensor needs no space in the file, but any amount of it once it is copied
    is_stored = is_plain and 0 < tensor.nbytes <= tensor.untyped_storage().nbytes()
    if not is_stored or tensor.dtype not in WEIGHTS or tensor.ndim != ndim:
        raise ValueError(f"{name}: is {tensor.dtype} {list(tensor.shape)[:8]}, "
                         f"not 16- or 32-bit floats in {ndim} dimension(s)")
    return tuple(tensor.shape)


# ---- file formats --------------------------------------------------------------------------------


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, memory-mapped.

    Raises OSError, ValueError or RecursionError.
    """
    with open_regular(path) as file:
        content = np.memmap(file, mode="c")
    length = int.from_bytes(content[:8].tobytes(), "little")
    size = len(content) - 8 - length  # bytes of numbers
    if length > MAX_HEADER or size < 1:
        raise ValueError(f"it states a header of {length} bytes: incomplete, or another format")
    header = json.loads(content[8:8 + length].tobytes(), object_pairs_hook=unique_keys)
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    header.pop("__metadata__", None)
    tensors = {}
    position = 0
    entries = sorted(read_entry(name, entry) for name, entry in header.items())
    for start, stop, name, dtype, shape in entries:
        if start != position or stop > size:
            raise ValueError(f"{name[:80]!r}: bytes {start} to {stop} of {size} overlap others, "
                             "leave a gap, or do not exist")
        numbers = torch.frombuffer(content, dtype=DTYPES[dtype], count=math.prod(shape),
                                   offset=8 + length + start)
        tensors[name] = numbers.view(shape)
        position = stop
    if position != size:
        raise ValueError(f"{size - position} bytes at its end belong to no tensor")
    return tensors


def read_entry(name: str, entry: Any) -> tuple[int, int, str, str, list[int]]:
    """(first byte, end, name, dtype, shape) of a tensor's header entry. Raises ValueError."""
    try:
        dtype = entry["dtype"]
        shape = entry["shape"]
        start, stop = entry["data_offsets"]
        numbers = [start, stop, *shape]
        are_valid = all(type(number) is int and 0 <= number < 2**48 for number in numbers)
        if are_valid and len(shape) <= 8:
            size = math.prod(shape) * DTYPES[dtype].itemsize
            if 1 <= stop - start == size:
                return start, stop, name, dtype, shape
    except (KeyError, TypeError, ValueError):
        pass
    raise ValueError(f"{name[:80]!r}: its entry {entry!r:.80} is malformed, empty, or of a type "
                     f"other than {', '.join(DTYPES)}")


def read_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a pytorch_model.bin; nothing in the file is executed.

    Raises OSError or ValueError.
    """
    with open_regular(path) as file:
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a malicious file can raise anything
            raise ValueError(f"{type(error).__name__} in the restricted unpickler") from None
    is_tensors = isinstance(loaded, dict) and all(
        type(key) is str and isinstance(value, Tensor) for key, value in loaded.items())
    if not is_tensors:
        raise ValueError("it is not a dictionary of tensors")
    return loaded
