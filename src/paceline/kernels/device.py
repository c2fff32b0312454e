"""The device that operations run on: which one, what it multiplies, how fast, how full."""

from __future__ import annotations

import ctypes
import platform
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch

from paceline.core.errors import UsageError

_DEVICES = ("auto", "cpu", "cuda")
_MATRIX_SIZE = {"cpu": 1024, "cuda": 8192}
# Bits are copied as numbers that numpy has, which bfloat16 is not.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def choose_device(name: str = "auto", *, local_rank: int = 0) -> torch.device:
    """The device that a name means; `auto` is CUDA where there is one.

    Raises:
        UsageError: no such device, or none present.
    """
    if name not in _DEVICES:
        raise UsageError(f"unknown device {name!r}", hint=f"one of {', '.join(_DEVICES)}")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("device cuda: torch sees no CUDA device", hint="--device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that a name means; `auto` is bfloat16 where `device` multiplies it natively."""
    if name == "auto":
        name = "bfloat16" if multiplies_bfloat16(device) else "float32"
    return {
        "float64": torch.float64,
        "float32": torch.float32,
        "float16": torch.float16,
        "bfloat16": torch.bfloat16,
    }[name]


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products run in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu_info = Path("/proc/cpuinfo")
    if not cpu_info.exists():
        return False
    flags = set(cpu_info.read_text(encoding="utf-8", errors="replace").split())
    return not flags.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


def measure_peak_flops(device: torch.device, dtype: torch.dtype, *, budget_s: float = 0.3) -> float:
    """FLOP/s of square matrix products: the practical peak that a run is measured against.

    The best of as many products as fit into `budget_s`, after two to warm up.
    """
    size = _MATRIX_SIZE[device.type]
    left = torch.ones(size, size, device=device, dtype=dtype)
    right = torch.ones(size, size, device=device, dtype=dtype)
    best_s, start_s = float("inf"), 0.0
    for trial in range(1000):
        if trial == 2:
            start_s, best_s = time.perf_counter(), float("inf")
        began_s = time.perf_counter()
        torch.mm(left, right)
        synchronize(device)
        best_s = min(best_s, time.perf_counter() - began_s)
        if trial >= 2 and time.perf_counter() - start_s > budget_s:
            break
    return 2.0 * size**3 / best_s


def synchronize(device: torch.device) -> None:
    """Waits for the work queued on `device`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process has held on `device`: resident for a CPU, allocated for CUDA."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def keep_freed_memory() -> None:
    """Tells the C library (glibc) to keep freed memory for the next tensor of its size.

    By default every tensor above 32 MiB is fresh memory from the kernel, which clears it page by
    page: a fifth of a small model's training step. Elsewhere this does nothing. Memory then
    grows to the step's peak, where it would have come to anyway, and stays there.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def host_buffer(size_bytes: int, device: torch.device) -> torch.Tensor:
    """Bytes of host memory that tensors of `device` are copied to: page-locked for CUDA."""
    return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")


class HostCopies:
    """Copies tensors to host memory beside what `device` computes.

    Args:
        device: that the tensors are on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def follow(self) -> None:
        """What is copied from now on is as the work queued so far by this thread leaves it."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Returns once a tensor has been copied to one of its shape and dtype in host memory."""
        if self._stream is None:
            # By numpy, in this thread alone: torch would start threads for each that copies.
            bits = _INTEGERS[source.itemsize]
            np.copyto(target.view(bits).numpy(), source.detach().view(bits).numpy())
            return
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        self._stream.synchronize()


def describe(device: torch.device) -> str:
    """The device's name, for records and reports."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
