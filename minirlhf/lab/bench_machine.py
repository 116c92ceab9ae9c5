"""Time and memory of a call, and the speed limits of the machine."""

import ctypes
import gc
import time
from collections.abc import Callable

import torch


def seconds(run: Callable, device: torch.device, repeat: int = 1) -> float:
    """Mean time of one call."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeat):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeat


def peak_bytes(run: Callable, device: torch.device) -> float:
    """Peak memory during a call, above that before it.

    On a CPU it is Linux's peak of resident memory; NaN on other systems.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    try:
        # return freed memory to the system; if it were reused, it would not count
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # resets the peak
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


def speed_limits(device: torch.device, quick: bool) -> tuple[float, float]:
    """(FLOP/s of matrix products, bytes/s copied) of this device, the best of ten."""
    is_gpu = device.type == "cuda"
    size = 8192 if is_gpu else 256 if quick else 1024
    dtype = torch.bfloat16 if is_gpu else torch.float32
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    source = torch.randn(2**20 if quick else 2**28 if is_gpu else 2**24, device=device)
    target = torch.empty_like(source)
    product = min(seconds(lambda: a @ b, device) for _ in range(10))
    copy = min(seconds(lambda: target.copy_(source), device) for _ in range(10))
    return 2 * size**3 / product, 2 * source.numel() * 4 / copy
