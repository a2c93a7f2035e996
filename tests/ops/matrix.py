"""Test matrix of the operators, derived from their schemas, and runners for each implementation."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper

from sparsifiner_edge.ops import reference, torch_landmarks, torch_merge
from sparsifiner_edge.ops import torch as torch_ops
from sparsifiner_edge.ops.bodies import OPSET, Structure, function_body
from sparsifiner_edge.ops.native.interface import Operators
from sparsifiner_edge.ops.operator import Operator
from sparsifiner_edge.ops.schema import DOMAIN, OPERATORS, VERSION

PATCHES = (130, 37, 64, 1)
BATCHES = (1, 2)
LANDMARKS = 12


@dataclass(frozen=True)
class Case:
    """One point of the matrix.

    Attributes:
        width: Channels of a head.
        channels: Channels of the predictor.
        stored: Element type of stored tensors, if it differs.
    """

    op: Operator
    attributes: dict[str, Any]
    patches: int
    batch: int = 1
    dtype: str = "float32"
    merged: bool = True
    width: int = 8
    channels: int = 4
    stored: str | None = None

    def __str__(self) -> str:
        values = "-".join(f"{k}{v:g}" for k, v in self.attributes.items() if k != "scale")
        kinds = self.dtype + (f"-{self.stored}" if self.stored else "")
        return f"{self.op.name}{'' if self.merged else '-single'}-P{self.patches}-B{self.batch}-{kinds}-{values}"

    def inputs(self, seed: int = 0) -> list[np.ndarray]:
        """Return random inputs: keys and values with a common offset and a few outliers, as in real models."""
        rng = np.random.default_rng(seed)
        if self.op.name == "MergeTokens":
            return self._merge_inputs(rng)
        heads, width, tokens = self.attributes["num_heads"], self.width, self.patches + self.prefix
        qkv = rng.normal(size=(self.batch, tokens, 3, heads, width)) + rng.normal(size=(3, heads, width))
        qkv[:, :: max(tokens // 5, 1)] *= 3
        packed = qkv.reshape(self.batch, tokens, -1).astype(self.dtype)
        first = [packed, self._sizes(rng, tokens)]
        if self.op.name == "CachedAttention":
            return [packed, *self._kept(rng, packed.shape[2] // 3)]
        if self.op.name == "KeySelect":
            return [*first, *(rng.normal(size=(heads, width, self.channels)).astype(self.dtype) for _ in range(2))]
        if self.op.name == "SparseAttention":
            return [*first, self._lists(rng, heads, tokens)]
        if self.landmarks:
            shapes = [(self.channels, width), (self.channels,)] * 2 + [(tokens, LANDMARKS)] * 2
            # Use a deviation of .02 as published, so that the basis's threshold of .02 drops two thirds.
            scales = [1, 1, 1, 1, 0.3, 0.02]
            weights = [s * rng.normal(size=shape) for s, shape in zip(scales, shapes, strict=True)]
            return [packed, *(w.astype(self.dtype) for w in weights)]
        return first

    def _sizes(self, rng: np.random.Generator, tokens: int) -> np.ndarray:
        """Return sizes of merged tokens, or ones if nothing was merged."""
        sizes = rng.choice([1, 1, 1, 2, 3, 7, 40] if self.merged else [1], (self.batch, tokens)).astype(np.float32)
        sizes[:, : self.prefix] = 1
        return sizes

    def _kept(self, rng: np.random.Generator, channels: int) -> list[np.ndarray]:
        """Return weights of the cache in which a part is not read; a single patch is always read."""
        count = 1 if self.patches == 37 else 90
        counts = rng.choice([0, 1], (self.batch, count)).astype(np.float32) * (self.patches > 1)
        return [rng.normal(size=(self.batch, count, 2 * channels)).astype(self.stored or self.dtype), counts]

    def _merge_inputs(self, rng: np.random.Generator) -> list[np.ndarray]:
        """Return tokens, sizes, and pairs; every third pair is a single token."""
        tokens = self.patches + 1
        x = rng.normal(size=(self.batch, tokens, 3 * self.width)).astype(self.dtype)
        pairs = np.sort(rng.integers(0, tokens, (self.batch, max(tokens * 2 // 3, 1), 2)), 1).astype(np.int32)
        pairs[:, ::3, 1] = pairs[:, ::3, 0]
        return [x, self._sizes(rng, tokens), pairs]

    @property
    def prefix(self) -> int:
        """Number of leading tokens that are not patches; the published predictor has one."""
        return 1 if self.landmarks else int(self.attributes.get("num_prefix", 0))

    @property
    def landmarks(self) -> bool:
        """True for the published predictor."""
        return self.op.name == "LandmarkKeySelect"

    def _lists(self, rng: np.random.Generator, heads: int, tokens: int) -> np.ndarray:
        tiles = math.ceil(self.patches / self.attributes["tile"])
        keys = self.patches if self.attributes["prefix_keys"] else tokens
        count = {0: keys, 1: 1, 2: max(keys // 4, 1)}[int(rng.integers(3))]
        choose = [rng.permutation(keys)[:count] for _ in range(self.batch * heads * tiles)]
        return np.sort(np.stack(choose), -1).reshape(self.batch, heads, tiles, count).astype(np.int32)


PAPER = [
    Case(OPERATORS["SparseAttention"], a, patches, batch, merged=merged)
    for patches, batch, merged in ((37, 1, False), (64, 2, False), (64, 2, True))
    for a in [{"num_heads": 3, "num_prefix": 1, "tile": 1, "key_pool": 0, "scale": 0.125, "prefix_keys": 0}]
]
"""Without prefix_keys, tile must be 1 and key_pool 0, so this point is not a single departure."""


def cases(op_name: str, full: bool = False, merged: bool | None = None, **more: Any) -> list[Case]:
    """Return the allowed points: all combinations of tested values, or (default) one departure at a time.

    Args:
        op_name: Operator.
        full: Combine all values.
        merged: Use merged or single tokens; None: both, if the operator distinguishes them.
        more: Fields of `Case`.
    """
    if merged is None and op_name in ("KeySelect", "SparseAttention", "DenseAttention"):
        return [case for each in (False, True) for case in cases(op_name, full, each, **more)]
    op = OPERATORS[op_name]
    if "stored" not in more and any(tensor.stored for tensor in op.inputs):
        return [case for stored in (None, "float16") for case in cases(op_name, full, merged, stored=stored, **more)]
    options = [a.tested for a in op.attributes] + [PATCHES, BATCHES]
    points: Iterable[tuple[Any, ...]] = itertools.product(*options)
    if not full:
        base = tuple(values[0] for values in options)
        points = [base] + [
            (*base[:axis], value, *base[axis + 1 :]) for axis, values in enumerate(options) for value in values[1:]
        ]
    names = [a.name for a in op.attributes]
    made = (Case(op, dict(zip(names, p, strict=False)), *p[-2:], merged=merged is not False, **more) for p in points)
    return [case for case in made if allowed(case)]


def allowed(case: Case) -> bool:
    """Return True if the schema accepts the case."""
    if "keys" in case.attributes and case.attributes["keys"] > case.patches:
        return False
    if case.attributes.get("prefix_keys", 1) == 0 and (case.attributes["tile"] != 1 or case.attributes["key_pool"]):
        return False
    if case.attributes.get("merged", 0) > case.patches // 2:
        return False
    return not case.op.refusals(case.attributes, [x.shape for x in case.inputs()])


def run_reference(case: Case, inputs: list[np.ndarray]) -> np.ndarray:
    """Run the NumPy reference."""
    return _apply([reference], case.op.name, inputs, case.attributes)


def run_torch(case: Case, inputs: list[np.ndarray]) -> np.ndarray:
    """Run the PyTorch implementation; without merged tokens, it gets no sizes."""
    tensors, settings = [torch.from_numpy(x) for x in inputs], case.attributes
    if case.op.name in ("KeySelect", "SparseAttention", "DenseAttention"):
        sizes = tensors.pop(1)
        settings = {**settings, "sizes": sizes if case.merged else None}
    return _apply([torch_ops, torch_merge, torch_landmarks], case.op.name, tensors, settings).numpy()


def _apply(modules: list[Any], operator: str, inputs: list[Any], settings: dict[str, Any]) -> Any:
    """Run an operator from the module that implements it."""
    name = "".join(f"_{c.lower()}" if c.isupper() else c for c in operator).lstrip("_")
    return next(getattr(module, name) for module in modules if hasattr(module, name))(*inputs, **settings)


def run_native(case: Case, inputs: list[np.ndarray], operators: Operators | None = None) -> np.ndarray:
    """Run the native kernels through the C interface; None: on two threads, in float32."""
    output = np.full(case.op.output_shape(case.attributes, [x.shape for x in inputs]), -1, output_type(case))
    with contextlib.closing(Operators(2)) if operators is None else contextlib.nullcontext(operators) as ours:
        ours.run(case.op.name, case.attributes, inputs, output)
    return output


def output_type(case: Case) -> type[np.generic]:
    """Return the output type of the native kernels."""
    return np.int32 if case.op.output.dtypes == ("int32",) else np.float32


def run_body(case: Case, inputs: list[np.ndarray]) -> np.ndarray:
    """Run the function body in ONNX Runtime, from a file with dynamic batch."""
    session = onnxruntime.InferenceSession(body_model(case, inputs), providers=["CPUExecutionProvider"])
    return session.run(None, feed(case.op.name, inputs))[0]


def feed(op: str, inputs: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Return inputs by name, as for a session."""
    return dict(zip([tensor.name for tensor in OPERATORS[op].inputs], inputs, strict=True))


