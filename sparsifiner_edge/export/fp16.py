"""Conversion of an exported float32 file to float16, with parts in float32.

    image -> patch embedding (normalisation is folded into it)        float32
    LayerNormalization, Softmax, means, powers, roots                 float32
    MatMul, Gemm, Gelu, residual additions, the operators' qkv        float16
    inputs and outputs of int8 products                               float16
    sums and softmax of token scores                                  float32
    selection scores, softmax inside the function bodies              float32 (the bodies cast by themselves)
    outputs                                                           float32

One walk over the graph decides each node's type and inserts a Cast where two types meet.
`onnxruntime.transformers.float16` does this for standard operators, but gives ours float16 sizes, and would rank the
scores of a pruned model in float16, where small probabilities tie.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.bundle.entries import Float16
from sparsifiner_edge.errors import GateError
from sparsifiner_edge.export.reference import LEAST_FREE_COSINE, Reference, mean_cosines, require_cosines
from sparsifiner_edge.export.sessions import with_outputs
from sparsifiner_edge.ops.schema import DOMAIN, OPERATORS

SINGLE = int(TensorProto.FLOAT)
"""ONNX code of float32."""
HALF = int(TensorProto.FLOAT16)
"""ONNX code of float16."""
LEAST_ROW_COSINE = 0.999
"""Gate: lowest cosine of any row of any output to the float32 file, with that file's matches if tokens merge."""
LEAST_ROW_COSINE_INT8 = 0.99
"""The same for a file with int8 products: a value near the middle between two steps may round either way."""
LARGEST = float(np.finfo(np.float16).max)
_IN_SINGLE = frozenset(
    {
        "Conv",
        "LayerNormalization",
        "Softmax",
        "LogSoftmax",
        "ReduceMean",
        "ReduceSum",
        "ReduceL2",
        "Pow",
        "Sqrt",
        "Reciprocal",
        "Exp",
        "Log",
        "TopK",
        "Range",
        "Resize",
    }
)
_IN_HALF = frozenset(
    {
        "MatMul",
        "Gemm",
        "Gelu",
        "Sigmoid",
        "Tanh",
        "Erf",
        "Relu",
        "QuantizeLinear",
        "DequantizeLinear",
    }
)


def to_fp16(
    model: onnx.ModelProto, images: Sequence[Array], free_images: Sequence[Array] | None = None
) -> tuple[onnx.ModelProto, Float16]:
    """Convert an exported float32 file, or one with int8 products (which stay), to float16.

    Args:
        model: The file; it is not changed.
        images: uint8 [B,H,W,3]; both files run on them through function bodies and are compared (see `reference`).
        free_images: Images on which the file's own matches are checked if tokens merge; None takes `images`.

    Returns:
        The file, and how close it is.

    Raises:
        GateError: A weight or an activation exceeds float16, or an output is too far from float32.
    """
    converted, fix = convert(model), "Export fp32, or int8 with --int8-target cpu."
    # Check the float32 file: ONNX Runtime's CPU computes float16 products in float32, and passes overflows on to the
    # next node unnoticed.
    reference = Reference(_with_magnitudes(model, converted.halves), images, "portable")
    magnitudes = [(float(x[f"{name}_largest"]), name) for x in reference.outputs for name in converted.halves]
    largest, where = max(magnitudes, default=(0.0, "none"))
    if not largest <= LARGEST:  # `not <=` also catches NaN.
        what = f"Activations of {where!r} reach {largest:.3g}, beyond float16 ({LARGEST:.0f})."
        raise GateError(what, f"Nothing was written. {fix}")
    rows, free = reference.rows(converted.model), dict[str, float]()
    cosines = {name: min(float(np.nan_to_num(x[name], nan=-1.0).min()) for x in rows) for name in rows[0]}
    if reference.merges:
        judged = reference if free_images is None else Reference(model, free_images, "portable")
        free = mean_cosines(judged.rows(converted.model, free=True))
    int8 = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    require_cosines(cosines, LEAST_ROW_COSINE_INT8 if int8 else LEAST_ROW_COSINE, "float16", "", fix)
    require_cosines(free, LEAST_FREE_COSINE, "float16", " on average, with its own merge matches", fix)
    return converted.model, Float16(cosines, free, converted.counts[HALF], converted.counts[SINGLE])


class _Converted(NamedTuple):
    """A float16 file that was not checked yet.

    Attributes:
        model: The file.
        counts: Number of nodes that compute in each type.
        halves: Names of float16 tensors that depend on the image.
    """

    model: onnx.ModelProto
    counts: dict[int, int]
    halves: list[str]


def convert(model: onnx.ModelProto) -> _Converted:
    """Convert the file without running it."""
    walk = _Walk(model)
    for node in model.graph.node:
        walk.visit(node)
    half = copy.deepcopy(model)
    del half.graph.node[:], half.graph.initializer[:]
    for value in half.graph.value_info:
        if walk.types.get(value.name) == HALF:
            value.type.tensor_type.elem_type = HALF
    for output in half.graph.output:
        walk.restore_output(output)
    half.graph.initializer.extend(walk.initialisers)
    half.graph.node.extend(walk.nodes)
    return _Converted(half, walk.counts, walk.halves())


