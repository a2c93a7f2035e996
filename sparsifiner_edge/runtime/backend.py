"""Base classes of the backends. Importing this module imports no backend.

Each backend is one subclass of `Backend`; `open.find_backend` returns the one with a given name. The backends that run
a bundle's model on the CPU derive from `ProcessorBackend`. They share the choice of kernels for the operators of the
domain `sparsifiner`: the native library, or the ONNX function bodies in the file.
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

_NO_NATIVE = "Leave --kernels native and --compute-precision bf16 out, or export fp32."
_UNSET = "Correct or unset SPARSIFINER_TARGET, or choose the portable kernels."
_FLOAT16 = 10
"""Value of `TensorProto.FLOAT16`."""
BF16_TOLERANCE = 5e-2
"""Golden tolerance of a dense model in bf16 or fp16: maximum absolute difference, relative to the output's range.

The error measured on DINOv2 in bf16 is 0.008.
"""
BF16_TOLERANCE_SELECTING = 1e-1
"""Golden tolerance of a model that selects keys in bf16 or fp16, relative to the output's range.

It is larger than `BF16_TOLERANCE` because rounding can change which keys are selected. The error measured on DINOv2 in
bf16 is 0.084.
"""


def import_package(module: str, package: str, extra: str, fix: str) -> Any:
    """Import the Python module of a backend without touching a driver.

    Args:
        module: Name of the module in Python.
        package: Name of the package for pip.
        extra: Extra of this project that installs the package.
        fix: Advice for the case that the package is installed but fails to import.

    Returns:
        The imported module.

    Raises:
        MissingExtraError: The package is not installed.
        BackendError: The package is installed and cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in (module, module.partition(".")[0], f"{module}_bindings", f"{module}_libs"):
            raise BackendError(f"{module} lacks the module {error.name}.", f"Reinstall {package}.") from error
        raise MissingExtraError(package, extra) from error
    except Exception as error:  # Shared libraries may be missing or have the wrong version.
        raise BackendError(f"{module} cannot be imported: {error}.", fix) from error


class Backend(abc.ABC):
    """Base class of everything that runs bundles.

    Args:
        execution: Options for running bundles; None selects the backend's defaults.

    Attributes:
        name: Name of the backend, as passed to `open_session`.
        execution: Options for running bundles.
    """

    name: ClassVar[str]

    def __init__(self, execution: Execution | None = None) -> None:
        self.execution = execution or Execution(backend=self.name)

    @abc.abstractmethod
    def load(self) -> Any:
        """Import the backend's package without touching a driver.

        Returns:
            The imported module.

        Raises:
            MissingExtraError: The package is not installed.
            BackendError: The package is unusable: broken, too old, built without a required feature, or without
                support for the requested precision.
        """

    def check(self, _bundle: Bundle) -> object:
        """Check that this machine can run a bundle, without loading the model.

        Raises:
            MissingExtraError: A required package is not installed.
            BackendError: The backend cannot run the bundle on this machine.
        """
        return self.load()

    @abc.abstractmethod
    def open(self, bundle: Bundle) -> Session:
        """Open a session on a bundle; see `open_session`."""


def require_precision(precision: str, stored: str, name: str) -> None:
    """Check the compute precision requested of a backend that always computes in the types of the file.

    Args:
        precision: Requested compute precision, one of `execution.COMPUTE_PRECISIONS`.
        stored: Type of the weights that are not int8: "fp32" or "fp16".
        name: Name of the backend, for the message.

    Raises:
        BackendError: The requested precision is neither "auto" nor that of the file.
    """
    if precision not in ("auto", stored):
        what = f"{name} computes in the file's precision, {stored}, not in {precision}."
        other = f", or export with --precision {precision}" if precision in ("fp32", "fp16") else ""
        raise BackendError(what, f"Leave --compute-precision out{other}.")


