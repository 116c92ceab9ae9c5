"""Time and memory of one call, and what the machine can do at best."""

import ctypes
import gc
import platform
import time
from collections.abc import Callable

import torch


def seconds(run: Callable, device: torch.device, repeat: int = 1) -> float:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeat):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeat


def allocator_as_delivered() -> None:
    """What glibc comes to by itself in a process that handles tensors: it hands memory back beyond 64 MiB at the top. Only this
    project's scripts ask it for more (keep_freed_memory), so other libraries are timed without."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(-1, 2**26)  # M_TRIM_THRESHOLD


def peak_bytes(run: Callable, device: torch.device) -> float:
    """Highest memory during a run above that before it; on a processor by Linux's high-water mark, nan elsewhere."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before would be used again, and count for nothing
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before = kilobytes("/proc/self/status", "VmRSS")
        run()
        return 1024.0 * (kilobytes("/proc/self/status", "VmHWM") - before)
    except (OSError, AttributeError):
        return float("nan")


def kilobytes(path: str, key: str) -> int:
    with open(path) as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key + ":"))


def free_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    try:
        return 1024.0 * kilobytes("/proc/meminfo", "MemAvailable")
    except OSError:
        return float("inf")


def ceilings(device: torch.device, quick: bool) -> tuple[float, float]:
    """(matrix-product FLOP/s, copied bytes/s) of this device, the best of ten."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (256 if quick else 1024, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.randn(2**20 if quick else 2**28 if device.type == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    product = min(seconds(lambda: a @ b, device) for _ in range(10))
    copying = min(seconds(lambda: target.copy_(source), device) for _ in range(10))
    return 2 * size**3 / product, 2 * source.numel() * 4 / copying
