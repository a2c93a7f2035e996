"""int8 linear layers: QDQ nodes around the matrix products of an exported float32 file.

The quantiser is ONNX Runtime's static one (MinMax: the outliers of DINO's activations carry information that
percentiles would cut), after channels far larger than the rest were equalised. Attention, normalisation and everything
else stay in float32. Layers that hurt are found by measurement and stay in float32 too; images that were not used for
calibration decide (see `reference`).
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import msgspec
import numpy as np
import onnx
from onnx import numpy_helper

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.bundle.entries import Quantisation
from sparsifiner_edge.errors import ConfigError, GateError
from sparsifiner_edge.export.reference import LEAST_FREE_COSINE, Reference, mean_cosines, require_cosines
from sparsifiner_edge.export.sessions import file_runner, with_outputs
from sparsifiner_edge.files import scratch_folder
from sparsifiner_edge.ops.graph import tidy
from sparsifiner_edge.progress import Progress

LEAST_MEAN_COSINE = 0.99
"""Gate: mean cosine of every output's rows to the float32 file, over images that were not used for calibration."""
LEAST_WEIGHT = 1e-5
"""Share of a layer's largest weight below which a channel counts as unused when channels are equalised."""
GOAL_COSINE = 0.997
"""Cosine below which the layers that hurt most are returned to float32, one after the other."""
MAX_FLOAT_SHARE = 0.25
"""Maximum share of the linear layers that may be returned to float32."""


def held_out_images(images: Sequence[Array]) -> list[Array]:
    """Return every third of the calibration images, on which the file is checked; all of them if there are few."""
    return list(images[2::3]) or list(images)


def quantise(
    model: onnx.ModelProto,
    images: Sequence[Array],
    int8_target: str = "cpu",
    progress: Progress | None = None,
    goal: float = GOAL_COSINE,
) -> tuple[onnx.ModelProto, Quantisation]:
    """Quantise the linear layers of an exported float32 file: each MatMul by a weight (a head that became Gemm stays).

    Args:
        model: The file; it is not changed.
        images: uint8 [B,H,W,3]; every third is held out for the check, if there are at least three.
        int8_target: One of `execution.INT8_TARGETS`.
        progress: Progress callback.
        goal: Cosine of the outputs below which layers are returned to float32.

    Returns:
        The file and the report.

    Raises:
        ConfigError: There are no images.
        GateError: An output is further from the float32 file than `LEAST_MEAN_COSINE` or `LEAST_FREE_COSINE` allows,
            whatever is returned to float32.
    """
    if not images:
        raise ConfigError("There are no images to calibrate with.", "Give a folder of images with --calibrate.")
    judged_on = held_out_images(images)
    calibrated = [x for number, x in enumerate(images) if number % 3 != 2] if len(images) > 2 else list(images)
    source, layers = _prepare(model)
    reference = Reference(source, judged_on)
    _equalise(source, layers, calibrated)
    full = _quantise_all(source, layers, calibrated, symmetric=int8_target == "tensorrt")

    def measure(restored: Sequence[str], count: int | None = None, free: bool = False) -> dict[str, float]:
        return mean_cosines(reference.rows(_restore(full, source, restored), free, count))

    restored = _sensitive_layers(measure, layers, goal, progress)
    free: dict[str, float] = measure(restored, free=True) if reference.merges else {}
    if free and min(free.values()) < LEAST_FREE_COSINE:
        more = _sensitive_layers(functools.partial(measure, free=True), layers, LEAST_FREE_COSINE, progress)
        restored = list(dict.fromkeys([*restored, *more]))
        free = measure(restored, free=True)
    cosines, quantised = measure(restored), len(layers) - len(restored)
    report = Quantisation(cosines, free, quantised, tuple(restored), len(calibrated), len(judged_on))
    _require_report(report)
    return _restore(full, source, restored), report


