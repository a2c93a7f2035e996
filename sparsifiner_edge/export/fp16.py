"""float16: an exported float32 file becomes one whose products and activations are float16, with islands of float32.

    image -> patch embedding (normalisation is folded into it)        float32
    LayerNormalization, Softmax, means, powers, roots                 float32
    MatMul, Gemm, Gelu, residual additions, the operators' qkv        float16
    what goes into int8 products and comes out of them                float16
    selection scores, token scores, softmax inside the bodies         float32 (the bodies cast by themselves)
    outputs                                                           float32

One walk over the graph decides each node's type and puts a Cast where two meet. `onnxruntime.transformers.float16`
does this for standard operators, but takes the result of every operator for float16: the token scores of a pruned
model, float32 by their schema, would come to be ranked in float16, where small probabilities tie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.bundle.entries import Float16
from sparsifiner_edge.errors import GateError
from sparsifiner_edge.export.sessions import file_session
from sparsifiner_edge.metrics import aligned, cosine
from sparsifiner_edge.ops.schema import DOMAIN, OPERATORS

SINGLE, HALF = int(TensorProto.FLOAT), int(TensorProto.FLOAT16)
LEAST_COSINE = 0.999
"""Gate: least cosine of any row of any output to the float32 file."""
LEAST_COSINE_INT8 = 0.99
"""The same for a file with int8 products: a value near the middle between two steps falls on either side."""
HALF_TOLERANCE, HALF_TOLERANCE_FREE = 2e-2, 5e-2
"""Greatest difference of a session's outputs from the golden ones, relative to their range: processors add up float16
in different orders; the second where each session chooses keys or tokens for itself."""
LARGEST = float(np.finfo(np.float16).max)
_IN_SINGLE = frozenset({
    "Conv", "LayerNormalization", "Softmax", "LogSoftmax", "ReduceMean", "ReduceSum", "ReduceL2", "Pow", "Sqrt",
    "Reciprocal", "Exp", "Log", "TopK", "Range", "Resize",
})  # fmt: skip
_IN_HALF = frozenset({
    "MatMul", "Gemm", "Gelu", "Sigmoid", "Tanh", "Erf", "Relu", "QuantizeLinear", "DequantizeLinear",
})  # fmt: skip


def to_fp16(
    model: onnx.ModelProto, images: Sequence[Array], least: float | None = None
) -> tuple[onnx.ModelProto, Float16]:
    """Make a float16 file of an exported float32 file, or of one with int8 products, which stay.

    Args:
        model: left as it is.
        images: uint8 [B,S,S,3]; both files are run on them and compared.
        least: cosine that every row of every output must reach; None: `LEAST_COSINE`.

    Returns:
        The file, and how close it is.

    Raises:
        GateError: a weight or an activation is beyond float16, or an output is too far from float32.
    """
    converted = convert(model)
    cosines, largest = _compare(model, converted, images)
    if not largest[0] <= LARGEST:  # Written so that NaN fails.
        raise GateError(
            f"Activations of {largest[1]!r} reach {largest[0]:.3g}, beyond float16 ({LARGEST:.0f}).",
            "Nothing was written. Export fp32, or int8.",
        )
    allowed = LEAST_COSINE if least is None else least
    for name, found in cosines.items():
        if found < allowed:
            raise GateError(
                f"Output {name!r} of the float16 file has cosine {found:.5f} to float32, allowed {allowed}.",
                "Nothing was written. Export fp32, or int8.",
            )
    counts, sparse = converted.counts, any(node.domain == DOMAIN for node in model.graph.node)
    kernels = "function bodies" if sparse else "none (standard operators)"
    return converted.model, Float16(cosines, *largest, counts[HALF], counts[SINGLE], kernels)


class Converted(NamedTuple):
    """A float16 file, unchecked; how many nodes compute in each type; names of what nodes make in float16."""

    model: onnx.ModelProto
    counts: dict[int, int]
    halves: list[str]


def convert(model: onnx.ModelProto) -> Converted:
    """Make the file without running it."""
    walk = _Walk(model)
    for node in model.graph.node:
        walk.visit(node)
    half = onnx.ModelProto()
    half.CopyFrom(model)
    del half.graph.node[:], half.graph.initializer[:], half.graph.value_info[:]
    for output in half.graph.output:
        walk.give_back(output)
    half.graph.initializer.extend(walk.initialisers())
    half.graph.node.extend(walk.nodes)
    return Converted(half, walk.counts, [name for name, kind in walk.types.items() if kind == HALF])


class _Walk:
    """Nodes of the new graph, in order, and the type of every float tensor so far.

    Attributes:
        types: name -> SINGLE or HALF, of float tensors that nodes made. Weights have no type until one reads them.
        counts: nodes that compute in each type.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.weights = {t.name: t for t in model.graph.initializer if t.data_type == SINGLE}
        self.others = [t for t in model.graph.initializer if t.data_type != SINGLE]
        self.types: dict[str, int] = {}
        self.floats = _float_tensors(model)
        self.counts = {SINGLE: 0, HALF: 0}
        self.nodes: list[onnx.NodeProto] = []
        self._casts: dict[tuple[str, int], str] = {}
        self._read: dict[str, set[int]] = {}

    def visit(self, node: onnx.NodeProto) -> None:
        """Append the node, and before it the casts that it needs."""
        made = onnx.NodeProto()
        made.CopyFrom(node)
        floats = [name for name in node.input if name in self.types or name in self.weights]
        if floats or node.op_type == "Cast":
            kind = self._kind(node, floats)
            del made.input[:]
            made.input.extend(self._as(name, kind) if name in floats else name for name in node.input)
            self.counts[kind] += 1
            self._results(node, kind)
        else:
            self._results(node, SINGLE)
        self.nodes.append(made)

    def _kind(self, node: onnx.NodeProto, floats: Sequence[str]) -> int:
        if node.domain == DOMAIN or node.op_type in _IN_HALF:
            return HALF
        present = {self.types[name] for name in floats if name in self.types}
        if node.op_type in _IN_SINGLE or not present:
            # Where it reads weights alone, as Expand of the class token does, it keeps their type.
            return SINGLE
        if node.op_type == "Add" and HALF in present:
            return HALF  # Residuals, and biases.
        return max(present, key=(HALF, SINGLE).index)

    def _results(self, node: onnx.NodeProto, kind: int) -> None:
        for name in node.output:
            if name in self.floats:
                fixed = node.domain == DOMAIN and OPERATORS[node.op_type].output.dtypes == ("float32",)
                self.types[name] = SINGLE if fixed else kind

    def _as(self, name: str, kind: int) -> str:
        """The tensor's name in a type; a weight is stored in it, anything else cast."""
        if name in self.weights:
            self._read.setdefault(name, set()).add(kind)
            return name if kind == SINGLE else _half_name(name)
        if self.types[name] == kind:
            return name
        if (name, kind) not in self._casts:
            cast = f"{name}_as_{'float16' if kind == HALF else 'float32'}"
            self.nodes.append(onnx.helper.make_node("Cast", [name], [cast], name=f"node_{cast}", to=kind))
            self._casts[name, kind] = cast
        return self._casts[name, kind]

    def give_back(self, output: onnx.ValueInfoProto) -> None:
        """Let a float output be float32 under its own name."""
        name = output.name
        if self.types.get(name) != HALF:
            return
        inner = f"{name}_float16"
        for node in self.nodes:
            for names in (node.input, node.output):
                names[:] = [inner if other == name else other for other in names]
        self.nodes.append(onnx.helper.make_node("Cast", [inner], [name], name=f"node_{name}_out", to=SINGLE))

    def initialisers(self) -> list[onnx.TensorProto]:
        """Weights in the types that they are read in.

        Raises:
            GateError: one is beyond float16.
        """
        made = list(self.others)
        for name, kinds in self._read.items():
            if SINGLE in kinds:
                made.append(self.weights[name])
            if HALF in kinds:
                made.append(_half_weight(self.weights[name]))
        self._keep_names(made)
        return made

    def _keep_names(self, weights: Sequence[onnx.TensorProto]) -> None:
        """A weight that is read in float16 alone keeps its name."""
        names = {_half_name(name): name for name, kinds in self._read.items() if kinds == {HALF}}
        for tensor in weights:
            tensor.name = names.get(tensor.name, tensor.name)
        for node in self.nodes:
            node.input[:] = [names.get(name, name) for name in node.input]


