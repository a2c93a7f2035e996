"""OpenVINO as a backend: on the processor, with the native library's operators as ops in its graph.

OpenVINO's ONNX frontend knows no local functions, but it maps nodes of a foreign domain to ops that are registered with
it, once their bodies are taken out of the file: those of an extension of ours, where it was built for this OpenVINO,
else ops in Python, in which OpenVINO's threads wait for threads of the library's own. Other layers run in OpenVINO's
own kernels, in whatever precision; these ops get and give float32, but attention in bf16 gives the extension's bf16, as
OpenVINO's own layers do.
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
from sparsifiner_edge.ops.kernels import NATIVE
from sparsifiner_edge.ops.native.interface import Operators, require_valid
from sparsifiner_edge.ops.schema import DOMAIN, OPERATORS
from sparsifiner_edge.runtime.backend import (
    BF16_TOLERANCE,
    BF16_TOLERANCE_FREE,
    ProcessorBackend,
    import_package,
    read_file,
)
from sparsifiner_edge.runtime.session import Runtime, Session
from sparsifiner_edge.text import one_line

_HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
"""Of the linear layers, by OpenVINO's names; int8 layers of a file stay int8 in each."""
_LINEAR = ("FullyConnected", "MatMul")


def import_openvino(precision: str = "auto") -> Any:
    """The module `openvino`, where it has arithmetic of this precision here; see `import_package`."""
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


@functools.cache
def extension() -> Path | None:
    """Our operators as an extension that this OpenVINO loads; None: they run in Python."""
    path = native.openvino_extension()
    if path is not None:
        try:
            import_openvino().Core().add_extension(str(path))
        except Exception:  # OpenVINO's own, whatever is missing.
            return None
    return path


class OpenVino(ProcessorBackend):
    """OpenVINO's CPU plugin, on all that is not int8 in float32, or in bf16 or fp16 where the processor has them."""

    name = "openvino"
    computes = ("auto", "bf16", "fp16")

    def load(self) -> Any:
        """See `Backend.load`."""
        return import_openvino(self.execution.precision)

    def session(self, model: Path, content: bytes | str, stored: str | None = None) -> Session:
        """See `ProcessorBackend.session`."""
        return _OpenVinoSession(model, content, self.execution, stored)


class _OpenVinoSession(Session):
    """A `Session` on OpenVINO's CPU plugin. Runs of several threads take turns.

    Args:
        model, content, stored: see `ProcessorBackend.session`.
        execution: its threads are OpenVINO's, and of operators in Python the native library's. "auto" is float32, which
            loses nothing: of a float16 file too.
    """

    def __init__(self, model: Path, content: bytes | str, execution: Execution, stored: str | None) -> None:
        openvino, threads = import_openvino(execution.precision), execution.cores
        precision = "fp32" if execution.precision == "auto" else execution.precision
        self.backend, self.model, self._lock = execution.backend, model, threading.Lock()
        # OpenVINO uses int8 products even where they saturate; without them it multiplies dequantised values.
        self._spread = stored == "int8" and not has_int8_products()
        self._compiled: Any = None
        self._request: Any = None
        graph, file = read_file(content, model, execution.kernels)
        self.least_tolerance = 0.0
        if precision != "fp32":
            self.least_tolerance = BF16_TOLERANCE_FREE if file.names else BF16_TOLERANCE
        ours = sorted(file.names & set(NATIVE)) if file.library else []
        if ours and precision == "fp16":  # It would compute around them in float16, and they give float32.
            what = f"OpenVINO runs {ours[0]} in no fp16."
            raise BackendError(what, "Leave --precision out, or take bf16.")
        self._extension = extension()
        # The extension's nodes run on OpenVINO's threads: for them it says the precision, and has memory kept.
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
        except Exception as error:  # OpenVINO raises RuntimeError and others of its own.
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
            kernels=file.text(attention) + (", called from Python" if ours and not self._extension else ""),
            threads=threads,
        )

    def _compile(self, openvino: Any, graph: Any, ours: list[str], threads: int, precision: str) -> Any:
        """Never cached: OpenVINO runs what lies in its cache unchecked, and would block on a pipe there."""
        core = openvino.Core()
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": _HINTS[precision],
        }
        if self._spread:
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
        """What the linear layers really run in.

        Raises:
            BackendError: none of them runs in the precision requested.
        """
        if self._spread:
            return f"int8, run in {wanted}: this processor's products of int8 saturate"
        # Node by node: a node's attributes are freed with it.
        layers = []
        for node in self._compiled.get_runtime_model().get_ops():
            kind, computed = (node.get_rt_info()[name].astype(str) for name in ("layerType", "runtimePrecision"))
            layers.append((kind, computed))
        names = {hint: name for name, hint in _HINTS.items()} | {"u8": "int8", "i8": "int8"}
        linear = Counter(names.get(precision, precision) for kind, precision in layers if kind in _LINEAR)
        runs = [name for name, _ in linear.most_common()]
        # A file may hold every linear layer in int8.
        elsewhere = stored == "int8" and _HINTS[wanted] in {precision for _, precision in layers}
        if runs and wanted not in runs and not elsewhere:
            raise BackendError(
                f"OpenVINO runs {self.model} in {', '.join(runs)}, not {wanted}.", "Leave --precision out."
            )
        return precision_text(stored, ", ".join(name for name in runs if name != "int8") or wanted)

    def _run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        with self._lock:
            if self._request is None:
                raise self.closed_error()
            results = self._request.infer(inputs, share_inputs=True)
            return {spec.name: np.array(results[spec.name]) for spec in self.outputs}

    def close(self) -> None:
        """See `Session.close`."""
        super().close()
        with self._lock:
            self._request = self._compiled = None
            if self._operators is not None:
                self._operators.close()