class ProcessorBackend(Backend):
    """Base class of the backends that run the bundle's ONNX file directly on the CPU, without a build step.

    Attributes:
        compute_precisions: Compute precisions (`execution.COMPUTE_PRECISIONS`) in which it may run a float32 file.
    """

    compute_precisions: ClassVar[tuple[str, ...]]

    @abc.abstractmethod
    def session(self, model: Path, content: bytes | str, stored: str | None = None) -> Session:
        """Open a session on an ONNX file.

        Args:
            model: Path of the file, for messages.
            content: Content of the file, or the path of a copy that nobody modifies.
            stored: Weight precision according to the bundle; None if unknown.
        """

    def open(self, bundle: Bundle) -> Session:
        """Open a session on the bundle's model; see `Backend.open`."""
        with bundle.sealed_copy(MODEL_FILE) as copy:
            return self.session(bundle.folder / MODEL_FILE, copy, bundle.manifest.precision)


class _CpuFile(NamedTuple):
    """Facts about an ONNX file that a session on the CPU needs.

    Attributes:
        inputs: Inputs of the model, without initializers.
        outputs: Outputs of the model.
        names: Operators of the domain `sparsifiner` that the file uses.
        float16: True if any weight is float16.
        library: Native library that runs these operators; None if the function bodies run.
        reason: Reason why the native library is unusable although it was not ruled out; None otherwise. Function
            bodies are several times slower.
    """

    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    names: set[str]
    float16: bool
    library: Path | None
    reason: str | None

    def text(self, precision: str | None = None) -> str:
        """Return a description of the kernels for users.

        Args:
            precision: Precision of attention in the native library, if it is to be mentioned.
        """
        return describe(self.names, self.library is not None, self.reason, precision)


def read_file(content: bytes | str, model: Path, kernels: str) -> tuple[ModelProto, _CpuFile]:
    """Parse an ONNX file and choose the kernels for its operators.

    Args:
        content: Content of the file, or a path to it.
        model: Path of the file, for messages.
        kernels: One of `KERNEL_CHOICES`.

    Returns:
        The parsed model, and the facts a session needs.

    Raises:
        ArtifactError: The file is not an ONNX file, or refers to another file.
        BackendError: The requested kernels do not support the file or are not available on this machine; or the model
            lacks inputs or outputs, or has one that is not an array of numbers.
    """
    graph = read_model(content if isinstance(content, bytes) else Path(content).read_bytes(), model)
    weights = {tensor.name for tensor in graph.graph.initializer}
    values = [value for value in graph.graph.input if value.name not in weights], graph.graph.output
    try:
        inputs, outputs = ([tensor_spec(value) for value in side] for side in values)
        known = all(np.dtype(spec.dtype).kind in "fiub" for spec in (*inputs, *outputs))
    except KeyError:  # The value is no tensor, such as a sequence.
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
    """Return True if any weight of a model is float16."""
    return any(tensor.data_type == _FLOAT16 for tensor in model.graph.initializer)


def native_library(kernels: str, float16: bool = False) -> Path | None:
    """Return the path of the native library to register for a choice of kernels.

    Args:
        kernels: One of `KERNEL_CHOICES`.
        float16: True if the file has float16 weights, which the native kernels do not support.

    Returns:
        The library, or None if the function bodies in the file run the operators.

    Raises:
        BackendError: The native kernels were requested and cannot be used, or the environment variable
            `SPARSIFINER_TARGET` names an instruction set that this machine lacks.
    """
    if float16 and kernels == "native":
        raise BackendError("The native kernels do not support float16.", _NO_NATIVE)
    if float16 or kernels == "portable":
        return None
    try:
        reason = native.why_unusable()
    except ValueError as error:
        raise BackendError(f"The native library cannot be used: {error}.", _UNSET) from error
    if reason and kernels == "native":
        raise BackendError(
            f"The native library {reason}.",
            "To run without it, leave --kernels native or --compute-precision bf16 out.",
        )
    return None if reason else native.library_path()
