"""TensorRT for RTX: engines for GeForce and RTX cards, built ahead of time on any x86-64 machine, even without a GPU.

The bodies in the file are what runs: a registered plugin would end the process. Dense attention is built beside them,
and the faster one kept, where the GPU of the engine is here.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from sparsifiner_edge.bundle.engines import BODIES, DENSE, MEASURED, BatchRange, Details, Engine, system
from sparsifiner_edge.bundle.store import Bundle
from sparsifiner_edge.errors import BackendError, ConfigError
from sparsifiner_edge.onnx_file import all_nodes
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.records import read_record
from sparsifiner_edge.runtime.backend import Candidates, Job, OptionValues, import_package
from sparsifiner_edge.runtime.cuda import probe
from sparsifiner_edge.runtime.tensorrt.backend import TensorRtBackend
from sparsifiner_edge.runtime.tensorrt.build import make_monitor, prepare_build
from sparsifiner_edge.runtime.tensorrt.candidates import dense_model, has_sparse_attention, why_no_dense

if TYPE_CHECKING:
    import onnx

ARCHITECTURES = {"7.5": "SM75", "8.0": "SM80", "8.6": "SM86", "8.9": "SM89", "12.0": "SM120"}
"""Compute capability -> its name in `tensorrt_rtx.ComputeCapability`."""
_TURING = "7.5"
STANDARD_DOMAINS = ("", "ai.onnx")
_REFUSED = {
    **dict.fromkeys(("NonZero", "Compress", "Unique"), "its number of results depends on the data"),
    **dict.fromkeys(("BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitwiseNot", "BitShift"), "it has no bitwise operators"),
    **dict.fromkeys(
        ("MatMulInteger", "ConvInteger", "DynamicQuantizeLinear", "QLinearMatMul", "QLinearConv"),
        "int8 reaches it through QuantizeLinear and DequantizeLinear alone",
    ),
}
"""Operator -> why; found with TensorRT-RTX 1.7."""


class RtxOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of a build. kernels: "portable" (sparse attention by its bodies), or what is faster."""

    kernels: Literal["auto", "portable"] = "auto"


class TensorRtRtx(TensorRtBackend):
    """Builds one engine per compute capability, for this operating system and processor."""

    name = "tensorrt-rtx"

    def load(self) -> Any:
        """The module `tensorrt_rtx`; see `Backend.load`."""
        return import_package("tensorrt_rtx", "tensorrt-rtx", "tensorrt-rtx", "Reinstall tensorrt-rtx.")

    def plan(
        self, bundle: Bundle, capabilities: Sequence[str], batch: BatchRange, options: OptionValues
    ) -> list[Engine]:
        """See `EngineBackend.plan`."""
        import onnx

        self.check(bundle)
        version = str(self.load().__version__)
        capabilities = capabilities or (probe().compute_capability,)
        for capability in capabilities:
            if capability not in ARCHITECTURES:
                raise ConfigError(
                    f"TensorRT-RTX builds nothing for compute capability {capability}.",
                    f"It takes {', '.join(ARCHITECTURES)}; for others, such as a Jetson, build on the device with "
                    "--backend tensorrt.",
                )
        model = bundle.model()
        check_operators(model)
        half = any(t.data_type == onnx.TensorProto.FLOAT16 for t in model.graph.initializer)
        if _TURING in capabilities and not half:
            raise ConfigError(
                f"Compute capability 7.5 (Turing) takes no {bundle.precision} bundle like this one: "
                "TensorRT-RTX compiles no product of float32 matrices for it.",
                "Export with --precision fp16, or with --precision int8 --int8-target tensorrt, or leave 7.5 out.",
            )
        engines = [
            Engine(self.name, version, capability, *system(), bundle.precision, batch) for capability in capabilities
        ]
        variants = [MEASURED if len(self.candidates(bundle, e, options).names) > 1 else "" for e in engines]
        return [msgspec.structs.replace(e, variant=v) for e, v in zip(engines, variants, strict=True)]

    def candidates(self, bundle: Bundle, engine: Engine, options: OptionValues) -> Candidates:
        """See `EngineBackend.candidates`. Where the GPU is not here nothing can be compared, and sparse is built."""
        wanted = read_record(options, RtxOptions, "--option", "tensorrt-rtx has the option kernels.", ConfigError)
        if not has_sparse_attention(bundle):
            return Candidates((BODIES,), why_no_dense(bundle))
        if wanted.kernels == "portable":
            return Candidates((BODIES,), {})
        why = self.why_not_here(engine)
        if why is None:
            return Candidates((BODIES, DENSE), {})
        reason = f"nothing can be timed here ({why.rstrip('.')}); on a machine with that GPU build compares the two"
        return Candidates((BODIES,), {DENSE: reason})

    def build(self, job: Job, tell: Progress) -> Details:
        """See `EngineBackend.build`."""
        import onnx

        trt = self.load()
        capability = job.engine.compute_capability
        start = time.monotonic()
        tell("reading the model", 0, 1)
        bundle = job.checked_bundle()
        model = bundle.model()
        if job.candidate == DENSE:
            model = onnx.load_from_string(dense_model(model.SerializeToString()))
        if capability == _TURING:
            model = without_single_products(model)
        tell("parsing the model", 0, 1)
        content, name = model.SerializeToString(), f"TensorRT-RTX {trt.__version__}"
        builder, network, config, messages = prepare_build(trt, content, job.engine.batch, name)
        parsed = time.monotonic()
        config.num_compute_capabilities = 1
        kind = getattr(trt.ComputeCapability, ARCHITECTURES[capability], None)
        if kind is None or not config.set_compute_capability(kind, 0):
            raise BackendError(f"{name} does not know compute capability {capability}.", "Upgrade tensorrt-rtx.")
        config.progress_monitor = make_monitor(trt, tell)
        serialised = builder.build_serialized_network(network, config)
        if serialised is None:
            raise BackendError(
                f"TensorRT-RTX built no engine for compute capability {capability}: {messages.text()}.",
                "Export the model in another precision, or upgrade tensorrt-rtx.",
            )
        tell("writing the engine", 0, 1)
        details = Details(
            layers=int(network.num_layers),
            parse_seconds=parsed - start,
            compile_seconds=time.monotonic() - parsed,
            cpu_seconds=time.process_time(),
        )
        return self.finished(trt, job, bundle, bytes(serialised), details)


