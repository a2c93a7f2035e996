"""A session of OpenVINO on the processor."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.bundle.manifest import TensorSpec
from sparsifiner_edge.errors import BackendError
from sparsifiner_edge.execution import Execution, precision_text
from sparsifiner_edge.machine import has_int8_products
from sparsifiner_edge.onnx_file import all_nodes, read_model
from sparsifiner_edge.ops.kernels import NATIVE, described
from sparsifiner_edge.ops.native.interface import Operators
from sparsifiner_edge.ops.schema import DOMAIN
from sparsifiner_edge.runtime.backend import import_package
from sparsifiner_edge.runtime.openvino.operators import converters, without_bodies
from sparsifiner_edge.runtime.processor import (
    BF16_TOLERANCE,
    BF16_TOLERANCE_FREE,
    as_line,
    holds_float16,
    native_library,
    usable_kernels,
    why_portable,
)
from sparsifiner_edge.runtime.session import Description, Session, validate_outputs

_HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
"""Of the linear layers, by OpenVINO's names; int8 layers of a file stay int8 in each."""
_LINEAR = ("FullyConnected", "MatMul")
_DTYPES = {"u8": "uint8", "f32": "float32", "f16": "float16", "i32": "int32", "i64": "int64", "boolean": "bool"}


def import_openvino(precision: str = "auto") -> Any:
    """The module `openvino`.

    Raises:
        MissingExtraError: it is not installed.
        BackendError: it is installed and cannot be imported, or has no arithmetic of this precision here.
    """
    # Its import reports itself over the network wherever this module is found and nobody has opted out.
    sys.modules.setdefault("openvino_telemetry", cast(Any, None))
    openvino = import_package("openvino", "openvino", "openvino", "Reinstall openvino.")
    if precision not in ("auto", "fp32"):
        known = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if precision.upper() not in known:
            raise BackendError(
                f"This processor has no {precision} arithmetic (OpenVINO: {', '.join(known)}).",
                "Leave --precision out.",
            )
    return openvino


