"""C kernels for inference on a CPU, built for this machine when they are first needed.

torch's own products with few rows read memory at a third of its rate, its attention over many
sequences is one call for each, and its small operations cost more to call than to compute. The
source is plain C; the machine's compiler makes a library of it, in the cache folder, in a few
seconds. Without a compiler torch's kernels are used, with a warning: same results to rounding,
slower.

No flag lets the compiler reorder sums, or round products as it likes: the order in the source is
what makes a row's result the same whatever rows are computed beside it.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import platform
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paceline.core.env import cache_folder
from paceline.core.files import new_file

_FOLDER = Path(__file__).parent
_SOURCES = tuple(_FOLDER / name for name in ("decode.c", "product.c", "attend_paged.c", "choose.c"))
_HEADERS = (_FOLDER / "vectors.h",)
_COMPILERS = ("cc", "gcc", "clang")
# Not -ffast-math: linked into a library it makes the whole process drop denormal numbers.
_FLAGS = (
    "-O3",
    "-march=native",
    "-fopenmp",
    "-shared",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-freciprocal-math",
    "-ffp-contract=off",
)
_POINTER, _LONG, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "product": (*[_POINTER] * 5, *[_LONG] * 3, _INT),
    "product_i8": (*[_POINTER] * 5, *[_LONG] * 3, _INT),
    "rms_norm": (*[_POINTER] * 3, *[_LONG] * 2, *[_FLOAT] * 2, _INT),
    "rotate": (*[_POINTER] * 4, *[_LONG] * 4, _INT),
    "attend": (*[_POINTER] * 4, *[_LONG] * 4, _FLOAT, _INT),
    "attend_paged": (*[_POINTER] * 9, *[_LONG] * 10, _FLOAT, _INT),
    "gate_silu": (*[_POINTER] * 2, *[_LONG] * 2, _INT),
    "gate_gelu_tanh": (*[_POINTER] * 2, *[_LONG] * 2, _INT),
    "highest": (*[_POINTER] * 2, *[_LONG] * 2, _INT),
    "draw": (*[_POINTER] * 5, *[_LONG] * 2, _INT),
}
_SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}
_PLAIN = (Tensor, nn.Parameter)

_log = logging.getLogger(__name__)

Kernels = dict[tuple[str, torch.dtype], Any]
"""Operation and dtype to the C function."""


def takes(*tensors: Tensor) -> bool:
    """Whether the kernels can compute on these: no gradients, plain CPU tensors, one dtype."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    dtype = tensors[0].dtype
    if dtype not in _SUFFIXES:
        return False
    for tensor in tensors:
        is_plain = type(tensor) in _PLAIN and tensor.device.type == "cpu"
        if not is_plain or tensor.dtype != dtype or not tensor.is_contiguous():
            return False
    return kernels() is not None


def call(operation: str, dtype: torch.dtype, *arguments: Any) -> None:
    """Runs a kernel; tensors are passed by address, None as no address."""
    found = kernels()
    assert found is not None, "takes() has not been asked"
    found[operation, dtype](
        *(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments),
    )


def threads(num_rows: int, rows_per_thread: int) -> int:
    """How many threads so many rows are worth, of those that torch may use."""
    return max(1, min(torch.get_num_threads(), num_rows // rows_per_thread))


@lru_cache(maxsize=1)
def kernels() -> Kernels | None:
    """The functions of the library, or None where it cannot be built."""
    try:
        library = ctypes.CDLL(str(_library()))
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning("decoding with torch's kernels, slower: %s", error)
        return None
    found: Kernels = {}
    for operation, signature in _SIGNATURES.items():
        for dtype, suffix in _SUFFIXES.items():
            function = getattr(library, f"{operation}_{suffix}")
            function.argtypes, function.restype = signature, None
            found[operation, dtype] = function
    return found


def compiler() -> str | None:
    """The machine's C compiler, if it has one."""
    return next((path for name in _COMPILERS if (path := shutil.which(name))), None)


def _library() -> Path:
    """The built library, from the cache if it is there.

    Raises:
        OSError: no compiler, or no place for the library.
        SubprocessError: the compiler fails.
    """
    found = compiler()
    if found is None:
        raise OSError(f"no C compiler ({', '.join(_COMPILERS)}) is installed")
    path = cache_folder() / "kernels" / f"kernels-{_identity(found)}.so"
    if not path.exists():
        with new_file(path) as temporary:
            command = [found, *_FLAGS, *map(str, _SOURCES), "-o", str(temporary), "-lm"]
            subprocess.run(command, check=True, capture_output=True, timeout=60)
    return path


def _identity(path: str) -> str:
    """What the library depends on: its source, the compiler, and the CPU that it is built for."""
    version = subprocess.run([path, "--version"], capture_output=True, check=True, timeout=60)
    sources = [path.read_bytes() for path in (*_SOURCES, *_HEADERS)]
    parts = [*sources, " ".join(_FLAGS).encode(), version.stdout, _cpu().encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return f"{platform.machine()} {platform.processor()}"
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