@contextlib.contextmanager
def _preserve_signal_stack() -> Iterator[None]:
    """Afterwards this thread's signal handlers run where they did before.

    With AMX, OpenVINO gives the thread a stack for them, and frees it with the plugin: the next signal that Python
    handles, such as Ctrl-C or the end of a child, would end the process.
    """
    libc, before = ctypes.CDLL(None), ctypes.create_string_buffer(24)  # stack_t: its place, flags and size
    libc.sigaltstack(None, before)
    try:
        yield
    finally:
        libc.sigaltstack(before, None)


def bind(model: Any, names: Sequence[str], precision: str) -> None:
    """Tell a file's nodes the precision of attention, as the extension reads it, whatever the file says of that."""
    import onnx

    value = onnx.helper.make_attribute("precision", int(precision == "bfloat16"))
    for node in (node for node in model.graph.node if node.domain == DOMAIN and node.op_type in names):
        others = [attribute for attribute in node.attribute if attribute.name != value.name]
        del node.attribute[:]
        node.attribute.extend([*others, value])


def converters(openvino: Any, frontend: Any, names: Sequence[str], operators: Operators) -> list[Any]:
    """An extension for each of the operators named, for `Core.add_extension`.

    Args:
        openvino, frontend: the modules `openvino` and `openvino.frontend.onnx`.
        operators: runs them; must outlive the compiled model.
    """
    base = _op_class(openvino, operators)

    def convert(name: str) -> Callable[[Any], Any]:
        attributes = [attribute.name for attribute in OPERATORS[name].attributes]
        # A class each: OpenVINO takes nodes of one class, equal attributes and the same inputs for one node.
        kind = type(name, (base,), {"operator": name})

        def build(node: Any) -> Any:
            settings = {attribute: node.get_attribute(attribute) for attribute in attributes}
            return kind([node.get_input(i) for i in range(node.get_input_size())], settings).outputs()

        return build

    return [frontend.ConversionExtension(name, DOMAIN, convert(name)) for name in names]


def _op_class(openvino: Any, operators: Operators) -> Any:
    """The op that stands for all of them; the class can only be made once OpenVINO is imported."""

    class SparsifinerOp(openvino.Op):  # type: ignore[misc]
        """One node. Attributes: operator: its name."""

        operator: str

        def __init__(self, inputs: Any, attributes: dict[str, float]) -> None:
            super().__init__(self)
            self.settings = attributes
            self.set_arguments(inputs)
            self.constructor_validate_and_infer_types()

        def validate_and_infer_types(self) -> None:
            """Type and shape of the output; a size that is open stays open: it follows what is put for it."""
            shapes = [self.get_input_partial_shape(i) for i in range(self.get_input_size())]
            sizes = [[axis.get_length() if axis.is_static else None for axis in shape] for shape in shapes]
            whole = OPERATORS[self.operator].output.dtypes == ("int32",)
            kind = openvino.Type.i32 if whole else openvino.Type.f32
            some, others = (self.output_axes([[n or put for n in shape] for shape in sizes]) for put in (64, 128))
            pairs = zip(some, others, strict=True)
            axes = [openvino.Dimension(a) if a == b else openvino.Dimension() for a, b in pairs]
            self.set_output_type(0, kind, openvino.PartialShape(axes))

        def output_axes(self, shapes: Any) -> Any:
            require_valid(self.operator, self.settings, shapes)
            return OPERATORS[self.operator].output_shape(self.settings, shapes)

        def clone_with_new_inputs(self, inputs: Any) -> Any:
            return type(self)(inputs, self.settings)

        def visit_attributes(self, visitor: Any) -> bool:
            visitor.on_attributes(dict(self.settings))
            return True

        def has_evaluate(self) -> bool:
            return True

        def evaluate(self, outputs: Any, inputs: Any) -> bool:
            # By index: these lists end an iteration with an exception in C++, tens of microseconds each.
            arrays = [inputs[i].data for i in range(len(inputs))]
            output = outputs[0]
            output.shape = self.output_axes([x.shape for x in arrays])
            operators.run(self.operator, self.settings, arrays, output.data)
            return True

    return SparsifinerOp


def without_bodies(model: Any, names: Sequence[str]) -> Any:
    """A model whose local functions are gone: those of the operators named left out, all others inlined."""
    functions = [function for function in model.functions if not (function.domain == DOMAIN and function.name in names)]
    if not functions:
        del model.functions[:]
        return model
    import onnx.inliner

    excluded = [(function.domain, function.name) for function in model.functions if function not in functions]
    inlined = onnx.inliner.inline_selected_functions(model, excluded, exclude=True)
    del inlined.functions[:]
    return inlined
