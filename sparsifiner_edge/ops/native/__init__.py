"""The native kernels: a custom-op library for ONNX Runtime's CPU execution provider.

It is built with the package if a compiler, Highway and the headers of ONNX Runtime are found. Without it the operators
run as function bodies.
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
"""Environment variable that limits the kernels to an instruction set such as AVX2, for tests and comparisons."""
_FILE = "libsparsifiner_ops.so"
"""File name of the library in this package."""
_SECTIONS = struct.Struct("<40x Q 10x 2H")
"""Fields of a 64-bit little-endian ELF header: offset of the section table, size of an entry, number of entries.

The section table is the last part of the file.
"""
NOT_BUILT = (
    "not built: install a C++17 compiler, Highway and ONNX Runtime's headers (Debian, Ubuntu: apt-get install g++ "
    "cmake libhwy-dev libonnxruntime-dev) and install this package again; pip's -v shows what was missing"
)
"""Reason and fix for a missing library, as the end of a sentence."""


def library_path() -> Path | None:
    """Return the path of the library, or None if it was not built."""
    path = Path(str(importlib.resources.files("sparsifiner_edge.ops.native").joinpath(_FILE)))
    return path if path.is_file() else None


def openvino_extension() -> Path | None:
    """Return the path of the OpenVINO extension, or None if there is no intact one for the installed OpenVINO.

    The version suffix of OpenVINO's library determines which extension matches.
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
    """Return the reason why the library cannot be used, or None if it can.

    It may be missing, damaged, or lack a library that it depends on. The reason continues a sentence, such as "is not
    built: ...".

    Raises:
        ValueError: `SPARSIFINER_TARGET` names an instruction set that this machine or the library lacks.
    """
    if library_path() is None:
        return f"is {NOT_BUILT}"
    try:
        target()
    except OSError as error:
        return f"cannot be loaded: {error}"
    return None


def _require_whole(path: Path) -> None:
    """Reject a truncated library file: loading it would map missing pages, and reading those kills the process.

    Raises:
        OSError: The file is truncated, or it is not a 64-bit little-endian ELF file.
    """
    content = path.read_bytes()
    if content[:6] != b"\x7fELF\x02\x01" or len(content) < _SECTIONS.size:
        raise OSError(f"{path} is not a 64-bit ELF library; install this package again")
    place, entry, count = _SECTIONS.unpack_from(content)
    if (end := place + entry * count) > len(content):
        raise OSError(f"{path} is cut short ({len(content)} of {end} bytes); install this package again")


def has_bfloat16() -> bool:
    """Return True if the instruction set of the kernels has bfloat16 products.

    Raises:
        ValueError: See `target`.
        OSError: See `target`.
    """
    target()  # Applies SPARSIFINER_TARGET to the library.
    return bool(ctypes.CDLL(str(library_path())).sparsifiner_has_bfloat16())


@functools.cache
def target() -> str:
    """Return the instruction set of the kernels: "AVX2", "AVX3" (AVX-512), "AVX3_ZEN4" (with bfloat16), "AMX", ...

    The first call limits the library to the instruction set in `SPARSIFINER_TARGET`, for the whole process.

    Raises:
        ValueError: `SPARSIFINER_TARGET` names an instruction set that this machine or the library lacks.
        OSError: The library is missing, damaged, or cannot be loaded.
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
        raise ValueError(f"{TARGET_VARIABLE} is {wanted!r}: no instruction set of this machine and this library")
    name: bytes = library.sparsifiner_target()
    return name.decode()
