"""Session interface that all backends implement, with the input and output checks that they share."""

from __future__ import annotations

import abc
import functools
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec
import numpy as np

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.bundle.manifest import TensorSpec, shape_text
from sparsifiner_edge.errors import BackendError, SlowKernelsWarning
from sparsifiner_edge.ops.kernels import FROM_PYTHON, LACKING, REBUILD
from sparsifiner_edge.records import Unavailable
from sparsifiner_edge.text import one_line

if TYPE_CHECKING:
    from sparsifiner_edge.bundle.store import Bundle
    from sparsifiner_edge.runtime.backend import Backend
    from sparsifiner_edge.runtime.stream import Stream
    from sparsifiner_edge.runtime.stream_files import StreamSessions

Self = TypeVar("Self", bound="Session")
RANKS = {"logits": 2, "features": 2, "tokens": 3}
"""Number of axes that an output with one of these names must have, because its name defines its meaning."""


class Runtime(msgspec.Struct, frozen=True, kw_only=True):
    """Description of the software and hardware that run a model. Attributes a runtime cannot report are None.

    Attributes:
        backend: Name of the backend, or of PyTorch.
        precision: Weight and compute precision of the model, for users.
        threads: Number of threads inside one operator.
        version: Version of the backend's package.
        provider: Execution provider of ONNX Runtime, or "CPU" (OpenVINO), "TensorRT" or "TensorRT-RTX".
        device: Device that runs the model, for users.
        kernels: Kernels of the `sparsifiner` operators: "native, <instruction set>", "function bodies",
            "none (standard operators)", or the variant of an engine.
        cuda: Python package for CUDA and the driver that run an engine.
        why_no_graph: Reason why runs of an engine are not recorded as CUDA graphs, known from the second run on at the
            latest. None if they are recorded.
        chosen: Reason for this backend and precision, if the bundle decided them and the reason is worth reporting.
    """

    backend: str | Unavailable
    precision: str | Unavailable
    threads: int | Unavailable | None = None
    version: str | Unavailable | None = None
    provider: str | Unavailable | None = None
    device: str | Unavailable | None = None
    kernels: str | Unavailable | None = None
    cuda: str | None = None
    why_no_graph: str | None = None
    chosen: str | None = None


