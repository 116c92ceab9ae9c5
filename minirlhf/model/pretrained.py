"""Pretrained language models from a folder in Hugging Face's layout, without any other package.

    config.json                     the family (model_type), its sizes and options
    model.safetensors               8 bytes: length of the header; the header: JSON
                                    {name: {dtype, shape, data_offsets}}; the numbers
    model.safetensors.index.json    of a large model instead: {"weight_map": {name: file}}
    tokenizer.json                  see minirlhf/data/pretrained_tokenizer.py

The families are forms of one transformer. Only the names of tensors differ, and GPT-2 stores
matrices as [in, out] ("Conv1D") where nn.Linear expects [out, in].
"""

import json
import math
import re
from pathlib import Path
from typing import Any

from minirlhf.data.json_files import unique_keys
from minirlhf.data.pretrained_tokenizer import read_json, read_pretrained_tokenizer
from minirlhf.data.tokenizer import table_rows
from minirlhf.model.transformer import ModelConfig, Transformer
from minirlhf.run.errors import UserError
from minirlhf.run.files import open_regular

import numpy as np
import tiktoken
import torch
from torch import Tensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER = 2**24  # bytes; GPT-2 XL's has 60,000
MOST_UNUSED_ROWS = 1024  # of a token table; Qwen 2.5's has up to 400
FLOATS = dict(F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16)
DTYPES = FLOATS | dict(BOOL=torch.bool, U8=torch.uint8)  # the last two: causal masks

# Their names for the parts of this project's model. Several names: their rows, one after another.
GPT2_NAMES = {
    "wte": "wte", "wpe": "wpe", "ln_f": "ln_f", "lm_head": "lm_head", "blocks": "h",
    "ln_1": "ln_1", "attention_in": "attn.c_attn", "attention_out": "attn.c_proj",
    "ln_2": "ln_2", "mlp_in": "mlp.c_fc", "mlp_out": "mlp.c_proj"}
LLAMA_NAMES = {
    "wte": "embed_tokens", "ln_f": "norm", "lm_head": "lm_head", "blocks": "layers",
    "ln_1": "input_layernorm",
    "attention_in": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "ln_q": "self_attn.q_norm", "ln_k": "self_attn.k_norm", "attention_out": "self_attn.o_proj",
    "ln_2": "post_attention_layernorm", "mlp_in": "mlp.gate_proj mlp.up_proj",
    "mlp_out": "mlp.down_proj"}
UNUSED = re.compile(r"h\.\d+\.attn\.(masked_)?bias|layers\.\d+\.self_attn\.rotary_emb\.inv_freq")

# config.json's names for the sizes; the OPTIONAL ones may be missing or null.
GPT2_SIZES = dict(n_layer="n_layer", n_head="n_head", d_model="n_embd", context="n_positions",
                  d_mlp="n_inner", norm_eps="layer_norm_epsilon")
LLAMA_SIZES = dict(n_layer="num_hidden_layers", n_head="num_attention_heads",
                   d_model="hidden_size", context="max_position_embeddings",
                   d_mlp="intermediate_size", norm_eps="rms_norm_eps",
                   n_kv_head="num_key_value_heads", d_head="head_dim")
OPTIONAL = ("n_inner", "num_key_value_heads", "head_dim")
# What no config.json states.
LLAMA_FORM = dict(swiglu=True, rms_norm=True, biases="none")
FORMS: dict[str, dict] = dict(gpt2={}, llama=LLAMA_FORM, qwen2=LLAMA_FORM | dict(biases="qkv"),
                              qwen3=LLAMA_FORM | dict(qk_norm=True))
# Options of config.json that must have this value, if they are there.
SUPPORTED = dict(
    activation_function="gelu_new", scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False,
    hidden_act="silu", attention_bias=False, mlp_bias=False, partial_rotary_factor=1.0,
    use_sliding_window=False, quantization_config=None)


def load_pretrained(folder: str | Path, dtype: torch.dtype = torch.float32,
                    ) -> tuple[Transformer, tiktoken.Encoding]:
    """(model, tokenizer) of a folder, on the CPU. Raises UserError.

    model(ids, attention_mask) @ model.lm_weight.T are the logits.
    """
    encoding = read_pretrained_tokenizer(folder)
    return load_weights(Path(folder), encoding.n_vocab, table_rows(encoding), dtype), encoding


