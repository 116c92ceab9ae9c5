"""Where and how to compute: --device, --deterministic, --bf16, --compile, --shard."""

import os
from collections.abc import Collection

from minirlhf.run.errors import UserError
from minirlhf.run.parallel import process_count, replicate, shard

import torch


def pick_device(name: str, deterministic: bool = False, bf16: bool = False) -> torch.device:
    """The device of --device. Raises UserError if this machine does not have it.

    deterministic: use only kernels that give the same bits every time.
    bf16: also check that the device can compute in bfloat16.
    """
    if deterministic:  # cuBLAS reads this when it is first used
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # the setter imports a compiler for seconds, so call it only if it changes something
    if deterministic != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(deterministic)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    available = dict(cpu=True, cuda=torch.cuda.is_available(),
                     mps=torch.backends.mps.is_available())
    if not available[name]:
        raise UserError(f"--device {name}: torch finds no such device on this machine; "
                        "leave the flag out, or use --device cpu")
    if bf16 and name == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError("--bf16: this GPU has no bfloat16 arithmetic; leave the flag out")
    if bf16 and name == "mps" and not torch.backends.mps.is_macos_or_newer(14, 0):
        raise UserError("--bf16: needs macOS 14 or newer on this device; "
                        "leave the flag out, or use --device cpu")
    return torch.device(name)


def prepare_training(model, config, device: torch.device, heads: Collection[str]):
    """The module whose forward pass training calls: the model itself, or this process's replica.

    The model is compiled and sharded in place if --compile and --shard ask for it.
    heads: names of the heads that the loss uses; the other heads are frozen. (A tied LM head is
    not a module of its own.)
    """
    for name, part in model.named_children():
        if name.endswith("_head"):
            part.requires_grad_(name in heads)
    if config.compile:
        model.compile_blocks()
    if config.shard:
        shard(model, device)
    return model if config.shard or process_count() == 1 else replicate(model)


def check_processes(config, device: torch.device, rows: int, what: str) -> None:
    """Raise UserError if there are more processes than devices, or than rows to share.

    rows, what: the smallest number of rows that all processes share, and what they are.
    """
    if config.shard and not torch.distributed.is_initialized():
        raise UserError("--shard: needs several processes to split the model over; "
                        "start with torchrun, or add --no-shard")
    count = process_count()
    on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    devices = dict(cuda=torch.cuda.device_count(), mps=1).get(device.type, on_this_machine)
    if count > 1 and on_this_machine > devices:
        raise UserError(f"{on_this_machine} processes for {devices} of device {device}; "
                        f"use --nproc-per-node {devices}, or add --device cpu")
    if count > rows:
        raise UserError(f"{count} processes cannot share {rows} rows, {what}; "
                        f"start at most {rows} (--nproc-per-node {rows})")
