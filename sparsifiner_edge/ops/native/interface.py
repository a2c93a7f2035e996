"""The native library's C interface (`sparsifiner.h`) from Python: operators by name, on NumPy arrays, in place.

ONNX Runtime needs none of this, it loads the library itself; OpenVINO's Python operators do.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from ctypes import Structure, byref, c_char, c_float, c_int32, c_int64, c_size_t, c_void_p
from typing import Any, cast

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.errors import BackendError
from sparsifiner_edge.ops import native
from sparsifiner_edge.ops.operator import Tensor
from sparsifiner_edge.ops.schema import OPERATORS

_VERSION = 5
"""SPARSIFINER_VERSION of the header that this follows."""

_PRECISIONS = {"float32": 0, "bfloat16": 1}


def _fields(whole: str, single: str = "") -> tuple[tuple[str, Any], ...]:
    """Fields of a structure: names of whole numbers of 64 bits, then of single-precision ones."""
    return (*((name, c_int64) for name in whole.split()), *((name, c_float) for name in single.split()))


class _Call(Structure):
    _fields_ = (
        ("version", c_int32),
        ("precision", c_int32),
        ("parallel_for", c_void_p),
        ("threads", c_void_p),
        ("message", c_char * 512),
    )


class _Tensor(Structure):
    _fields_ = (("data", c_void_p), ("count", c_int64))


class _Output(Structure):
    _fields_ = (("data", c_void_p), ("count", c_int64), ("rounded", c_int64))


class _Qkv(Structure):
    _fields_ = (("qkv", _Tensor), ("sizes", _Tensor), *_fields("batch tokens num_heads width", "scale"))


class _Select(Structure):
    _fields_ = _fields("num_prefix probe tile cell keys channels", "value_power")


class _Attend(Structure):
    _fields_ = _fields("num_prefix tile cell keys prefix_keys")


class _Cache(Structure):
    _fields_ = (("cache", _Tensor), ("counts", _Tensor), *_fields("tokens halves"))


class _Match(Structure):
    _fields_ = _fields("num_prefix window merged")


class _Pairs(Structure):
    _fields_ = (
        ("x", _Tensor),
        ("sizes", _Tensor),
        ("pairs", _Tensor),
        *_fields("batch tokens channels merged_tokens"),
    )


_FUNCTIONS: dict[str, tuple[str, type[Structure] | None]] = {
    "KeySelect": ("sparsifiner_key_select", _Select),
    "SparseAttention": ("sparsifiner_sparse_attention", _Attend),
    "DenseAttention": ("sparsifiner_dense_attention", None),
    "CachedAttention": ("sparsifiner_cached_attention", None),
    "MatchTokens": ("sparsifiner_match_tokens", _Match),
    "MergeTokens": ("sparsifiner_merge_tokens", None),
}
"""Of each operator, the library's function, and the structure of its settings."""


class Operators:
    """The operators on threads of their own, which wait while idle. Closed by `close`.

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
        if (version := self._library.sparsifiner_version()) != _VERSION:
            raise BackendError(
                f"The native library is of version {version}, not {_VERSION}.", "Install this package again."
            )
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
            output: of the operator's shape; is filled.

        Raises:
            BackendError: attributes, types and shapes are not those of the operator's schema, or it lacks memory.
        """
        require_valid(op, attributes, [x.shape for x in inputs])
        kinds = (*OPERATORS[op].inputs, OPERATORS[op].output)
        tensors = [_tensor(op, x, kind) for x, kind in zip((*inputs, output), kinds, strict=True)]
        call = _Call(_VERSION, _PRECISIONS[self.precision], self._loop, self._pool)
        arguments = _arguments(op, attributes, inputs, tensors)
        if getattr(self._library, _FUNCTIONS[op][0])(byref(call), *arguments):
            raise _refusal(op, call.message.decode(errors="replace"))

    def close(self) -> None:
        """End the threads. Closing twice is harmless."""
        pool, self._pool = self._pool, None
        if pool:
            self._library.sparsifiner_hold_memory(-1)
            self._library.sparsifiner_pool_destroy(pool)


def require_valid(op: str, attributes: Mapping[str, float], shapes: Sequence[Sequence[int]]) -> None:
    """Refuse what the operator's schema does.

    Raises:
        BackendError: attributes or shapes of inputs are not allowed; says which.
    """
    if reasons := _refusals(op, tuple(attributes.items()), *map(tuple, shapes)):
        raise _refusal(op, "; ".join(reasons))


def _refusal(op: str, reason: str) -> BackendError:
    return BackendError(f"sparsifiner::{op}: {reason}.", "Export the bundle again.")


@functools.lru_cache(maxsize=1024)
def _refusals(op: str, attributes: tuple[tuple[str, float], ...], *shapes: tuple[int, ...]) -> list[str]:
    """What the schema refuses; kept, for a model asks the same at every image."""
    return OPERATORS[op].refusals(dict(attributes), shapes)


def _tensor(op: str, array: Array, schema: Tensor) -> _Tensor:
    """An array as the library takes it: of the element types by the schema it has those of four bytes, and float16 of
    what is stored.
    """
    allowed = (schema.dtypes[0], "float16") if schema.stored else schema.dtypes[:1]
    if array.dtype.name not in allowed or not array.flags.c_contiguous:
        wanted = " or ".join(allowed)
        raise _refusal(op, f"got {array.dtype}, strides {array.strides}, for contiguous {wanted}")
    return _Tensor(array.ctypes.data, array.size)


def _arguments(
    op: str, attributes: Mapping[str, float], inputs: Sequence[Array], tensors: Sequence[_Tensor]
) -> list[Any]:
    """What a function takes after the call: of shapes that the schema allows, and tensors, the output's last."""
    shapes = [x.shape for x in inputs]
    *tensors, last = tensors
    output = _Output(last.data, last.count, 0)
    if op == "MergeTokens":
        return [byref(_Pairs(*tensors[:3], *shapes[0], shapes[2][1])), output]
    sizes = OPERATORS[op].sizes(attributes, shapes)
    if op == "CachedAttention":
        qkv = _Qkv(tensors[0], _Tensor(), *(sizes[symbol] for symbol in "BNHd"), attributes["scale"])
        return [byref(qkv), byref(_Cache(*tensors[1:3], sizes["S"], inputs[1].dtype == "float16")), output]
    qkv = _Qkv(*tensors[:2], *(sizes[symbol] for symbol in "BNHd"), attributes.get("scale", 1.0))
    kind, settings = _FUNCTIONS[op][1], {**attributes, "keys": sizes.get("K", 0), "channels": sizes.get("c", 0)}
    return [byref(qkv), *([] if kind is None else [byref(_fill(kind, settings))]), *tensors[2:], output]


def _fill(kind: type[Structure], values: Mapping[str, float]) -> Structure:
    fields = cast(Any, kind)._fields_
    return kind(*(values[name] if of is c_float else int(values[name]) for name, of in fields))
