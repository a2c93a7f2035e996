"""What a backend is: one class each; `open.find_backend` gives the one of a name. Importing this loads none.

Those that run a bundle's model on the processor share how its operators are carried out: native kernels or bodies.
"""

from __future__ import annotations

import abc
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from sparsifiner_edge.bundle.manifest import AGAIN, MODEL_FILE, TensorSpec, tensor_spec
from sparsifiner_edge.bundle.store import Bundle
from sparsifiner_edge.errors import BackendError, MissingExtraError
from sparsifiner_edge.execution import Execution
from sparsifiner_edge.onnx_file import all_nodes, read_model
from sparsifiner_edge.ops import native
from sparsifiner_edge.ops.kernels import describe
from sparsifiner_edge.ops.schema import DOMAIN
from sparsifiner_edge.runtime.session import Session

if TYPE_CHECKING:
    from onnx import ModelProto

_NO_NATIVE = "Leave --kernels native and --precision bf16 out, or export fp32."
_UNSET = "Correct or unset SPARSIFINER_TARGET, or choose the portable kernels."
_FLOAT16 = 10
"""TensorProto.FLOAT16."""
BF16_TOLERANCE, BF16_TOLERANCE_FREE = 5e-2, 1e-1
"""Greatest difference from golden outputs, relative to their range, in bf16 and fp16: dense, and where keys are chosen.
Measured on DINOv2 in bf16: .008 and .084."""


def import_package(module: str, package: str, extra: str, fix: str) -> Any:
    """Import a backend's Python module; that touches no driver.

    Args:
        module, package, extra: its names in Python and for pip, and the extra that installs it.
        fix: what to do where it is installed and does not import.

    Raises:
        MissingExtraError: it is not installed.
        BackendError: it is installed and cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in (module, module.partition(".")[0], f"{module}_bindings", f"{module}_libs"):
            raise BackendError(f"{module} lacks the module {error.name}.", f"Reinstall {package}.") from error
        raise MissingExtraError(package, extra) from error
    except Exception as error:  # Its libraries may be missing, or be those of another version.
        raise BackendError(f"{module} cannot be imported: {error}.", fix) from error


class Backend(abc.ABC):
    """What runs bundles.

    Attributes:
        name: as given to `open_session`.
        execution: how it runs them; None: by its defaults.
    """

    name: ClassVar[str]

    def __init__(self, execution: Execution | None = None) -> None:
        self.execution = execution or Execution(backend=self.name)

    @abc.abstractmethod
    def load(self) -> Any:
        """Its package, imported; that touches no driver.

        Raises:
            MissingExtraError: it is not installed.
            BackendError: it is installed and unusable: broken, too old, built without what is needed, or without the
                precision requested.
        """

    def check(self, _bundle: Bundle) -> object:
        """Raise, as `load` does, where something is missing here for a session on a bundle; it is not loaded."""
        return self.load()

    @abc.abstractmethod
    def open(self, bundle: Bundle) -> Session:
        """A session on a bundle; see `open_session`."""


def require_precision(precision: str, stored: str, name: str) -> None:
    """Refuse a precision (`PRECISIONS`) of what computes in a file's own types.

    Args:
        stored: what the file holds beside int8: "fp32" or "fp16". name: of what runs it.
    """
    if precision not in ("auto", stored):
        what = f"{name} computes in what a file stores, {stored} here, and not in {precision}."
        other = f", or export with --precision {precision}" if precision in ("fp32", "fp16") else ""
        raise BackendError(what, f"Leave --precision out{other}.")


class ProcessorBackend(Backend):
    """A backend that runs the model itself, on the processor: `build` writes nothing, and runs the golden pair.

    Attributes:
        computes: precisions (`execution.PRECISIONS`) that it may run a float32 file in.
    """

    computes: ClassVar[tuple[str, ...]]

    @abc.abstractmethod
    def session(self, model: Path, content: bytes | str, stored: str | None = None) -> Session:
        """A session on a file's content, or on the path of a copy that nobody changes.

        Args:
            model: where it is from, for messages. stored: the bundle's own word for its precision.
        """

    def open(self, bundle: Bundle) -> Session:
        """See `Backend.open`."""
        with bundle.sealed_copy(MODEL_FILE) as copy:
            return self.session(bundle.folder / MODEL_FILE, copy, bundle.manifest.precision)


class _CpuFile(NamedTuple):
    """What a session on the processor must know of a file: its operators of the domain `sparsifiner`, what runs them.

    Attributes:
        inputs, outputs: of the model. names: the operators'. float16: whether any weight is.
        library: the native one; None for function bodies.
        reason: why they are bodies where that was not chosen: they are several times slower.
    """

    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    names: set[str]
    float16: bool
    library: Path | None
    reason: str | None

    def text(self, precision: str | None = None) -> str:
        """For people; precision: of attention in the native library, where that is worth a word."""
        return describe(self.names, self.library is not None, self.reason, precision)


def read_file(content: bytes | str, model: Path, kernels: str) -> tuple[ModelProto, _CpuFile]:
    """A file, and what will run its operators.

    Args:
        content: of the file, or a path. model: where it is from, for messages. kernels: one of `KERNEL_CHOICES`.

    Raises:
        ArtifactError: it is not an ONNX file, or needs another file.
        BackendError: the kernels cannot be had of this file, or not here; or it lacks inputs or outputs, or has one
            that is not an array of numbers.
    """
    graph = read_model(content if isinstance(content, bytes) else Path(content).read_bytes(), model)
    weights = {tensor.name for tensor in graph.graph.initializer}
    values = [value for value in graph.graph.input if value.name not in weights], graph.graph.output
    try:
        inputs, outputs = ([tensor_spec(value) for value in side] for side in values)
        known = all(np.dtype(spec.dtype).kind in "fiub" for spec in (*inputs, *outputs))
    except KeyError:  # A sequence, for one.
        known = False
    if not known:
        raise BackendError(f"{model} has an input or output that is not an array of numbers.", AGAIN)
    if not inputs or not outputs:
        raise BackendError(f"{model} has no {'output' if inputs else 'input'}.", AGAIN)
    names = {node.op_type for node in all_nodes(graph) if node.domain == DOMAIN}
    float16 = holds_float16(graph)
    library = native_library(kernels, float16)
    reason = native.why_unusable() if kernels == "auto" and not float16 else None
    return graph, _CpuFile(inputs, outputs, names, float16, library, reason)


def holds_float16(model: ModelProto) -> bool:
    """Whether any of a file's weights is float16."""
    return any(tensor.data_type == _FLOAT16 for tensor in model.graph.initializer)


def native_library(kernels: str, float16: bool = False) -> Path | None:
    """The library to register for a choice of kernels (`KERNEL_CHOICES`); None for function bodies, by which a file of
    float16 runs: the native kernels take none.

    Raises:
        BackendError: "native" where it cannot be used, or the variable `SPARSIFINER_TARGET` names no instruction set.
    """
    if float16 and kernels == "native":
        raise BackendError("The native kernels take no float16.", _NO_NATIVE)
    if float16 or kernels == "portable":
        return None
    try:
        reason = native.why_unusable()
    except ValueError as error:
        raise BackendError(f"The native library cannot be used: {error}.", _UNSET) from error
    if reason and kernels == "native":
        raise BackendError(f"The native library {reason}.", "Or leave --kernels native and --precision bf16 out.")
    return None if reason else native.library_path()