def check_int8(
    model: onnx.ModelProto, quantised: onnx.ModelProto, images: Sequence[Array], like: Quantisation
) -> Quantisation:
    """Return the report of an int8 file whose scales were calibrated in another plan's file.

    Args:
        model: The float32 file.
        quantised: The int8 file.
        images: The images of that calibration; every third is used for the check, if there are at least three.
        like: Report of that calibration.

    Raises:
        GateError: See `quantise`.
    """
    held = held_out_images(images)
    reference = Reference(model, held)
    cosines = mean_cosines(reference.rows(quantised))
    free = mean_cosines(reference.rows(quantised, free=True)) if reference.merges else {}
    report = msgspec.structs.replace(like, cosines=cosines, own_matches_cosines=free, held_out=len(held))
    _require_report(report)
    return report


def _require_report(report: Quantisation) -> None:
    """Refuse an int8 file whose outputs differ too much.

    Raises:
        GateError: See `quantise`.
    """
    kept, fix = len(report.kept), "Calibrate with more images like those it will see, or export fp32."
    how = f", with {kept} of {kept + report.quantised} linear layers left in float32"
    require_cosines(report.cosines, LEAST_MEAN_COSINE, "int8", how, fix)
    require_cosines(report.own_matches_cosines, LEAST_FREE_COSINE, "int8", f", with its own merge matches{how}", fix)


def quantise_fully(model: onnx.ModelProto, inputs: Sequence[Array]) -> onnx.ModelProto:
    """Quantise all linear layers for the CPU without a gate, for timing only.

    Args:
        model: The file.
        inputs: Images for the input `image`.
    """
    source, layers = _prepare(model)
    return _quantise_all(source, layers, inputs, symmetric=False)


def quantise_like(model: onnx.ModelProto, source: onnx.ModelProto, quantised: onnx.ModelProto) -> onnx.ModelProto:
    """Quantise a float32 file in the layers in which another file with the same weights is int8.

    Args:
        model: The file; it is not changed.
        source: The float32 file from which `quantised` was made; layers are identified by their weights.
        quantised: The file with int8 layers.

    Raises:
        GateError: A linear layer belongs to neither.
    """
    result, layers = _prepare(model)
    held = {tensor.name: tensor for tensor in source.graph.initializer}
    names: dict[bytes, list[str]] = {}
    for node in source.graph.node:
        if node.op_type == "MatMul" and node.input[1] in held:
            names.setdefault(numpy_helper.to_array(held[node.input[1]]).tobytes(), []).append(node.name)
    theirs = {node.name: node for node in quantised.graph.node}
    producers = {name: node for node in quantised.graph.node for name in node.output}
    constants = {tensor.name: tensor for tensor in quantised.graph.initializer}
    weights = {tensor.name: tensor for tensor in result.graph.initializer}
    before = {node.output[0]: node for node in result.graph.node if node.op_type == "LayerNormalization"}
    readers = Counter(name for node in result.graph.node for name in node.input)
    nodes, extra = list[onnx.NodeProto](), dict[str, onnx.TensorProto]()

    def take(name: str) -> str:
        """Copy a constant of the other file under a new name."""
        if not name:
            return name
        constant = extra[name] = copy.deepcopy(constants[name])
        constant.name = renamed = f"int8.{name}"
        return renamed

    for node in result.graph.node:
        same = names.get(numpy_helper.to_array(weights[node.input[1]]).tobytes(), []) if node.name in layers else []
        if node.name in layers and (not same or (readers[node.input[0]] > 1 and node.input[0] in before)):
            raise GateError(f"Layer {node.name} of the stream is missing in the bundle's model.", "Export fp32.")
        twin = theirs[same.pop(0)] if same else None  # Equal weights are matched in the order of the file.
        # Layers that were returned to float32 read no dequantised values.
        if twin is not None and producers.get(twin.input[1], twin).op_type == "DequantizeLinear":
            read, weight = (producers[name] for name in twin.input)
            rounded = producers[read.input[0]]
            if (norm := before.get(node.input[0])) is not None:  # Equalised together with the weights that follow.
                norm.input[1:] = [take(name) for name in producers[rounded.input[0]].input[1:]]
            for number, (kind, original, inputs) in enumerate(
                (
                    ("QuantizeLinear", rounded, [node.input[0], *map(take, rounded.input[1:])]),
                    ("DequantizeLinear", read, [f"{node.name}.int8.0", *map(take, read.input[1:])]),
                    ("DequantizeLinear", weight, list(map(take, weight.input))),
                )
            ):
                node_here = onnx.helper.make_node(kind, inputs, [f"{node.name}.int8.{number}"])
                node_here.attribute.extend(original.attribute)
                nodes.append(node_here)
            node.input[:] = [f"{node.name}.int8.1", f"{node.name}.int8.2"]
        nodes.append(node)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del result.graph.node[:]
    result.graph.node.extend(copies)
    result.graph.initializer.extend(extra.values())
    tidy(result)
    return result