class OpenVinoSession(Session):
    """A `Session` on OpenVINO's CPU plugin. Runs of several threads take turns.

    Attributes:
        least_tolerance: see `bundle.golden.check_golden`.

    Args:
        model: where the ONNX file is from, for messages. content: the file.
        execution: its threads are OpenVINO's, and the native library's while OpenVINO's wait. "auto" is float32, which
            loses nothing: of a float16 file too.
        stored: the bundle's own word for what its file holds.

    Raises:
        ArtifactError: it is no ONNX file, or needs another file.
        BackendError: OpenVINO rejects the model, or the processor lacks the precision.
        MissingExtraError: OpenVINO is not installed.
    """

    def __init__(self, model: Path, content: bytes, execution: Execution, stored: str | None) -> None:
        openvino, threads = import_openvino(execution.precision), execution.cores
        precision = "fp32" if execution.precision == "auto" else execution.precision
        self.backend, self._model, self._lock = execution.backend, model, threading.Lock()
        # OpenVINO takes products of int8 where they saturate, too; told to use none, it multiplies what they stand for.
        self._spread = stored == "int8" and not has_int8_products()
        self._compiled: Any = None
        self._request: Any = None
        graph = read_model(content, model)
        operators = {node.op_type for node in all_nodes(graph) if node.domain == DOMAIN}
        self.least_tolerance = 0.0 if precision == "fp32" else BF16_TOLERANCE_FREE if operators else BF16_TOLERANCE
        kernels = usable_kernels(holds_float16(graph), execution.kernels)
        ours = sorted(operators & set(NATIVE.operators)) if native_library(kernels) is not None else []
        self._operators: Operators | None = Operators(threads, precision == "bf16") if ours else None
        start = time.perf_counter_ns()
        try:
            self._compiled = self._compile(openvino, graph, ours, threads, precision)
            ran = self._precision(precision, stored)
        except BackendError:
            self.close()
            raise
        except Exception as error:  # OpenVINO raises RuntimeError and others of its own.
            self.close()
            raise BackendError(f"OpenVINO rejects {model}: {as_line(error)}", "Export the bundle again.") from error
        self._request = self._compiled.create_infer_request()
        self.load_ms = (time.perf_counter_ns() - start) / 1e6
        names = {value.name for value in (*graph.graph.input, *graph.graph.output)}
        self.inputs = [_spec(port, names) for port in self._compiled.inputs]
        self.outputs = [_spec(port, names) for port in self._compiled.outputs]
        said = self._operators.precision if self._operators is not None and precision == "bf16" else None
        why_bodies = why_portable(kernels) if kernels == "auto" else None
        self._description = Description(
            backend=self.backend,
            version=str(openvino.__version__).partition("-")[0],
            provider="CPU",
            device="CPU",
            precision=ran,
            kernels=described(operators, bool(ours), why_bodies, said),
            threads=threads,
        )

    def _compile(self, openvino: Any, graph: Any, ours: list[str], threads: int, precision: str) -> Any:
        """Anew each time: OpenVINO runs what lies in its cache unchecked, and reads a pipe there for ever."""
        core = openvino.Core()
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": _HINTS[precision],
        }
        if self._spread:
            settings["LP_TRANSFORMS_MODE"] = "NO"
        if self._operators is not None:
            frontend = import_package("openvino.frontend.onnx", "openvino", "openvino", "Reinstall openvino.")
            for extension in converters(openvino, frontend, ours, self._operators):
                core.add_extension(extension)
        return core.compile_model(
            core.read_model(without_bodies(graph, ours).SerializeToString(), b""), "CPU", settings
        )

    def _precision(self, asked: str, stored: str | None) -> str:
        """What the linear layers really run in.

        Raises:
            BackendError: none of them runs in what was asked for.
        """
        if self._spread:
            return f"int8, run in {asked}: this processor's products of int8 saturate"
        linear: Counter[str] = Counter()
        others = set()
        for node in self._compiled.get_runtime_model().get_ops():
            about = {name: node.get_rt_info()[name].astype(str) for name in ("layerType", "runtimePrecision")}
            others.add(about["runtimePrecision"])
            if about["layerType"] in _LINEAR:
                linear[about["runtimePrecision"]] += 1
        names = {_HINTS[name]: name for name in _HINTS} | {"u8": "int8", "i8": "int8"}
        found = [names.get(kind, kind) for kind, _ in linear.most_common()]
        # A file may hold every linear layer in int8.
        if found and asked not in found and not (stored == "int8" and _HINTS[asked] in others):
            raise BackendError(
                f"OpenVINO runs {self._model} in {', '.join(found)}, not {asked}.", "Leave --precision out."
            )
        return precision_text(stored, ", ".join(kind for kind in found if kind != "int8") or asked)

    @property
    def description(self) -> Description:
        """See `Session.description`."""
        return self._description

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See `Session.infer`."""
        self.validate(inputs)
        with self._lock:
            if self._request is None:
                raise BackendError(f"The session of {self._model} is closed.", "Open it again.")
            try:
                given = {name: np.ascontiguousarray(value) for name, value in inputs.items()}
                found = self._request.infer(given, share_inputs=True)
                answer = {spec.name: np.array(found[spec.name]) for spec in self.outputs}
            except Exception as error:
                raise BackendError(f"OpenVINO failed in {self._model}: {as_line(error)}", "Export it again.") from error
        validate_outputs(self._model, answer)
        return answer

    def close(self) -> None:
        """See `Session.close`."""
        with self._lock:
            self._request = self._compiled = None
            if self._operators is not None:
                self._operators.close()


def _spec(port: Any, names: set[str]) -> TensorSpec:
    """Of a port, which may have names of tensors inside the model besides its own."""
    shape = tuple(axis.get_length() if axis.is_static else "batch" for axis in port.get_partial_shape())
    kind = port.get_element_type().get_type_name()
    return TensorSpec(next(iter(names & port.get_names())), _DTYPES.get(kind, kind), shape)