class _Walk:
    """Walk that collects the nodes and weights of the new graph, and the type of every float tensor so far.

    Attributes:
        types: Name -> SINGLE or HALF for float tensors that nodes made. Weights have no type until a node reads them.
        counts: Number of nodes that compute in each type.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.weights = {t.name: t for t in model.graph.initializer if t.data_type == SINGLE}
        self.initialisers = [t for t in model.graph.initializer if t.data_type != SINGLE]
        self.types: dict[str, int] = {}
        self.floats = _float_tensors(model)
        self.counts = {SINGLE: 0, HALF: 0}
        self.nodes: list[onnx.NodeProto] = []
        self._names: dict[tuple[str, int], str] = {}

    def visit(self, node: onnx.NodeProto) -> None:
        """Append the node, preceded by the casts that it needs."""
        copied = copy.deepcopy(node)
        floats = [name for name in node.input if name in self.types or name in self.weights]
        kind = SINGLE
        if floats or node.op_type == "Cast":
            kind = self._kind(node, floats)
            wanted = dict(zip(node.input, _input_types(node, kind), strict=False))
            copied.input[:] = [self._as(name, wanted[name]) if name in floats else name for name in node.input]
            self.counts[kind] += 1
        self.nodes.append(copied)
        self.types |= {name: kind for name in node.output if name in self.floats}

    def halves(self) -> list[str]:
        """Names of float16 tensors that depend on the image.

        Int8 weights are left out: they must not be read twice (see `export.int8`).
        """
        stored = {tensor.name for tensor in self.initialisers}
        fixed = {n.output[0] for n in self.nodes if n.op_type == "DequantizeLinear" and n.input[0] in stored}
        return [name for name, kind in self.types.items() if kind == HALF and name not in fixed]

    def _kind(self, node: onnx.NodeProto, floats: Sequence[str]) -> int:
        if node.domain == DOMAIN or node.op_type in _IN_HALF:
            return HALF
        present = {self.types[name] for name in floats if name in self.types}
        if node.op_type in _IN_SINGLE or not present:
            # A node that reads only weights, such as Expand of the class token, keeps their type.
            return SINGLE
        if node.op_type == "Add" and HALF in present:
            return HALF  # Residuals and biases.
        return SINGLE if SINGLE in present else HALF

    def _as(self, name: str, kind: int) -> str:
        """Return the tensor's name in a type; a weight is stored in it, anything else is cast.

        Raises:
            GateError: A weight exceeds float16.
        """
        if (name, kind) not in self._names:
            self._names[name, kind] = self._weight(name, kind) if name in self.weights else self._cast(name, kind)
        return self._names[name, kind]

    def _weight(self, name: str, kind: int) -> str:
        """Return the name of a weight in a type; if it is read in both types, the first keeps its name."""
        both = (name, SINGLE if kind == HALF else HALF) in self._names
        stored = _name_in(name, kind) if both else name
        values = numpy_helper.to_array(self.weights[name])
        if kind == HALF:
            largest = float(np.abs(values).max(initial=0))
            if not largest <= LARGEST:
                raise GateError(
                    f"Weight {name!r} holds {largest:g}, beyond float16.",
                    "Nothing was written. Export fp32, or int8 with --int8-target cpu.",
                )
            values = values.astype(np.float16)
        self.initialisers.append(numpy_helper.from_array(values, stored))
        return stored

    def _cast(self, name: str, kind: int) -> str:
        if self.types[name] == kind:
            return name
        cast = _name_in(name, kind)
        self.nodes.append(onnx.helper.make_node("Cast", [name], [cast], name=f"node_{cast}", to=kind))
        return cast

    def restore_output(self, output: onnx.ValueInfoProto) -> None:
        """Make a float output float32 under its own name."""
        name = output.name
        if self.types.get(name) != HALF:
            return
        inner = f"{name}_float16"
        for node in self.nodes:
            for names in (node.input, node.output):
                names[:] = [inner if other == name else other for other in names]
        self.nodes.append(onnx.helper.make_node("Cast", [inner], [name], name=f"node_{name}_out", to=SINGLE))


def _input_types(node: onnx.NodeProto, kind: int) -> list[int]:
    """Return the type of each input of a node that computes in `kind`; float32-only inputs stay float32."""
    if node.domain != DOMAIN:
        return [kind] * len(node.input)
    return [SINGLE if tensor.dtypes == ("float32",) else kind for tensor in OPERATORS[node.op_type].inputs]


def _name_in(name: str, kind: int) -> str:
    return f"{name}_as_{'float16' if kind == HALF else 'float32'}"


def _float_tensors(model: onnx.ModelProto) -> set[str]:
    """Return the names of all float32 tensors that nodes make."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=False)
    values = [*inferred.graph.value_info, *inferred.graph.output]
    known = {v.name: v.type.tensor_type.elem_type for v in values}
    missing = [name for node in model.graph.node for name in node.output if name and not known.get(name)]
    if missing:
        raise GateError(f"The type of {missing[0]!r} is unknown.", "Report this with the model's name.")
    return {name for name, kind in known.items() if kind == SINGLE}


def _with_magnitudes(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """Return the file with the greatest magnitude of these tensors as further outputs."""
    largest = [f"{name}_largest" for name in names]
    probed = with_outputs(model, largest)
    for name, output in zip(names, largest, strict=True):
        probed.graph.node.append(onnx.helper.make_node("Abs", [name], [f"{name}_size"]))
        probed.graph.node.append(onnx.helper.make_node("ReduceMax", [f"{name}_size"], [output], keepdims=0))
    return probed