def _sensitive_layers(
    measure: Callable[..., dict[str, float]], layers: list[str], goal: float, progress: Progress | None
) -> list[str]:
    """Return the names of the layers to return to float32, the worst first, until the outputs reach the goal.

    Args:
        measure: (layers in float32, number of images) -> cosines of the outputs.
        layers: Names of the linear layers.
        goal: Cosine to reach.
        progress: Progress callback.
    """

    def step(done: int) -> None:
        if progress:
            progress("int8: finding sensitive layers", done, len(layers) + 2)

    step(1)
    restored: list[str] = []
    if min(measure(restored).values()) < goal:
        harm = {}
        for number, name in enumerate(layers):
            # One image ranks the layers; all held-out images decide how many are returned to float32.
            harm[name] = min(measure([other for other in layers if other != name], 1).values())
            step(2 + number)
        for name in sorted(harm, key=lambda layer: harm[layer])[: int(MAX_FLOAT_SHARE * len(layers))]:
            restored.append(name)
            if min(measure(restored).values()) >= goal:
                break
    step(len(layers) + 2)
    return restored


def _prepare(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str]]:
    """Return a copy in which each linear layer has its own weight and a bias [1,1,N], and the layers' names.

    ONNX Runtime turns MatMul and a bias of shape [N] into Gemm, with which its int8 product does not fuse. It also
    cannot make a weight that two layers read uint8 (1.32: "attempt to replace the existing tensor"), which
    `session_options` requests where products saturate.
    """
    source = copy.deepcopy(model)
    weights = {tensor.name: tensor for tensor in source.graph.initializer}
    products = [n for n in source.graph.node if n.op_type == "MatMul" and n.input[1] in weights]
    linear = {node.output[0]: node.name for node in products}
    read: set[str] = set()
    for node in source.graph.node:
        if node.output[0] in linear:
            if node.input[1] in read:
                copied = source.graph.initializer.add()
                copied.CopyFrom(weights[node.input[1]])
                node.input[1] = copied.name = f"{node.name}_own"
            read.add(node.input[1])
    for node in source.graph.node:
        if node.op_type == "Add" and any(name in linear for name in node.input):
            for place, name in enumerate(node.input):
                if name in weights and len(weights[name].dims) == 1:
                    # A normalisation may read the same constant, such as zeros.
                    node.input[place] = f"{name}_of_row"
                    if node.input[place] not in read:
                        bias = numpy_helper.to_array(weights[name])[None, None]
                        source.graph.initializer.append(numpy_helper.from_array(bias, node.input[place]))
                        read.add(node.input[place])
    used = {name for node in source.graph.node for name in node.input}
    for name in weights.keys() - used:
        source.graph.initializer.remove(weights[name])
    return source, list(linear.values())


