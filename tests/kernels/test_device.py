from __future__ import annotations

import mmap
import platform

import pytest
import torch

from paceline.core.errors import UsageError
from paceline.dist.testing import run_ranks
from paceline.kernels import device as devices

pytestmark = pytest.mark.cpu

CPU = torch.device("cpu")
needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")


def test_cpu_is_cpu():
    assert devices.choose_device("cpu", local_rank=1) == CPU


@needs_no_cuda
def test_auto_is_the_cpu_where_there_is_no_cuda():
    assert devices.choose_device() == devices.choose_device("auto", local_rank=3) == CPU
    with pytest.raises(UsageError, match="torch sees no CUDA device") as caught:
        devices.choose_device("cuda")
    assert caught.value.hint == "--device cpu"


@pytest.mark.gpu
def test_auto_is_this_rank_s_cuda_device():
    assert devices.choose_device(local_rank=0) == torch.device("cuda", 0)


@pytest.mark.parametrize("name", ["gpu", "cdua", "cuda:1", ""])
def test_an_unknown_device_names_the_known_ones(name):
    with pytest.raises(UsageError, match="unknown device") as caught:
        devices.choose_device(name)
    assert caught.value.hint == "one of auto, cpu, cuda"


@pytest.mark.parametrize("name", ["float64", "float32", "float16", "bfloat16"])
def test_a_dtype_is_torch_s_of_its_name(name):
    assert devices.choose_dtype(name, CPU) == getattr(torch, name)
    with pytest.raises(KeyError):
        devices.choose_dtype(name.upper(), CPU)


@pytest.mark.parametrize("is_native", [True, False])
def test_auto_is_bfloat16_where_it_is_native(tmp_path, monkeypatch, is_native):
    info = tmp_path / "cpuinfo"
    flags = "fpu avx2 avx512f amx_bf16" if is_native else "fpu avx2 avx512f bf16x"
    info.write_text(f"processor : 0\nflags : {flags}\nbogomips : 1\n")
    monkeypatch.setattr(devices, "Path", lambda _: info)
    assert devices.multiplies_bfloat16(CPU) == is_native
    assert devices.choose_dtype("auto", CPU) == (torch.bfloat16 if is_native else torch.float32)


def test_auto_is_float32_where_nothing_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "Path", lambda _: tmp_path / "nothing")
    assert devices.choose_dtype("auto", CPU) == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_measured_peak_is_a_plausible_one(dtype):
    flops_per_s = devices.measure_peak_flops(CPU, dtype, budget_s=0.05)
    assert 1e8 < flops_per_s < 1e14


@pytest.mark.ranks
def test_peak_memory_is_in_bytes_and_never_falls():
    def work(_rank: int) -> list[int]:
        peaks = [devices.peak_memory_bytes(CPU)]
        with mmap.mmap(-1, 256 << 20) as block:  # fresh, whatever the allocator has kept
            for _ in range(256):
                block.write(bytes(1 << 20))
            peaks.append(devices.peak_memory_bytes(CPU))
        return [*peaks, devices.peak_memory_bytes(CPU)]

    ((before, during, after),) = run_ranks(work, 1)
    assert before > 32 << 20
    assert during - before == pytest.approx(256 << 20, rel=0.1)
    assert after >= during


def test_a_cpu_is_described_by_its_kind_and_threads():
    threads = torch.get_num_threads()
    assert devices.describe(CPU) == f"{platform.machine()} CPU, {threads} threads"
    devices.synchronize(CPU)
