"""From a bundle and a backend's name to a session."""

from __future__ import annotations

import importlib
from pathlib import Path

from sparsifiner_edge.bounds import MOST_THREADS
from sparsifiner_edge.bundle.sign import require_signature
from sparsifiner_edge.bundle.store import Bundle, open_bundle
from sparsifiner_edge.errors import BackendError
from sparsifiner_edge.machine import available_cores
from sparsifiner_edge.runtime.backend import Backend
from sparsifiner_edge.runtime.session import Session

BACKENDS = {
    "onnxruntime": "onnxruntime.backends:OnnxRuntime",
    "onnxruntime-bf16": "onnxruntime.backends:OnnxRuntimeBf16",
    "openvino": "openvino.backend:OpenVino",
    "openvino-bf16": "openvino.backend:OpenVinoBf16",
    "openvino-fp16": "openvino.backend:OpenVinoFp16",
    "onnxruntime-cuda": "onnxruntime.backends:OnnxRuntimeCuda",
    "onnxruntime-tensorrt": "onnxruntime.backends:OnnxRuntimeTensorRt",
    "tensorrt": "tensorrt.full:TensorRt",
    "tensorrt-rtx": "tensorrt.rtx:TensorRtRtx",
}
"""Name -> module beside this one, imported when it is asked for, and class in it."""
KERNEL_CHOICES = ("auto", "native", "portable")
"""What runs the operators of the domain `sparsifiner`: the native library if it was built, only it, or the bodies."""


def check_choices(backend: str, kernels: str = "auto") -> None:
    """Reject a name that is no backend, or no choice of kernels.

    Raises:
        BackendError: lists those of this version.
    """
    if backend not in BACKENDS:
        raise BackendError(f"Unknown backend {backend!r}.", f"Choose one of: {', '.join(BACKENDS)}.")
    if kernels not in KERNEL_CHOICES:
        raise BackendError(f"kernels is {kernels!r}.", f"Choose one of: {', '.join(KERNEL_CHOICES)}.")


def find_backend(backend: str) -> Backend:
    """The backend of a name.

    Raises:
        BackendError: there is none.
    """
    check_choices(backend)
    module, _, kind = BACKENDS[backend].partition(":")
    made: Backend = getattr(importlib.import_module(f"sparsifiner_edge.runtime.{module}"), kind)()
    return made


def open_session(
    bundle: str | Path,
    backend: str = "onnxruntime",
    threads: int | None = None,
    kernels: str = "auto",
    public_key: str | Path | None = None,
) -> Session:
    """Open a bundle whose hashes match, ready to run.

    Args:
        bundle: a folder made by `sparsifiner-edge export`.
        backend: one of `BACKENDS`.
        threads: threads inside one operator; None takes the cores that this process may run on.
        kernels: one of `KERNEL_CHOICES`; the session's `description` says what runs.
        public_key: the bundle must be signed by this key; see `sign.require_signature`.

    Raises:
        ArtifactError: not a bundle, altered, of another version, or not signed by that key.
        BackendError: no such backend or kernels, `threads` below 1 or absurd, or the backend rejects the model.
        MissingExtraError: the backend's package is not installed, or what checks signatures.
    """
    return open_checked(checked_bundle(Path(bundle), public_key), backend, threads, kernels)


def checked_bundle(folder: Path, public_key: str | Path | None = None) -> Bundle:
    """Everything that is demanded of a bundle before any of it is loaded, as `open_session` does it; returns it."""
    return open_bundle(folder) if public_key is None else require_signature(folder, Path(public_key))


def open_checked(
    bundle: Bundle, backend: str = "onnxruntime", threads: int | None = None, kernels: str = "auto"
) -> Session:
    """`open_session` with what `checked_bundle` returned: only files that its manifest vouches for are used."""
    check_choices(backend, kernels)
    found = find_backend(backend)
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise BackendError(
            f"threads is {threads}.", f"Give 1 to {MOST_THREADS}, or leave it out to use every core allowed."
        )
    return found.open(bundle, threads or available_cores(), found.choose_kernels(bundle, kernels))