def body_model(case: Case, inputs: list[np.ndarray]) -> bytes:
    """Return a model of one node and its function body."""
    structure = Structure(
        prefix=case.attributes.get("num_prefix", 0) > 0,
        background_tokens=case.attributes.get("key_pool", 0) > 0,
        prefix_keys=bool(case.attributes.get("prefix_keys", 1)),
        merged=case.merged,
    )
    shapes = [
        ["batch" if axis == "B" else n for axis, n in zip(t.axes, x.shape, strict=True)]
        for t, x in zip(case.op.inputs, inputs, strict=True)
    ]
    return one_node(case.op.name, case.attributes, inputs, shapes, [function_body(case.op.name, structure)])


def one_node(
    name: str,
    attributes: dict[str, Any],
    inputs: list[np.ndarray],
    shapes: list[Any] | None = None,
    functions: list[onnx.FunctionProto] | None = None,
) -> bytes:
    """Return a model of one node without function body, for the library alone; shapes: declared input shapes."""
    op = OPERATORS[name]
    kinds = [helper.np_dtype_to_tensor_dtype(x.dtype) for x in inputs]
    values = [
        helper.make_tensor_value_info(t.name, kind, shape)
        for t, kind, shape in zip(op.inputs, kinds, shapes or [x.shape for x in inputs], strict=True)
    ]
    kind = TensorProto.INT32 if op.output.dtypes == ("int32",) else kinds[0]
    output = helper.make_tensor_value_info(op.output.name, kind, None)
    node = helper.make_node(name, [t.name for t in op.inputs], [op.output.name], domain=DOMAIN, **attributes)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    graph = helper.make_graph([node], "one_node", values, [output])
    made: bytes = helper.make_model(
        graph, functions=functions or [], opset_imports=opsets, ir_version=10
    ).SerializeToString()
    return made