def _equalise(source: onnx.ModelProto, layers: Sequence[str], images: Sequence[Array]) -> None:
    """Move scale differences between channels from a normalisation into the weights of the next layer, in place.

    SmoothQuant (Xiao et al. 2023, equation 4, alpha 0.5): int8 has one scale for all channels of an input, and single
    channels of a ViT's first normalisations are several times larger than all others.
    """
    graph = source.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    norms = {node.output[0]: node for node in graph.node if node.op_type == "LayerNormalization"}
    uses = Counter(name for node in graph.node for name in node.input)
    pairs = []
    for node in graph.node:
        norm = norms.get(node.input[0]) if node.name in layers else None
        if norm and uses[norm.output[0]] == 1 and all(name in weights for name in norm.input[1:] if name):
            pairs.append((norm, node))
    if not pairs:
        return
    run = file_runner(with_outputs(source, [norm.output[0] for norm, _ in pairs]))
    largest = [np.zeros(weights[node.input[1]].dims[0], np.float32) for _, node in pairs]
    for image in images:
        outputs = run(image)
        for highest, (norm, _) in zip(largest, pairs, strict=True):
            x = outputs[norm.output[0]]
            np.maximum(highest, np.abs(x).reshape(-1, x.shape[-1]).max(0), out=highest)
    for (norm, node), highest in zip(pairs, largest, strict=True):
        matrix = numpy_helper.to_array(weights[node.input[1]])
        row = np.abs(matrix).max(1)
        row = np.maximum(row, LEAST_WEIGHT * row.max())  # unused channels need no scale
        alive = (highest > 0) & (row > 0)
        factor = np.sqrt(np.divide(highest, row, out=np.ones_like(row), where=alive))
        factor /= np.exp(np.log(factor).mean())
        # Under new names: exports share equal tensors.
        for reader, place, value in (
            (node, 1, factor[:, None]),
            *((norm, n, 1 / factor) for n in range(1, len(norm.input))),
        ):
            if not reader.input[place]:
                continue  # a normalisation without bias
            changed = numpy_helper.to_array(weights[reader.input[place]]) * value
            reader.input[place] = f"{reader.name}_equalised_{place}"
            graph.initializer.append(numpy_helper.from_array(changed.astype(np.float32), reader.input[place]))
    tidy(source)


def _quantise_all(
    source: onnx.ModelProto, layers: list[str], images: Sequence[Array], symmetric: bool
) -> onnx.ModelProto:
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    # The quantiser observes every MatMul and keeps all observations until the end of a run: the score matrices of all
    # dense layers at once. Products of activations therefore get another type of ONNX Runtime's meanwhile.
    products = {n.name for n in source.graph.node if n.op_type == "MatMul"}.difference(layers)
    hidden = copy.deepcopy(source)
    hidden.opset_import.add(domain="com.microsoft", version=1)
    for node in hidden.graph.node:
        if node.name in products:
            node.op_type, node.domain = "FusedMatMul", "com.microsoft"
    # Without this the quantiser advises preprocessing, which exported files do not need.
    hidden.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
    feeds = iter([{"image": image} for image in images])
    with scratch_folder() as folder:
        before, after = folder / "before.onnx", folder / "after.onnx"
        onnx.save(hidden, before)
        quantize_static(
            before,
            after,
            SimpleNamespace(get_next=lambda: next(feeds, None)),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul"],
            nodes_to_quantize=layers,
            per_channel=True,
            activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={
                "ActivationSymmetric": symmetric,
                "WeightSymmetric": True,
                # A product with float32 output is more exact and faster than one that is quantised again.
                "OpTypesToExcludeOutputQuantization": ["MatMul"],
            },
        )
        model = onnx.load(after)
    for node in model.graph.node:
        if node.name in products:
            node.op_type, node.domain = "MatMul", ""
    model.opset_import.remove(next(entry for entry in model.opset_import if entry.domain == "com.microsoft"))
    return model


def _restore(full: onnx.ModelProto, source: onnx.ModelProto, restored: Sequence[str]) -> onnx.ModelProto:
    """Return the quantised file with the layers `restored` as they are in the source."""
    model = copy.deepcopy(full)
    original = {node.name: node for node in source.graph.node if node.name in set(restored)}
    weights = {tensor.name: tensor for tensor in source.graph.initializer}
    present = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.name in original:
            node.input[:] = original[node.name].input
            weight = node.input[1]
            if weight not in present:
                model.graph.initializer.append(weights[weight])
                present.add(weight)
    tidy(model)
    return model