class Session(abc.ABC):
    """A loaded model that is ready to run. As a context manager, it is closed at the end of the block.

    Attributes:
        backend: Name of the backend, as passed to `open_session`.
        model: Path of the model file, for messages.
        inputs: All inputs, in the order of the model.
        outputs: All outputs, in the order of the model.
        load_ms: Milliseconds that the backend took to create the session, without hashing and reading the manifest.
        least_tolerance: Minimum tolerance of the golden check. It is above 0 if the backend computes in fewer bits
            than the file holds.
        least_batch: Smallest batch size that the session accepts. The golden check repeats its input up to it.
        golden_runs: Number of runs in the golden check, if later runs work differently from the first.
        in_place_of_sparse: True if the session computes dense attention in place of sparse attention. The golden check
            then compares mean cosines of rows.
        description: Software and hardware that run the model.
        opened_as: Bundle and backend of the session; None if it was opened on a file.
    """

    backend: str
    model: Path
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    load_ms: float
    least_tolerance = 0.0
    least_batch = golden_runs = 1
    in_place_of_sparse = False
    description: Runtime
    opened_as: tuple[Bundle, Backend] | None = None
    _streaming: StreamSessions | None = None

    def validate(self, inputs: Mapping[str, Array]) -> None:
        """Check names, types, ranks and sizes of inputs, and that axes of the same name have the same size.

        Args:
            inputs: Arrays by input name.

        Raises:
            BackendError: An input is wrong; the message gives its name, the actual and the expected array.
        """
        expected = ", ".join(f"{spec.name} ({spec})" for spec in self.inputs)
        for name in inputs.keys() - {spec.name for spec in self.inputs}:
            raise BackendError(f"Unknown input {name!r}.", f"The model's inputs: {expected}.")
        bound: dict[str, int] = {}
        for spec in self.inputs:
            if spec.name not in inputs:
                raise BackendError(f"Input {spec.name!r} is missing.", f"The model's inputs: {expected}.")
            _validate_one(spec, inputs[spec.name], bound)

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the model once.

        Args:
            inputs: One array per entry of `inputs`, of its type and shape.

        Returns:
            One array per entry of `outputs`, by name.

        Raises:
            BackendError: `validate` rejects the inputs, the backend fails, or the session is closed.

        Warns:
            SlowKernelsWarning: The native kernels are not installed, so slower function bodies run. Issued once per
                process.
        """
        self.validate(inputs)
        if (kernels := str(self.description.kernels)).startswith(LACKING):
            _warn_slow(f"Sparse attention runs as {kernels}, which are several times slower than the native kernels.")
        elif FROM_PYTHON in kernels:
            _warn_slow(f"OpenVINO calls the sparse operators from Python, which is slower. {REBUILD}")
        try:
            outputs = self._run({name: np.ascontiguousarray(value) for name, value in inputs.items()})
        except BackendError:
            raise
        except Exception as error:  # The runtimes' errors have no common base class but Exception.
            what = f"{self.backend} failed in {self.model}: {one_line(error)}"
            raise BackendError(what, "Close other programs if memory ran out; else export it again.") from error
        validate_outputs(self.model, outputs)
        return outputs

    def stream(self, at_least: float | None = None, share: float | None = None) -> Stream:
        """Return a stream that processes consecutive frames and recomputes only the patches that changed.

        A session can have several streams. Each has a state of its own, and they take turns. All end with the session.

        Args:
            at_least: Fidelity to keep: the estimated mean cosine of a frame's patches to those of the dense model.
                The stream recomputes as few patches as that allows, and falls back to the full model if too many
                changed. None selects 0.98.
            share: Fraction of the patches to recompute in every frame instead, unless the scene changes.

        Returns:
            A stream before its first frame.

        Raises:
            BackendError: The bundle was exported without --stream, or the backend does not support streams.
            ConfigError: A value is out of range, or both are given.

        Example:
            >>> import numpy as np
            >>> with open_session("streaming") as session:
            ...     stream = session.stream()
            ...     for number in range(3):
            ...         outputs = stream.infer({"image": np.full((1, 160, 160, 3), 100, np.uint8)})
            >>> stream.computed.by
            'incremental'
        """
        from sparsifiner_edge.runtime.stream import Stream
        from sparsifiner_edge.runtime.stream_files import open_stream

        if self.opened_as is None:
            raise BackendError(f"This session of {self.model} was opened without its bundle.", "Open the bundle.")
        self._streaming = self._streaming or open_stream(*self.opened_as)
        return Stream(self, self._streaming, at_least, share)

    @abc.abstractmethod
    def _run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """Run the model on the backend; the inputs are validated and contiguous."""

    def closed_error(self) -> BackendError:
        """Return the error for a run of a session that is closed."""
        return BackendError(f"The session of {self.model} is closed.", "Open it again.")

    @abc.abstractmethod
    def close(self) -> None:
        """Release the model and the sessions of its streams. Closing twice is harmless."""
        if self._streaming is not None:
            self._streaming.close()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


@functools.cache
def _warn_slow(text: str) -> None:
    """Issue a warning once per process.

    Python itself would repeat it for each calling line, and for every line after any `catch_warnings`.
    """
    warnings.warn(text, SlowKernelsWarning, stacklevel=3)


def _validate_one(spec: TensorSpec, value: object, bound: dict[str, int]) -> None:
    """Check one input. `bound` collects the sizes of named axes over all inputs."""
    if not isinstance(value, np.ndarray):
        raise BackendError(f"Input {spec.name!r} got {type(value).__name__}.", f"Expected a NumPy array: {spec}.")
    fits = value.dtype == np.dtype(spec.dtype) and value.ndim == len(spec.shape)
    for axis, size in zip(spec.shape, value.shape, strict=False):
        wanted = bound.setdefault(axis, size) if isinstance(axis, str) else axis
        fits = fits and size > 0 and wanted in (None, size)
    if not fits:
        raise BackendError(
            f"Input {spec.name!r} got {value.dtype} {shape_text(value.shape)}.",
            f"Expected {spec}. Axes of the same name have the same size, and no axis is empty. Convert it first.",
        )


def validate_outputs(origin: object, outputs: Mapping[str, Array | list[object]]) -> None:
    """Check that the outputs of a model are numeric arrays, with the rank that their name requires (`RANKS`).

    Values may be NaN or infinite; code that prints them marks them (`text.finite`).

    Args:
        origin: Model, for messages.
        outputs: Outputs by name.

    Raises:
        BackendError: An output is wrong; the message gives its name, its actual and its required form.
    """
    for name, value in outputs.items():
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiub":
            kind = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
            raise BackendError(
                f"Output {name!r} of {origin} is {kind}.", "A bundle's model must return numeric arrays."
            )
        rank = RANKS.get(name, value.ndim)
        if value.ndim != rank or not value.size:
            what = f"Output {name!r} of {origin} has shape {shape_text(value.shape)}."
            raise BackendError(what, f"Export the bundle again: the output must have {rank} axes, none empty.")
