"""OpenVINO backend on the CPU, with the operators of the native library as custom ops in its graph.

OpenVINO's ONNX frontend does not support local functions. It does map nodes of a foreign domain to registered ops, if
the function bodies are removed from the file. There are two kinds of such ops:

- ops of this package's C++ extension, if it was built for the installed version of OpenVINO;
- otherwise, ops in Python. In these, OpenVINO's threads wait for the threads of the native library, which is slower.

All other layers run in OpenVINO's own kernels, in the chosen compute precision. The custom ops take and return float32,
except that attention in bf16 returns bf16 from the extension, as OpenVINO's own layers do.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.errors import BackendError
from sparsifiner_edge.execution import Execution, precision_text
from sparsifiner_edge.machine import has_int8_products
from sparsifiner_edge.ops import native
from sparsifiner_edge.ops.kernels import FROM_PYTHON, NATIVE
from sparsifiner_edge.ops.native.interface import Operators, require_valid
from sparsifiner_edge.ops.schema import DOMAIN, OPERATORS
from sparsifiner_edge.runtime.backend import (
    BF16_TOLERANCE,
    BF16_TOLERANCE_SELECTING,
    ProcessorBackend,
    import_package,
    read_file,
)
from sparsifiner_edge.runtime.session import Runtime, Session
from sparsifiner_edge.text import one_line

_HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
"""Compute precision -> OpenVINO's name for it. Layers that are int8 in the file stay int8 in each of them."""
_LINEAR = ("FullyConnected", "MatMul")
"""Layer types of OpenVINO's runtime model that count as linear layers."""


def import_openvino(precision: str = "auto") -> Any:
    """Import `openvino` and check that it supports a compute precision on this machine; see `import_package`.

    Args:
        precision: One of `OpenVino.compute_precisions` or "fp32".

    Raises:
        MissingExtraError: OpenVINO is not installed.
        BackendError: OpenVINO cannot be imported, or the CPU does not support the precision.
    """
    # The import sends telemetry if `openvino_telemetry` is installed and the user has not opted out.
    sys.modules.setdefault("openvino_telemetry", cast(Any, None))
    openvino = import_package("openvino", "openvino", "openvino", "Reinstall openvino.")
    if precision not in ("auto", "fp32"):
        known = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if precision.upper() not in known:
            raise BackendError(
                f"This CPU has no {precision} arithmetic (OpenVINO: {', '.join(known)}).",
                "Leave --compute-precision out.",
            )
    return openvino


@functools.cache
def extension() -> Path | None:
    """Return the path of the C++ extension if the installed OpenVINO loads it, and None if ops must run in Python."""
    path = native.openvino_extension()
    if path is not None:
        try:
            import_openvino().Core().add_extension(str(path))
        except Exception:  # OpenVINO raises errors of its own if something is missing.
            return None
    return path


class OpenVino(ProcessorBackend):
    """OpenVINO's CPU plugin.

    Layers that are not int8 compute in float32, or on request in bf16 or fp16 if the CPU supports them.
    """

    name = "openvino"
    compute_precisions = ("auto", "bf16", "fp16")

    def load(self) -> Any:
        """Import OpenVINO and check the precision; see `Backend.load`."""
        return import_openvino(self.execution.compute_precision)

    def session(self, model: Path, content: bytes | str, stored: str | None = None) -> Session:
        """Open a session on an ONNX file; see `ProcessorBackend.session`."""
        return _OpenVinoSession(model, content, self.execution, stored)