def _half_name(name: str) -> str:
    return f"{name}_float16"


def _half_weight(tensor: onnx.TensorProto) -> onnx.TensorProto:
    values = numpy_helper.to_array(tensor)
    largest = float(np.abs(values).max(initial=0))
    if not largest <= LARGEST:
        raise GateError(
            f"Weight {tensor.name!r} holds {largest:g}, beyond float16.", "Nothing was written. Export fp32 or int8."
        )
    return numpy_helper.from_array(values.astype(np.float16), _half_name(tensor.name))


def _float_tensors(model: onnx.ModelProto) -> set[str]:
    """Names of all float32 tensors that nodes make."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=False)
    values = [*inferred.graph.value_info, *inferred.graph.output]
    known = {v.name: v.type.tensor_type.elem_type for v in values}
    for node in model.graph.node:
        if node.domain == DOMAIN:
            known |= dict.fromkeys(node.output, TensorProto.INT32 if node.op_type.endswith("Select") else SINGLE)
        missing = [name for name in node.output if name and not known.get(name)]
        if missing:
            raise GateError(f"The type of {missing[0]!r} is not known.", "Report this with the model's name.")
    return {name for name, kind in known.items() if kind == SINGLE}


def _compare(
    single: onnx.ModelProto, converted: Converted, images: Sequence[Array]
) -> tuple[dict[str, float], tuple[float, str]]:
    """Least row cosine per output over the images, both files run by their bodies, and the greatest activation.

    That is found in the float32 file: ONNX Runtime's CPU computes float16 products in float32, and passes what
    overflows on to the next node unharmed.
    """
    sessions = [file_session(model, "portable") for model in (_probed(single, converted.halves), converted.model)]
    names = [output.name for output in single.graph.output]
    least: dict[str, float] = {}
    largest = (0.0, "none")
    for image in images:
        every = [
            dict(zip([o.name for o in s.get_outputs()], s.run(None, {"image": image}), strict=True)) for s in sessions
        ]
        wanted = {name: every[0].pop(name) for name in names}
        outputs, _ = aligned(every[1], wanted)
        for name, value in _rows(outputs, wanted).items():
            least[name] = min(least.get(name, 1.0), value)
        found = max(zip(map(float, every[0].values()), converted.halves, strict=True), default=largest)
        largest = max(largest, found)
    return least, largest


def _probed(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """The file with the greatest magnitude of these tensors as further outputs, in order."""
    probed = onnx.ModelProto()
    probed.CopyFrom(model)
    for name in names:
        probed.graph.node.append(onnx.helper.make_node("Abs", [name], [f"{name}_size"]))
        probed.graph.node.append(onnx.helper.make_node("ReduceMax", [f"{name}_size"], [f"{name}_largest"], keepdims=0))
        probed.graph.output.append(onnx.helper.make_tensor_value_info(f"{name}_largest", TensorProto.FLOAT, []))
    return probed


def _rows(outputs: Mapping[str, Array], wanted: Mapping[str, Array]) -> dict[str, float]:
    """Least cosine of a row of each output; -1 where there is none."""
    with np.errstate(all="ignore"):  # What overflowed is found by the gate.
        return {name: float(np.nan_to_num(cosine(x, wanted[name]), nan=-1.0).min()) for name, x in outputs.items()}
