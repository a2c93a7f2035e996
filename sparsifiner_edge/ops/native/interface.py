"""The native library's C interface (`sparsifiner.h`) from Python: operators by name, on NumPy arrays, in place.

ONNX Runtime needs none of this, it loads the library itself; OpenVINO's Python operators do.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import POINTER, Structure, byref, c_char, c_float, c_int32, c_int64, c_size_t, c_void_p
from typing import Any, cast

import numpy as np

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.errors import BackendError
from sparsifiner_edge.ops import native

_VERSION = 2
"""SPARSIFINER_VERSION of the header that this follows."""

_PRECISIONS = {"float32": 0, "bfloat16": 1}


class _Call(Structure):
    _fields_ = (
        ("version", c_int32), ("precision", c_int32), ("parallel_for", c_void_p), ("threads", c_void_p),
        ("message", c_char * 512),
    )  # fmt: skip


class _Qkv(Structure):
    _fields_ = (
        ("qkv", c_void_p), ("sizes", c_void_p), ("batch", c_int64), ("tokens", c_int64), ("num_heads", c_int64),
        ("width", c_int64), ("scale", c_float),
    )  # fmt: skip


class _Select(Structure):
    _fields_ = (
        ("num_prefix", c_int64), ("probe", c_int64), ("tile", c_int64), ("cell", c_int64), ("keys", c_int64),
        ("value_power", c_float),
    )  # fmt: skip


class _Attend(Structure):
    _fields_ = (("num_prefix", c_int64), ("tile", c_int64), ("cell", c_int64), ("prefix_keys", c_int64))


class _Match(Structure):
    _fields_ = (("num_prefix", c_int64), ("window", c_int64), ("merged", c_int64))


_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "key_select": (POINTER(_Qkv), c_void_p, c_void_p, c_int64, POINTER(_Select), c_void_p),
    "sparse_attention": (POINTER(_Qkv), c_void_p, c_int64, POINTER(_Attend), c_void_p),
    "dense_attention": (POINTER(_Qkv), c_void_p),
    "token_score": (POINTER(_Qkv), c_void_p),
    "match_tokens": (POINTER(_Qkv), POINTER(_Match), c_void_p),
    "merge_tokens": (c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int64, c_void_p),
}
_NAMES = {
    "KeySelect": "key_select", "SparseAttention": "sparse_attention", "DenseAttention": "dense_attention",
    "TokenScore": "token_score", "MatchTokens": "match_tokens", "MergeTokens": "merge_tokens",
}  # fmt: skip


class Operators:
    """The operators on threads of their own, which wait while nothing is asked of them. Closed by `close`.

    Args:
        threads: the caller's included.
        bfloat16: attention's products are bfloat16 where the kernels' instruction set has it.

    Attributes:
        precision: of attention's products, "bfloat16" or "float32"; of the other operators it is float32.

    Raises:
        BackendError: the library is not built or cannot be loaded, is of another version, or starts no threads.
    """

    def __init__(self, threads: int, bfloat16: bool = False) -> None:
        if (reason := native.why_unusable()) is not None:
            raise BackendError(f"The native library {reason}.", "Or choose the portable kernels.")
        self._library = ctypes.CDLL(str(native.library_path()))
        found = self._library.sparsifiner_version()
        if found != _VERSION:
            raise BackendError(
                f"The native library is of version {found}, not {_VERSION}.", "Install this package again."
            )
        for name, arguments in _FUNCTIONS.items():
            getattr(self._library, f"sparsifiner_{name}").argtypes = (POINTER(_Call), *arguments)
        self.precision = "bfloat16" if bfloat16 and self._library.sparsifiner_has_bfloat16() else "float32"
        self._library.sparsifiner_pool_create.argtypes = [c_size_t]
        self._library.sparsifiner_pool_create.restype = c_void_p
        self._library.sparsifiner_pool_destroy.argtypes = [c_void_p]
        self._pool = self._library.sparsifiner_pool_create(threads)
        if not self._pool:
            raise BackendError(f"{threads} threads cannot be started.", "Ask for fewer.")
        self._library.sparsifiner_hold_memory(1)
        self._loop = ctypes.cast(self._library.sparsifiner_pool_for, c_void_p).value

    def run(self, op: str, attributes: Mapping[str, float], inputs: Sequence[Array], output: Array) -> None:
        """Run one operator.

        Args:
            op, attributes, inputs: see docs/operators.md; float32, indices and pairs int32, C-contiguous.
            output: is filled.

        Raises:
            BackendError: the operator refuses, or lacks memory.
        """
        merged = op.startswith("Merged")
        name = _NAMES[op.removeprefix("Merged")]
        call = _Call(_VERSION, _PRECISIONS[self.precision], self._loop, self._pool)
        arguments = _arguments(name, attributes, inputs, merged)
        status = getattr(self._library, f"sparsifiner_{name}")(byref(call), *arguments, _at(output))
        if status:
            raise BackendError(
                f"sparsifiner::{op}: {call.message.decode(errors='replace')}.", "Export the bundle again."
            )

    def close(self) -> None:
        """End the threads. Closing twice is harmless."""
        pool, self._pool = self._pool, None
        if pool:
            self._library.sparsifiner_hold_memory(-1)
            self._library.sparsifiner_pool_destroy(pool)


def _at(array: Array) -> int:
    if not array.flags.c_contiguous or array.dtype not in (np.float32, np.int32):
        raise BackendError(f"An operator got {array.dtype}, strides {array.strides}.", "Give contiguous float32.")
    return array.ctypes.data


def _arguments(name: str, a: Mapping[str, float], inputs: Sequence[Array], merged: bool) -> list[Any]:
    """What a function takes between the call and its output."""
    if name == "merge_tokens":
        x, sizes, pairs = inputs
        return [_at(x), _at(sizes), _at(pairs), *x.shape, pairs.shape[1]]
    sized = merged or name == "match_tokens"
    batch, tokens, packed = inputs[0].shape
    heads = int(a["num_heads"])
    qkv = _Qkv(
        _at(inputs[0]), _at(inputs[1]) if sized else None, batch, tokens, heads, packed // (3 * heads),
        a.get("scale", 1.0),
    )  # fmt: skip
    rest = inputs[2 if sized else 1 :]
    if name == "key_select":
        proj_q, proj_k = rest
        return [byref(qkv), _at(proj_q), _at(proj_k), proj_q.shape[2], byref(_settings(_Select, a))]
    if name == "sparse_attention":
        return [byref(qkv), _at(rest[0]), rest[0].shape[3], byref(_settings(_Attend, a))]
    return [byref(qkv), byref(_settings(_Match, a))] if name == "match_tokens" else [byref(qkv)]


def _settings(kind: type[Structure], a: Mapping[str, float]) -> Structure:
    return kind(*(a[name] if of is c_float else int(a[name]) for name, of in cast(Any, kind)._fields_))
