"""The native kernels: a custom-op library for ONNX Runtime's CPU provider, built with the package where a compiler,
Highway and ONNX Runtime's headers are found. Without it the operators run as function bodies.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.resources
import importlib.util
import os
import struct
from pathlib import Path

TARGET_VARIABLE = "SPARSIFINER_TARGET"
"""Environment variable that names the best instruction set to use, such as AVX2: for tests and comparisons."""
_FILE = "libsparsifiner_ops.so"
_SECTIONS = struct.Struct("<40x Q 10x 2H")
"""Of an ELF file of 64 bits, little endian: where its table of sections lies, which is its end, the size of an entry,
and how many there are.
"""
NOT_BUILT = (
    "not built: install a C++17 compiler, Highway and ONNX Runtime's headers (Debian, Ubuntu: apt-get install g++ "
    "cmake libhwy-dev libonnxruntime-dev) and install this package again; pip's -v says what was missing"
)


def library_path() -> Path | None:
    """The library's file, or None where it was not built."""
    path = Path(str(importlib.resources.files("sparsifiner_edge.ops.native").joinpath(_FILE)))
    return path if path.is_file() else None


def openvino_extension() -> Path | None:
    """The operators as an extension of the OpenVINO that is installed, or None where there is no whole one for it: the
    name of OpenVINO's library says which versions fit.
    """
    spec = importlib.util.find_spec("openvino")
    folders = () if spec is None else spec.submodule_search_locations or ()
    versions = [path.suffix for folder in folders for path in (Path(folder) / "libs").glob("libopenvino.so.*")]
    here = importlib.resources.files("sparsifiner_edge.ops.native")
    for version in versions:
        path = Path(str(here.joinpath(f"libsparsifiner_openvino{version}.so")))
        with contextlib.suppress(OSError):
            _require_whole(path)
            return path
    return None


def why_unusable() -> str | None:
    """Why the library cannot be used here: not built, damaged, or something that it needs is missing; None if it can.

    Raises:
        ValueError: the variable `SPARSIFINER_TARGET` names no instruction set that this machine has.
    """
    if library_path() is None:
        return f"is {NOT_BUILT}"
    try:
        target()
    except OSError as error:
        return f"cannot be loaded: {error}"
    return None


def _require_whole(path: Path) -> None:
    """Refuse a file that is cut short: the system would map what is not there, and reading it ends the process.

    Raises:
        OSError: it is, or it is no library for this kind of system.
    """
    content = path.read_bytes()
    if content[:6] != b"\x7fELF\x02\x01" or len(content) < _SECTIONS.size:
        raise OSError(f"{path} is no 64-bit ELF library; install this package again")
    place, entry, count = _SECTIONS.unpack_from(content)
    if (end := place + entry * count) > len(content):
        raise OSError(f"{path} is cut short ({len(content)} of {end} bytes); install this package again")


def has_bfloat16() -> bool:
    """Whether the kernels' instruction set multiplies bfloat16.

    Raises:
        ValueError, OSError: see `target`.
    """
    target()  # The variable counts for the library as soon as it is loaded.
    return bool(ctypes.CDLL(str(library_path())).sparsifiner_has_bfloat16())


@functools.cache
def target() -> str:
    """Instruction set that the kernels run on, such as "AVX3" (AVX-512), "AVX3_ZEN4" (with bfloat16), "AMX", "AVX2".

    The first call limits the library to what `SPARSIFINER_TARGET` names, for the whole process.

    Raises:
        ValueError: the variable `SPARSIFINER_TARGET` names none that this machine has.
        OSError: the library is missing, damaged, or cannot be loaded.
    """
    path = library_path()
    if path is None:
        raise OSError(NOT_BUILT)
    _require_whole(path)
    library = ctypes.CDLL(str(path))
    library.sparsifiner_target.restype = ctypes.c_char_p
    library.sparsifiner_limit_target.argtypes = [ctypes.c_char_p]
    wanted = os.environ.get(TARGET_VARIABLE)
    if wanted and not library.sparsifiner_limit_target(wanted.encode()):
        raise ValueError(f"{TARGET_VARIABLE} is {wanted!r}: no instruction set of this machine and library")
    name: bytes = library.sparsifiner_target()
    return name.decode()
