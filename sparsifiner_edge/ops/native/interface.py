"""Python binding of the native library's C interface (`sparsifiner.h`): operators by name, on NumPy arrays.

OpenVINO's Python operators and `ops.torch_native` use it. ONNX Runtime loads the library itself.
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
"""SPARSIFINER_VERSION of the header that this module mirrors."""

_PRECISIONS = {"float32": 0, "bfloat16": 1}
"""Values of `sparsifiner_precision`."""


def _fields(integers: str, floats: str = "") -> tuple[tuple[str, Any], ...]:
    """Return the fields of a structure: first the named 64-bit integers, then the named 32-bit floats."""
    return (*((name, c_int64) for name in integers.split()), *((name, c_float) for name in floats.split()))


class _Call(Structure):
    """Mirror of `sparsifiner_call`."""

    _fields_ = (
        ("version", c_int32),
        ("precision", c_int32),
        ("parallel_for", c_void_p),
        ("threads", c_void_p),
        ("message", c_char * 512),
    )


class _Tensor(Structure):
    """Mirror of `sparsifiner_floats`, `sparsifiner_ints` and `sparsifiner_rows`."""

    _fields_ = (("data", c_void_p), ("count", c_int64))


class _Output(Structure):
    """Mirror of `sparsifiner_output`."""

    _fields_ = (("data", c_void_p), ("count", c_int64), ("rounded", c_int64))


class _Qkv(Structure):
    """Mirror of `sparsifiner_qkv`."""

    _fields_ = (("qkv", _Tensor), ("sizes", _Tensor), *_fields("batch tokens num_heads width", "scale"))


class _Select(Structure):
    """Mirror of `sparsifiner_select`."""

    _fields_ = _fields("num_prefix query_pool tile key_pool keys channels", "value_power")


class _Attend(Structure):
    """Mirror of `sparsifiner_attend`."""

    _fields_ = _fields("num_prefix tile key_pool keys prefix_keys")


class _Cache(Structure):
    """Mirror of `sparsifiner_cache`."""

    _fields_ = (("cache", _Tensor), ("counts", _Tensor), *_fields("tokens halves"))


class _Match(Structure):
    """Mirror of `sparsifiner_match`."""

    _fields_ = _fields("num_prefix window merged")


class _Pairs(Structure):
    """Mirror of `sparsifiner_pairs`."""

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
"""Function of the library and structure of its settings, by operator name."""


class Operators:
    """The native operators with their own thread pool.

    Idle threads wait without load. Call `close` to end them.

    Args:
        threads: Number of threads, including the calling one.
        bfloat16: Compute the products of attention in bfloat16 if the instruction set of the kernels supports it.

    Attributes:
        precision: Precision of the products of attention, "bfloat16" or "float32". Other operators use float32.

    Raises:
        BackendError: The library is not built, cannot be loaded, has another version, or cannot start the threads.
    """

    def __init__(self, threads: int, bfloat16: bool = False) -> None:
        if (reason := native.why_unusable()) is not None:
            raise BackendError(f"The native library {reason}.", "Alternatively, choose the portable kernels.")
        self._library = ctypes.CDLL(str(native.library_path()))
        if (version := self._library.sparsifiner_version()) != _VERSION:
            raise BackendError(
                f"The native library has version {version}; version {_VERSION} is required.",
                "Install this package again.",
            )
        self.precision = "bfloat16" if bfloat16 and self._library.sparsifiner_has_bfloat16() else "float32"
        self._library.sparsifiner_pool_create.argtypes = [c_size_t]
        self._library.sparsifiner_pool_create.restype = c_void_p
        self._library.sparsifiner_pool_destroy.argtypes = [c_void_p]
        self._pool = self._library.sparsifiner_pool_create(threads)
        if not self._pool:
            raise BackendError(f"{threads} threads cannot be started.", "Use fewer threads.")
        self._library.sparsifiner_hold_memory(1)
        self._loop = ctypes.cast(self._library.sparsifiner_pool_for, c_void_p).value

    def run(self, op: str, attributes: Mapping[str, float], inputs: Sequence[Array], output: Array) -> None:
        """Run one operator.

        Args:
            op: Name of the operator; docs/operators.md defines its attributes and inputs.
            attributes: Attributes by name.
            inputs: Inputs in order, C-contiguous. They are float32, except int32 indices and pairs, and a cache that
                may be float16.
            output: C-contiguous array of the output's shape and type, which receives the result.

        Raises:
            BackendError: Attributes, types or shapes do not match the operator's schema, or memory is exhausted.
        """
        require_valid(op, attributes, [x.shape for x in inputs])
        kinds = (*OPERATORS[op].inputs, OPERATORS[op].output)
        tensors = [_tensor(op, x, kind) for x, kind in zip((*inputs, output), kinds, strict=True)]
        call = _Call(_VERSION, _PRECISIONS[self.precision], self._loop, self._pool)
        arguments = _arguments(op, attributes, inputs, tensors)
        if getattr(self._library, _FUNCTIONS[op][0])(byref(call), *arguments):
            raise _refusal(op, call.message.decode(errors="replace"))

    def close(self) -> None:
        """End the threads. Further calls have no effect."""
        pool, self._pool = self._pool, None
        if pool:
            self._library.sparsifiner_hold_memory(-1)
            self._library.sparsifiner_pool_destroy(pool)


def require_valid(op: str, attributes: Mapping[str, float], shapes: Sequence[Sequence[int]]) -> None:
    """Validate attributes and input shapes against the operator's schema.

    Raises:
        BackendError: An attribute or a shape is invalid; the message lists all reasons.
    """
    if reasons := _refusals(op, tuple(attributes.items()), *map(tuple, shapes)):
        raise _refusal(op, "; ".join(reasons))


def _refusal(op: str, reason: str) -> BackendError:
    """Return the error for an invalid call."""
    return BackendError(f"sparsifiner::{op}: {reason}.", "Export the bundle again.")


@functools.lru_cache(maxsize=1024)
def _refusals(op: str, attributes: tuple[tuple[str, float], ...], *shapes: tuple[int, ...]) -> list[str]:
    """Return the reasons why a call is invalid. Cached, because a model repeats the same calls for every image."""
    return OPERATORS[op].refusals(dict(attributes), shapes)


def _tensor(op: str, array: Array, schema: Tensor) -> _Tensor:
    """Return an array as the library's tensor structure.

    The library supports only the first element type of the schema (float32 or int32), and float16 for stored tensors.
    """
    allowed = (schema.dtypes[0], "float16") if schema.stored else schema.dtypes[:1]
    if array.dtype.name not in allowed or not array.flags.c_contiguous:
        wanted = " or ".join(allowed)
        raise _refusal(op, f"{schema.name} must be contiguous {wanted}, got {array.dtype} with strides {array.strides}")
    return _Tensor(array.ctypes.data, array.size)


def _arguments(
    op: str, attributes: Mapping[str, float], inputs: Sequence[Array], tensors: Sequence[_Tensor]
) -> list[Any]:
    """Return the arguments of the library function after the call structure.

    Args:
        op: Name of the operator.
        attributes: Valid attributes.
        inputs: Inputs of valid shapes.
        tensors: Tensor structures of the inputs, followed by that of the output.
    """
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
    """Return a settings structure with the values of its fields."""
    fields = cast(Any, kind)._fields_
    return kind(*(values[name] if c_type is c_float else int(values[name]) for name, c_type in fields))