def load_weights(folder: Path, vocab_size: int, rows: int,
                 dtype: torch.dtype | None = None) -> Transformer:
    """The transformer of a folder, on the CPU, in dtype (torch's default if None).

    vocab_size: of the tokenizer.  rows: at least as many has the model's token table. Those that
    the file lacks (for PAD) are 0, and so are the reward and value heads.
    Raises UserError that names the file or folder, and the option or tensor.
    """
    try:
        options = read_json(folder / "config.json")
        tensors = plain_names(read_tensors(folder))
        config = model_config(folder, options, tensors, vocab_size, rows)
        with torch.device("meta"):  # allocate nothing before the file is known to fit
            model = Transformer(config)
        model.load_state_dict(convert(tensors, model, dtype or torch.get_default_dtype()),
                              assign=True)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror}; "
                        "download all files of the model") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{folder}: damaged, incomplete or unsupported ({error}); "
                        "download it again, or use another model") from None
    return model


# ---- config.json ---------------------------------------------------------------------------------


def model_config(folder: Path, options: dict, tensors: dict[str, Tensor], vocab_size: int,
                 rows: int) -> ModelConfig:
    """Sizes and form, from config.json and the shape of the token table.

    Raises UserError for an unsupported option, and ValueError for a damaged file.
    """
    path = folder / "config.json"
    check_options(path, options)
    is_gpt2 = options["model_type"] == "gpt2"
    names, sizes = (GPT2_NAMES, GPT2_SIZES) if is_gpt2 else (LLAMA_NAMES, LLAMA_SIZES)
    form = dict(FORMS[options["model_type"]])
    for ours, key in sizes.items():
        if key not in OPTIONAL or options.get(key) is not None:
            form[ours] = number(options, key, float if ours == "norm_eps" else int)
    if not is_gpt2:
        form |= rope_options(path, options)
    is_tied = is_gpt2 or "lm_head.weight" not in tensors
    form["tied"] = bool(options.get("tie_word_embeddings", is_tied))
    table, last = f"{names['wte']}.weight", f"{names['blocks']}.{form['n_layer'] - 1}."
    for name in (table, f"{last}{names['ln_1']}.weight"):
        if name not in tensors or tensors[name].ndim < 1:
            raise ValueError(f"{name}: is missing")
    count = len(tensors[table])
    if not 0 <= count - vocab_size < MOST_UNUSED_ROWS:
        raise UserError(f"{folder}: {table} has {count} rows, but the tokenizer has {vocab_size} "
                        "tokens; use the model's own tokenizer (--tokenizer auto)")
    if number(dict(vocab_size=count) | options, "vocab_size", int) > count:
        raise ValueError(f"{table}: its {count} rows are fewer than config.json's vocab_size")
    config = ModelConfig(vocab_size, max(rows, count), **form)
    config.check()
    return config


def check_options(path: Path, options: dict) -> None:
    """Raise UserError for a family or an option that this project does not have."""
    family = options.get("model_type")
    if not options:
        raise UserError(f"{path}: no such file; download all files of the model")
    if family not in FORMS:
        raise UserError(f"{path}: model_type is {family!r}, which is not supported; "
                        f"use a model of {', '.join(FORMS)}")
    for key, value in SUPPORTED.items():
        if options.get(key, value) != value:
            raise UserError(f"{path}: {key} is {options[key]!r:.80}, which is not supported; "
                            "use another model")
    if any(kind != "full_attention" for kind in options.get("layer_types") or []):
        raise UserError(f"{path}: some layer_types are not full_attention, which is not "
                        "supported; use another model")


def rope_options(path: Path, options: dict) -> dict:
    """RoPE's base and scaling, as fields of ModelConfig. Raises UserError or ValueError."""
    # one dict in new files, two entries in old ones
    rope = options.get("rope_parameters") or options.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"config.json: rope_scaling is {rope!r:.80}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise UserError(f"{path}: rope_scaling of type {kind!r:.80} is not supported; "
                        "use another model")
    base = number(dict(rope_theta=10000.0) | options | rope, "rope_theta", float)
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    scaling = tuple(number(rope, key, float) for key in keys) if kind == "llama3" else ()
    return dict(rope_base=base, rope_scaling=scaling)


def number(options: dict, key: str, kind: type) -> Any:
    """A positive number of config.json: an integer, or with kind float any. Raises ValueError."""
    value: Any = options.get(key)
    if type(value) not in (int, kind) or not 0 < value < 2**31:
        raise ValueError(f"config.json: {key} is {value!r:.80}, not a positive {kind.__name__}")
    return value


# ---- tensors -------------------------------------------------------------------------------------