def check_operators(model: onnx.ModelProto) -> None:
    """Reject what TensorRT-RTX's parser would reject less clearly, or abort on, bodies and branches included.

    Raises:
        BackendError: names every such node, with the reason.
    """
    functions = {(f.domain, f.name) for f in model.functions}
    types = {t.name: t.data_type for t in model.graph.initializer}
    problems = [
        f"{node.op_type} ({node.name or next(iter(node.output), 'without a name')}): {reason}"
        for node in all_nodes(model)
        if (reason := _reason(node, functions, types))
    ]
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise BackendError(
            f"TensorRT-RTX cannot take this file. {'; '.join(problems[:5])}{more}.",
            "Run it with --backend onnxruntime, or export the model again with this version.",
        )


def _reason(node: onnx.NodeProto, functions: set[tuple[str, str]], types: dict[str, int]) -> str | None:
    if node.domain not in STANDARD_DOMAINS:
        if (node.domain, node.op_type) in functions:
            return None
        return f"an operator of the domain {node.domain!r} without a function body in the file"
    if node.op_type.startswith("Scatter"):
        reduction = next((a.s.decode() for a in node.attribute if a.name == "reduction"), "none")
        return f"it cannot scatter with reduction {reduction!r}" if reduction != "none" else None
    if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) > 2:
        from onnx import TensorProto

        if types.get(node.input[2]) == TensorProto.UINT8:
            return "uint8 quantisation, where it takes int8 with zero point 0 (export with --int8-target tensorrt)"
    return _REFUSED.get(node.op_type)


def without_single_products(model: onnx.ModelProto) -> onnx.ModelProto:
    """For Turing, where TensorRT-RTX compiles no product of float32 matrices: those inside the operators' bodies, in a
    float16 file, become sums of elementwise products.

        MatMul (a [.., n, k], b [.., k, m])  ->  ReduceSum over k of a [.., n, 1, k] * b^T [.., 1, m, k]

    Returns:
        The file with its bodies inlined.
    """
    import numpy as np
    import onnx
    import onnx.inliner

    flat = onnx.shape_inference.infer_shapes(onnx.inliner.inline_local_functions(model), data_prop=True)
    values = [*flat.graph.value_info, *flat.graph.input, *flat.graph.output]
    types = {v.name: v.type.tensor_type.elem_type for v in values} | {
        t.name: t.data_type for t in flat.graph.initializer
    }
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in values}
    ranks |= {t.name: len(t.dims) for t in flat.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in flat.graph.node:
        single = node.op_type == "MatMul" and types[node.input[0]] == onnx.TensorProto.FLOAT
        nodes += _as_sum(node, ranks[node.input[1]]) if single else [node]
    del flat.graph.node[:]
    flat.graph.node.extend(nodes)
    for axis, name in _AXES.items():
        flat.graph.initializer.append(onnx.numpy_helper.from_array(np.array([axis], np.int64), name))
    return flat


_AXES = {-1: "turing_last", -2: "turing_second", -3: "turing_third"}


def _as_sum(node: onnx.NodeProto, rank: int) -> list[onnx.NodeProto]:
    from onnx import helper

    def step(kind: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
        return helper.make_node(kind, inputs, [output], name=f"node_{output}", **attributes)

    (left, right), result = node.input, node.output[0]
    turned = [*range(rank - 2), rank - 1, rank - 2]
    return [
        step("Unsqueeze", [left, _AXES[-2]], f"{result}_rows"),
        step("Transpose", [right], f"{result}_turned", perm=turned),
        step("Unsqueeze", [f"{result}_turned", _AXES[-3]], f"{result}_columns"),
        step("Mul", [f"{result}_rows", f"{result}_columns"], f"{result}_products"),
        step("ReduceSum", [f"{result}_products", _AXES[-1]], result, keepdims=0),
    ]
