"""Where to compute, and how: --device, --deterministic, --bf16, --compile, --shard."""

import os
from collections.abc import Collection

import torch

from minirlhf.flags import UserError
from minirlhf.parallel import processes, replicate, shard


def pick_device(name: str, deterministic: bool = False) -> torch.device:
    """The device that --device names, and whether its kernels must give the same bits every time. Raises UserError when this
    machine has none such."""
    if deterministic:  # read when cuBLAS is first used
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if deterministic != torch.are_deterministic_algorithms_enabled():  # asked first: the call imports a compiler for seconds
        torch.use_deterministic_algorithms(deterministic)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    there = dict(cpu=True, cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())[name]
    if not there:
        raise UserError(f"--device {name}: this machine has none that torch can use; leave the flag out, or --device cpu")
    return torch.device(name)


def mixed_precision(device: torch.device, bf16: bool) -> torch.autocast:
    """Context in which matrix products round their operands to bfloat16; weights stay float32, and so does what is summed
    outside of products. One context per forward pass: it keeps rounded weights until its end. Raises UserError."""
    if bf16 and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError("--bf16: this GPU has no bfloat16 arithmetic; leave the flag out")
    if bf16 and device.type == "mps" and not torch.backends.mps.is_macos_or_newer(14, 0):
        raise UserError("--bf16: needs macOS 14 or newer on this device; leave the flag out, or --device cpu")
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def prepare_training(model, config, device: torch.device, heads: Collection[str]):
    """Of a Transformer, what the passes of its training call: the model itself, compiled and sharded as --compile and --shard
    ask for it, or this process's replica. heads: the scalar heads that the loss reaches; the others keep their weights."""
    for name in ("reward_head", "value_head"):
        getattr(model, name).requires_grad_(name in heads)
    if config.compile:
        model.compile_blocks()
    if config.shard:
        shard(model, device)
    return model if config.shard or processes() == 1 else replicate(model)