class _OpenVinoSession(Session):
    """A `Session` on OpenVINO's CPU plugin. Concurrent runs from several threads are serialized.

    Args:
        model: Path of the file, for messages.
        content: Content of the file, or the path of a copy that nobody modifies.
        execution: Options for running it. The number of threads applies to OpenVINO, and to the native library if its
            operators run in Python. The compute precision "auto" means float32, which is exact for float16 files too.
        stored: Weight precision according to the bundle; None if unknown.
    """

    def __init__(self, model: Path, content: bytes | str, execution: Execution, stored: str | None) -> None:
        openvino, threads = import_openvino(execution.compute_precision), execution.cores
        precision = "fp32" if execution.compute_precision == "auto" else execution.compute_precision
        self.backend, self.model, self._lock = execution.backend, model, threading.Lock()
        # OpenVINO uses int8 products even on CPUs where they saturate. With low-precision transformations turned off,
        # it multiplies dequantized values instead.
        self._dequantize = stored == "int8" and not has_int8_products()
        self._compiled: Any = None
        self._request: Any = None
        graph, file = read_file(content, model, execution.kernels)
        self.least_tolerance = 0.0
        if precision != "fp32":
            self.least_tolerance = BF16_TOLERANCE_SELECTING if file.names else BF16_TOLERANCE
        ours = sorted(file.names & set(NATIVE)) if file.library else []
        if ours and precision == "fp16":  # The layers around these ops would need float16, but the ops return float32.
            what = f"OpenVINO cannot run {ours[0]} in fp16."
            raise BackendError(what, "Leave --compute-precision out, or choose bf16.")
        self._extension = extension()
        # The extension's ops run on OpenVINO's threads. They need `Operators` for the precision and because it makes
        # the native library keep its memory between runs.
        workers = 1 if self._extension else threads
        self._operators: Operators | None = Operators(workers, precision == "bf16") if ours else None
        start = time.perf_counter_ns()
        try:
            with _preserve_signal_stack():
                self._compiled = self._compile(openvino, graph, ours, threads, precision)
            ran = self._precision(precision, stored)
        except BackendError:
            self.close()
            raise
        except Exception as error:  # OpenVINO raises RuntimeError and exceptions of its own.
            self.close()
            raise BackendError(f"OpenVINO rejects {model}: {one_line(error)}", "Export the bundle again.") from error
        self._request = self._compiled.create_infer_request()
        self.load_ms = (time.perf_counter_ns() - start) / 1e6
        self.inputs, self.outputs = file.inputs, file.outputs
        attention = self._operators.precision if self._operators is not None and precision == "bf16" else None
        self.description = Runtime(
            backend=self.backend,
            version=str(openvino.__version__).partition("-")[0],
            provider="CPU",
            device="CPU",
            precision=ran,
            kernels=file.text(attention) + (f", {FROM_PYTHON}" if ours and not self._extension else ""),
            threads=threads,
        )

    def _compile(self, openvino: Any, graph: Any, ours: list[str], threads: int, precision: str) -> Any:
        """Compile a model without OpenVINO's cache, whose files would run unchecked (a pipe there would block)."""
        core = openvino.Core()
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": _HINTS[precision],
        }
        if self._dequantize:
            settings["LP_TRANSFORMS_MODE"] = "NO"
        content = without_bodies(graph, ours)
        if self._operators is not None and self._extension is not None:
            core.add_extension(str(self._extension))
            bind(content, ours, self._operators.precision)
        elif self._operators is not None:
            frontend = import_package("openvino.frontend.onnx", "openvino", "openvino", "Reinstall openvino.")
            for extension in converters(openvino, frontend, ours, self._operators):
                core.add_extension(extension)
        model = core.read_model(content.SerializeToString(), b"")
        return core.compile_model(model, "CPU", settings)

    def _precision(self, wanted: str, stored: str | None) -> str:
        """Return a description of the precision in which the linear layers really run.

        Args:
            wanted: Requested compute precision.
            stored: Weight precision of the file; None if unknown.

        Raises:
            BackendError: No linear layer runs in the requested precision.
        """
        if self._dequantize:
            return f"int8, run in {wanted}: int8 products saturate on this CPU"
        # Read the attributes while the node is alive: they are freed with it.
        layers = []
        for node in self._compiled.get_runtime_model().get_ops():
            kind, computed = (node.get_rt_info()[name].astype(str) for name in ("layerType", "runtimePrecision"))
            layers.append((kind, computed))
        names = {hint: name for name, hint in _HINTS.items()} | {"u8": "int8", "i8": "int8"}
        linear = Counter(names.get(precision, precision) for kind, precision in layers if kind in _LINEAR)
        runs = [name for name, _ in linear.most_common()]
        # If every linear layer is int8, another layer must run in the requested precision.
        elsewhere = stored == "int8" and _HINTS[wanted] in {precision for _, precision in layers}
        if runs and wanted not in runs and not elsewhere:
            raise BackendError(
                f"OpenVINO runs {self.model} in {', '.join(runs)}, not {wanted}.", "Leave --compute-precision out."
            )
        return precision_text(stored, ", ".join(name for name in runs if name != "int8") or wanted)

    def _run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        with self._lock:
            if self._request is None:
                raise self.closed_error()
            results = self._request.infer(inputs, share_inputs=True)
            return {spec.name: np.array(results[spec.name]) for spec in self.outputs}

    def close(self) -> None:
        """Release the compiled model and the threads of the operators; see `Session.close`."""
        super().close()
        with self._lock:
            self._request = self._compiled = None
            if self._operators is not None:
                self._operators.close()


@contextlib.contextmanager
def _preserve_signal_stack() -> Iterator[None]:
    """Restore the alternate signal stack of this thread at the end of the block.

    With AMX, OpenVINO sets a signal stack of its own and frees it with the plugin. The next signal that Python handles,
    such as Ctrl-C or the end of a child, would then end the process.
    """
    libc, before = ctypes.CDLL(None), ctypes.create_string_buffer(24)  # stack_t: address, flags and size
    libc.sigaltstack(None, before)
    try:
        yield
    finally:
        libc.sigaltstack(before, None)


