"""What the backends share that run a bundle's model on the processor: native kernels or function bodies, and which."""

from __future__ import annotations

import abc
from pathlib import Path

from sparsifiner_edge.bundle.manifest import MODEL_FILE
from sparsifiner_edge.bundle.store import Bundle
from sparsifiner_edge.errors import BackendError
from sparsifiner_edge.ops import native
from sparsifiner_edge.ops.kernels import NATIVE
from sparsifiner_edge.runtime.backend import Backend
from sparsifiner_edge.runtime.session import Session

BF16_TOLERANCE, BF16_TOLERANCE_FREE = 5e-2, 1e-1
"""Greatest difference from golden outputs, relative to their range, in bf16 and fp16: dense, and where keys are chosen.
Measured on DINOv2 in bf16: .008 and .084."""


class ProcessorBackend(Backend):
    """A backend that runs the model itself, on the processor: `build` writes nothing, and runs the golden pair."""

    @abc.abstractmethod
    def session(
        self, model: Path, content: bytes | str, threads: int, kernels: str, stored: str | None = None
    ) -> Session:
        """A session on a file's content, or on the path of a copy that nobody changes.

        Args:
            model: where it is from, for messages. stored: the bundle's own word for its precision.
        """

    def open(self, bundle: Bundle, threads: int, kernels: str) -> Session:
        """See `Backend.open`."""
        with bundle.sealed_copy(MODEL_FILE) as copy:
            return self.session(bundle.folder / MODEL_FILE, copy, threads, kernels, bundle.manifest.precision)

    def choose_kernels(self, bundle: Bundle, kernels: str) -> str:
        """See `Backend.choose_kernels`: a file of a type that the native kernels do not take runs by its bodies."""
        if bundle.manifest.float16 is None or "float16" in NATIVE.dtypes:
            return kernels
        if kernels == "native":
            raise BackendError("The native kernels take no float16.", "Choose auto or portable, or export fp32.")
        return "portable"


def native_library(kernels: str) -> Path | None:
    """The library to register for a choice of kernels (`open.KERNEL_CHOICES`); None for function bodies.

    Raises:
        BackendError: "native" where it cannot be used, or the variable `SPARSIFINER_TARGET` names no instruction set.
    """
    reason = why_portable(kernels)
    if reason is not None and kernels == "native":
        raise BackendError(f"The native library {reason}.", "Or choose the portable kernels.")
    return native.library_path() if reason is None else None


def why_portable(kernels: str) -> str | None:
    """Why a choice of kernels (`open.KERNEL_CHOICES`) means function bodies here; None where the native library runs.

    Raises:
        BackendError: the variable `SPARSIFINER_TARGET` names no instruction set.
    """
    if kernels == "portable":
        return "was not asked for"
    try:
        return NATIVE.why_missing()
    except ValueError as error:
        raise BackendError(f"The native library cannot be used: {error}.", "Choose the portable kernels.") from error


def as_line(error: Exception) -> str:
    """What a runtime says, as one line of a message."""
    return " ".join(str(error).split())[:500]
