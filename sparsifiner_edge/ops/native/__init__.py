"""The native kernels: a custom-op library for ONNX Runtime's CPU provider, built with the package where a compiler,
Highway and ONNX Runtime's headers are found. Without it the operators run as function bodies.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.resources
import os
from pathlib import Path

OPERATORS = ("KeySelect", "SparseAttention", "DenseAttention", "TokenScore")
"""What the library implements, for float32; other operators and types run as function bodies."""
TARGET_VARIABLE = "SPARSIFINER_TARGET"
"""Environment variable that names the best instruction set to use, such as AVX2: for tests and comparisons."""
_FILE = "libsparsifiner_ops.so"
_NOT_BUILT = (
    "not built: install a C++17 compiler, Highway and ONNX Runtime's headers (Debian, Ubuntu: apt-get install g++ "
    "cmake libhwy-dev libonnxruntime-dev) and install this package again; pip's -v says what was missing"
)


def library_path() -> Path | None:
    """The library's file, or None where it was not built."""
    path = Path(str(importlib.resources.files("sparsifiner_edge.ops.native").joinpath(_FILE)))
    return path if path.is_file() else None


def why_missing() -> str:
    """What to do about a missing library."""
    return _NOT_BUILT


@functools.cache
def target() -> str:
    """Instruction set that the kernels run on, such as "AVX3" (AVX-512), "AVX2", "NEON".

    Raises:
        ValueError: the variable `SPARSIFINER_TARGET` names none that this machine has.
        OSError: the library is missing or cannot be loaded.
    """
    library = ctypes.CDLL(str(library_path()))
    library.sparsifiner_target.restype = ctypes.c_char_p
    library.sparsifiner_limit_target.argtypes = [ctypes.c_char_p]
    wanted = os.environ.get(TARGET_VARIABLE)
    if wanted and not library.sparsifiner_limit_target(wanted.encode()):
        raise ValueError(f"{TARGET_VARIABLE} is {wanted!r}: no instruction set of this machine and library")
    name: bytes = library.sparsifiner_target()
    return name.decode()