def bind(model: Any, names: Sequence[str], precision: str) -> None:
    """Set the attribute `precision` of a model's nodes, from which the extension reads the precision of attention.

    Args:
        model: Model to change in place; the value that the file may hold is overwritten.
        names: Operators whose nodes get the attribute.
        precision: "bfloat16" or "float32".
    """
    import onnx

    value = onnx.helper.make_attribute("precision", int(precision == "bfloat16"))
    for node in (node for node in model.graph.node if node.domain == DOMAIN and node.op_type in names):
        others = [attribute for attribute in node.attribute if attribute.name != value.name]
        del node.attribute[:]
        node.attribute.extend([*others, value])


def converters(openvino: Any, frontend: Any, names: Sequence[str], operators: Operators) -> list[Any]:
    """Return one extension per operator, for `Core.add_extension`, that maps its nodes to an op in Python.

    Args:
        openvino: Module `openvino`.
        frontend: Module `openvino.frontend.onnx`.
        names: Operators to map.
        operators: Runs the operators; it must outlive the compiled model.
    """
    base = _op_class(openvino, operators)

    def convert(name: str) -> Callable[[Any], Any]:
        attributes = [attribute.name for attribute in OPERATORS[name].attributes]
        # One class per operator: OpenVINO merges nodes of the same class with equal attributes and the same inputs.
        kind = type(name, (base,), {"operator": name})

        def build(node: Any) -> Any:
            settings = {attribute: node.get_attribute(attribute) for attribute in attributes}
            return kind([node.get_input(i) for i in range(node.get_input_size())], settings).outputs()

        return build

    return [frontend.ConversionExtension(name, DOMAIN, convert(name)) for name in names]


def _op_class(openvino: Any, operators: Operators) -> Any:
    """Return the base class of the ops in Python. It derives from a class of OpenVINO, so it is created on demand."""

    class SparsifinerOp(openvino.Op):  # type: ignore[misc]
        """A node of the graph.

        Attributes:
            operator: Name of the operator.
        """

        operator: str

        def __init__(self, inputs: Any, attributes: dict[str, float]) -> None:
            super().__init__(self)
            self.settings = attributes
            self.set_arguments(inputs)
            self.constructor_validate_and_infer_types()

        def validate_and_infer_types(self) -> None:
            """Set type and shape of the output.

            The output shape is computed twice, with two different values for the dynamic sizes. An output size that
            differs between the two is dynamic.
            """
            shapes = [self.get_input_partial_shape(i) for i in range(self.get_input_size())]
            sizes = [[axis.get_length() if axis.is_static else None for axis in shape] for shape in shapes]
            integral = OPERATORS[self.operator].output.dtypes == ("int32",)
            kind = openvino.Type.i32 if integral else openvino.Type.f32
            first, second = (self.output_axes([[n or size for n in shape] for shape in sizes]) for size in (64, 128))
            pairs = zip(first, second, strict=True)
            axes = [openvino.Dimension(a) if a == b else openvino.Dimension() for a, b in pairs]
            self.set_output_type(0, kind, openvino.PartialShape(axes))

        def output_axes(self, shapes: Any) -> Any:
            """Return the shape of the output for the shapes of the inputs, after a check of these."""
            require_valid(self.operator, self.settings, shapes)
            return OPERATORS[self.operator].output_shape(self.settings, shapes)

        def clone_with_new_inputs(self, inputs: Any) -> Any:
            """Return a copy of the node on other inputs."""
            return type(self)(inputs, self.settings)

        def visit_attributes(self, visitor: Any) -> bool:
            """Report the attributes of the node to OpenVINO."""
            visitor.on_attributes(dict(self.settings))
            return True

        def has_evaluate(self) -> bool:
            """Return True: the op implements `evaluate`."""
            return True

        def evaluate(self, outputs: Any, inputs: Any) -> bool:
            """Run the operator on the native library."""
            # Access by index: iteration over these lists ends with a C++ exception, which takes tens of microseconds.
            arrays = [inputs[i].data for i in range(len(inputs))]
            output = outputs[0]
            output.shape = self.output_axes([x.shape for x in arrays])
            operators.run(self.operator, self.settings, arrays, output.data)
            return True

    return SparsifinerOp


def without_bodies(model: Any, names: Sequence[str]) -> Any:
    """Return a model without local functions: those of the named operators are removed, all others are inlined.

    Args:
        model: Model; it may be changed in place.
        names: Operators of the domain `sparsifiner` whose nodes stay in the graph.
    """
    functions = [function for function in model.functions if not (function.domain == DOMAIN and function.name in names)]
    if not functions:
        del model.functions[:]
        return model
    import onnx.inliner

    excluded = [(function.domain, function.name) for function in model.functions if function not in functions]
    inlined = onnx.inliner.inline_selected_functions(model, excluded, exclude=True)
    del inlined.functions[:]
    return inlined
