"""What every backend offers, and the one check of inputs that all of them share."""

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
from sparsifiner_edge.ops.kernels import LACKING
from sparsifiner_edge.records import Unavailable
from sparsifiner_edge.text import one_line

if TYPE_CHECKING:
    from sparsifiner_edge.bundle.store import Bundle
    from sparsifiner_edge.runtime.backend import Backend
    from sparsifiner_edge.runtime.stream import Stream, StreamSessions

Self = TypeVar("Self", bound="Session")
RANKS = {"logits": 2, "features": 2, "tokens": 3}
"""Axes of the outputs that have a meaning by name."""


class Runtime(msgspec.Struct, frozen=True, kw_only=True):
    """What really ran a model: a backend, which says all that it has, or torch.

    Attributes:
        chosen: why this backend and precision, where the caller left them to the bundle, and it says something.
        precision: of the model. threads: inside one operator.
        provider: ONNX Runtime's word; "TensorRT" or "TensorRT-RTX" of an engine. device: for people.
        kernels: "native, <instruction set>", "function bodies", "none (standard operators)", or an engine's.
        cuda: package and driver of an engine. why_no_graph: why its runs are not recorded, which may be known from the
            second one on; None: they are.
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
    """A bundle, loaded and ready to run. A context manager: leaving the block closes it.

    Attributes:
        backend: its name, as given to `open_session`. model: its file, for messages.
        inputs, outputs: every one, in the model's order.
        description: what really runs.
        load_ms: milliseconds that the backend took to make the session; hashing and reading the manifest excluded.
        least_tolerance, least_batch, golden_runs, in_place_of_sparse: for the golden check: a tolerance that
            counts if it is the larger one, for computing in fewer bits than the file holds; the batch to repeat the
            input to, where smaller ones are refused; runs that must agree, where later ones work otherwise than the
            first; whether attention is dense in the place of sparse, so that the mean cosine of rows counts.
        opened_as: what it is on, where that is a bundle.
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
        """Check names, types, ranks, sizes, and that axes of one name have one size.

        Raises:
            BackendError: names the input, what it got and what it expected.
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
            inputs: one array per entry of `inputs`, of its type and shape.

        Returns:
            One array per entry of `outputs`.

        Raises:
            BackendError: `validate` rejects the inputs, the backend fails, or the session is closed.

        Warns:
            SlowKernelsWarning: once per process, where kernels are not installed that would carry out the operators.
        """
        self.validate(inputs)
        if (kernels := str(self.description.kernels)).startswith(LACKING):
            _say_slow(f"Sparse attention runs by {kernels}, which are several times slower than its kernels.")
        try:
            outputs = self._run({name: np.ascontiguousarray(value) for name, value in inputs.items()})
        except BackendError:
            raise
        except Exception as error:  # Runtimes share no base of their errors but Exception.
            what = f"{self.backend} failed in {self.model}: {one_line(error)}"
            raise BackendError(what, "Close other programs if memory ran out; else export it again.") from error
        validate_outputs(self.model, outputs)
        return outputs

    def stream(self, at_least: float | None = None, share: float | None = None) -> Stream:
        """Frames of a camera, one after the other: of each is computed what changed. Several streams take turns, each
        with a state of its own; they end with the session.

        Args:
            at_least: fidelity of a frame to the dense model, as estimated: the mean cosine of its patches; None: .98.
                As few of these are computed as that takes, and where too many changed, the model answers.
            share: of the patches, that every frame computes instead, unless it is another scene.

        Raises:
            BackendError: the bundle was exported without --stream, or this backend runs none.
            ConfigError: a number is out of range, or both are there.

        Example:
            >>> import numpy as np
            >>> with open_session("streaming") as session:
            ...     stream = session.stream()
            ...     for number in range(3):
            ...         outputs = stream.infer({"image": np.full((1, 160, 160, 3), 100 + number // 2, np.uint8)})
            >>> stream.computed.by
            'step'
        """
        from sparsifiner_edge.runtime.stream import Stream, open_stream

        if self.opened_as is None:
            raise BackendError(f"This session of {self.model} was opened without its bundle.", "Open the bundle.")
        self._streaming = self._streaming or open_stream(*self.opened_as)
        return Stream(self, self._streaming, at_least, share)

    @abc.abstractmethod
    def _run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """The backend's part of `infer`; the inputs are checked, and contiguous."""

    def closed_error(self) -> BackendError:
        """The error for a run of a session that was closed."""
        return BackendError(f"The session of {self.model} is closed.", "Open it again.")

    @abc.abstractmethod
    def close(self) -> None:
        """Release the model, and what its streams run on. Closing twice is harmless."""
        if self._streaming is not None:
            self._streaming.close()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


@functools.cache
def _say_slow(text: str) -> None:
    """Python itself repeats a warning for each calling line, and for all after any `catch_warnings`."""
    warnings.warn(text, SlowKernelsWarning, stacklevel=3)


def _validate_one(spec: TensorSpec, value: object, bound: dict[str, int]) -> None:
    if not isinstance(value, np.ndarray):
        raise BackendError(f"Input {spec.name!r} got {type(value).__name__}.", f"Expected a NumPy array: {spec}.")
    fits = value.dtype == np.dtype(spec.dtype) and value.ndim == len(spec.shape)
    for axis, size in zip(spec.shape, value.shape, strict=False):
        wanted = bound.setdefault(axis, size) if isinstance(axis, str) else axis
        fits = fits and size > 0 and wanted in (None, size)
    if not fits:
        raise BackendError(
            f"Input {spec.name!r} got {value.dtype} {shape_text(value.shape)}.",
            f"Expected {spec}, where axes of one name have one size, and none is empty. Convert it first.",
        )


def validate_outputs(origin: object, outputs: Mapping[str, Array | list[object]]) -> None:
    """Check what a model gave before anyone computes with it: arrays of numbers, and those that have a meaning by name
    of their rank. Values may be NaN or infinite: whoever shows them says so (`text.finite`).

    Args:
        origin: the model, for messages.
        outputs: by name.

    Raises:
        BackendError: names the output, what it is, and what it must be.
    """
    for name, value in outputs.items():
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiub":
            kind = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
            raise BackendError(f"Output {name!r} of {origin} is {kind}.", "A bundle's model gives arrays of numbers.")
        rank = RANKS.get(name, value.ndim)
        if value.ndim != rank or not value.size:
            what = f"Output {name!r} of {origin} has shape {shape_text(value.shape)}."
            raise BackendError(what, f"Export it again: it must have {rank} axes, none of them empty.")
