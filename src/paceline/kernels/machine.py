"""What this machine has: processor, memory, accelerators, ways for ranks to talk."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed

from paceline.kernels.device import multiplies_bfloat16

_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """A device that can compute.

    Attributes:
        type: cpu or cuda.
        name: the maker's.
        memory_bytes: in all.
        has_bfloat16: whether it multiplies bfloat16 natively.
        cores: that this process may use; 0 for an accelerator.
        features: instructions that matter here, of those the processor has.
    """

    type: str
    name: str
    memory_bytes: int
    has_bfloat16: bool
    cores: int = 0
    features: tuple[str, ...] = ()


def devices() -> list[DeviceInfo]:
    """The processor, then what torch sees beside it."""
    found = [_cpu()]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        has_bfloat16 = multiplies_bfloat16(torch.device("cuda", index))
        found.append(DeviceInfo("cuda", properties.name, properties.total_memory, has_bfloat16))
    return found


def backends() -> list[str]:
    """Process-group backends that this torch was built with."""
    if not torch.distributed.is_available():
        return []
    built = {
        "gloo": torch.distributed.is_gloo_available(),
        "nccl": torch.distributed.is_nccl_available(),
    }
    return [name for name, is_there in built.items() if is_there]


def _cpu() -> DeviceInfo:
    info = _cpu_info()
    flags = set(info.get("flags", info.get("Features", "")).split())
    usable = getattr(os, "sched_getaffinity", None)
    return DeviceInfo(
        type="cpu",
        name=info.get("model name") or platform.processor() or platform.machine(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        has_bfloat16=multiplies_bfloat16(torch.device("cpu")),
        cores=len(usable(0)) if usable else os.cpu_count() or 1,
        features=tuple(name for name in _FEATURES if name in flags),
    )


def _cpu_info() -> dict[str, str]:
    """What Linux says of its first processor; nothing elsewhere."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}