def convert(tensors: dict[str, Tensor], model: Transformer,
            dtype: torch.dtype) -> dict[str, Tensor]:
    """A state_dict for model from tensors with the file's names, copied one at a time.

    Only the shapes of model are used. Raises ValueError.
    """
    c = model.config
    names = LLAMA_NAMES if c.rope_base else GPT2_NAMES
    table = tensors[f"{names['wte']}.weight"]
    remaining = dict(tensors)
    state = {}
    for name, expected in model.state_dict().items():
        if name.startswith(("reward_head", "value_head", "score_")):  # not in the file
            state[name] = torch.full(expected.shape, float(name == "score_scale"), dtype=dtype)
            continue
        *parents, part, kind = name.split(".")  # such as blocks.3.attention_in.weight
        prefix = f"{names['blocks']}.{parents[1]}." if parents else ""
        theirs = [f"{prefix}{their}.{kind}" for their in names[part].split()]
        rows = [len(expected) // len(theirs)] * len(theirs)
        if len(theirs) == 3:  # queries, keys and values
            rows = [heads * c.head_width for heads in (c.n_head, c.kv_heads, c.kv_heads)]
        if part in ("wte", "lm_head"):
            rows = [len(table)]
        pieces = [take(remaining, their) for their in theirs]
        if names is GPT2_NAMES and parents:
            pieces = [piece.t() for piece in pieces]
        for their, piece, count in zip(theirs, pieces, rows):
            if piece.shape != (count, *expected.shape[1:]):
                raise ValueError(f"{their}: its shape {list(tensors[their].shape)} does not fit "
                                 "config.json")
        rest = torch.zeros(len(expected) - sum(rows), *expected.shape[1:])  # such as the row of PAD
        state[name] = torch.cat([*pieces, rest], out=torch.empty(0, dtype=dtype))
        for their, piece in zip(theirs, state[name].split([*rows, len(rest)])):
            if not piece.isfinite().all():
                raise ValueError(f"{their}: contains a number that is not finite")
    if c.tied and "lm_head.weight" in remaining:
        head = take(remaining, "lm_head.weight")
        if head.dtype != table.dtype or not torch.equal(head, table):
            raise ValueError("lm_head.weight: differs from the token table, but config.json says "
                             "that they are tied")
    if remaining:
        raise ValueError(f"{min(remaining)[:80]!r} is not a tensor of this model family")
    return state


def take(tensors: dict[str, Tensor], name: str) -> Tensor:
    """Remove and return a required tensor of floats. Raises ValueError."""
    if name not in tensors:
        raise ValueError(f"{name}: is missing")
    tensor = tensors.pop(name)
    if tensor.dtype not in FLOATS.values() or tensor.ndim not in (1, 2):
        raise ValueError(f"{name}: is {tensor.dtype} {list(tensor.shape)[:8]}, not a vector or "
                         "matrix of 16- or 32-bit floats")
    return tensor


def plain_names(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the prefix that some files have, and without causal masks."""
    tensors = {}
    for name, tensor in stored.items():
        plain = name.removeprefix("transformer.").removeprefix("model.")
        if plain in tensors:
            raise ValueError(f"{plain[:80]!r} occurs with and without the prefix")
        if not UNUSED.fullmatch(plain):
            tensors[plain] = tensor
    return tensors


# ---- safetensors ---------------------------------------------------------------------------------


def weight_files(folder: Path) -> list[Path]:
    """The files of weights in a folder. Raises UserError."""
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    shards = read_json(folder / INDEX).get("weight_map")
    if shards is None:
        raise UserError(f"{folder}: contains neither {WEIGHTS} nor {INDEX}; download all files of "
                        "the model, or convert it with transformers; merge a LoRA adapter first")
    if not isinstance(shards, dict) or not all(
            isinstance(name, str) and Path(name).name == name for name in shards.values()):
        raise UserError(f"{folder / INDEX}: its weight_map does not name files of this folder; "
                        "download it again")
    return [folder / name for name in sorted(set(shards.values()))]


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of all files, memory-mapped. Raises OSError, UserError or ValueError."""
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        try:
            more = read_safetensors(path)
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from None
        if repeated := tensors.keys() & more.keys():
            raise ValueError(f"{path.name}: {min(repeated)[:80]!r} is also in another file")
        tensors |= more
    return tensors


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
    raise ValueError(f"{name[:80]!r}: its entry is malformed or empty, or has a dtype other than "
                     f"{', '.join(DTYPES)}, such as quantized weights: {entry!r:.80}")