def check(case: Case, inputs: list[np.ndarray], got: np.ndarray) -> None:
    """Compare `got` with the reference by the schema's rule; failures name the worst element."""
    tolerance = case.op.tolerances[case.dtype]
    if case.op.name == "MatchTokens":
        np.testing.assert_array_equal(got, run_reference(case, inputs), err_msg=str(case))
        return
    if case.op.name.endswith("KeySelect"):
        check_selection(case, inputs, got, tolerance)
        return
    expected = run_reference(case, inputs)
    assert got.shape == expected.shape
    assert np.isfinite(got).all(), f"{case}: not finite at {np.argwhere(~np.isfinite(got))[0]}"
    error = np.abs(got.astype(np.float64) - expected) / (np.ptp(expected) or np.abs(expected).max())
    worst = np.unravel_index(error.argmax(), error.shape)
    assert error.max() <= tolerance, f"{case}: {got[worst]} for {expected[worst]} at {worst}, error {error.max():.2e}"


def check_selection(case: Case, inputs: list[np.ndarray], got: np.ndarray, tolerance: float) -> None:
    """Check a selection: ascending, in range, and every selected score at least the K-th best, less the tolerance."""
    settings = {k: v for k, v in case.attributes.items() if k != "keys"}
    scores = reference.SCORES[case.op.name](*inputs, **settings)
    keys = case.attributes["keys"]
    assert got.dtype == np.int32
    assert got.shape == (*scores.shape[:-1], keys)
    assert (np.diff(got, axis=-1) > 0).all()
    assert got.min() >= 0
    assert got.max() < scores.shape[-1]
    threshold = np.sort(scores, -1)[..., -keys, None]
    chosen = np.take_along_axis(scores, got.astype(np.int64), -1)
    worst = (threshold - chosen).max()
    assert worst <= tolerance, f"{case}: a selected score lies {worst:.2e} below the K-th"
