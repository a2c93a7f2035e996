"""From a bundle and a backend's name to a session."""

from __future__ import annotations

import importlib
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from sparsifiner_edge.bounds import MOST_THREADS
from sparsifiner_edge.bundle.sign import require_signature
from sparsifiner_edge.bundle.store import Bundle, open_bundle
from sparsifiner_edge.errors import BackendError
from sparsifiner_edge.execution import KERNEL_CHOICES, PRECISIONS, PROVIDERS, Execution
from sparsifiner_edge.runtime.backend import Backend
from sparsifiner_edge.runtime.session import Session

BACKENDS = {
    "onnxruntime": "onnxruntime:OnnxRuntime",
    "openvino": "openvino:OpenVino",
    "tensorrt": "tensorrt.full:TensorRt",
    "tensorrt-rtx": "tensorrt.rtx:TensorRtRtx",
}
"""Name -> module beside this one, imported when it is asked for, and class in it."""
ENTRY_POINTS = "sparsifiner_edge.backends"
"""Group in which other packages name theirs: classes of `backend.Backend`. Looked at for names that are not ours."""


def check_choices(execution: Execution) -> None:
    """Refuse a name that is no backend, or a choice that is none of its kind.

    Raises:
        BackendError: lists those of this version.
    """
    others = {} if execution.backend in BACKENDS else _others()
    if execution.backend not in {**BACKENDS, **others}:
        names = ", ".join([*BACKENDS, *others])
        raise BackendError(f"Unknown backend {execution.backend!r}.", f"Choose one of: {names}.")
    for name, known in (("kernels", KERNEL_CHOICES), ("precision", PRECISIONS), ("provider", PROVIDERS)):
        if getattr(execution, name) not in known:
            raise BackendError(f"{name} is {getattr(execution, name)!r}.", f"Choose one of: {', '.join(known)}.")
    if execution.provider != "cpu" and execution.backend != "onnxruntime":
        raise BackendError(
            f"{execution.backend} has no provider {execution.provider}: those are ONNX Runtime's.",
            "Leave --provider out, or choose --backend onnxruntime.",
        )
    if execution.threads is not None and not 1 <= execution.threads <= MOST_THREADS:
        raise BackendError(
            f"threads is {execution.threads}.", f"Give 1 to {MOST_THREADS}, or leave it out to use every core allowed."
        )


def find_backend(execution: Execution) -> Backend:
    """The backend that is asked for, told how it shall run.

    Raises:
        BackendError: see `check_choices`; or another package's is no class of `Backend`, or cannot be imported.
    """
    check_choices(execution)
    if execution.backend in BACKENDS:
        module, _, name = BACKENDS[execution.backend].partition(":")
        ours: type[Backend] = getattr(importlib.import_module(f"sparsifiner_edge.runtime.{module}"), name)
        return ours(execution)
    point = _others()[execution.backend]
    try:
        kind = point.load()
    except Exception as error:  # It is anybody's code.
        raise BackendError(f"{point.value} cannot be imported: {error}.", f"Reinstall {point.name}.") from error
    if not (isinstance(kind, type) and issubclass(kind, Backend)):
        raise BackendError(f"{point.value} is no class of Backend.", f"Report it to the authors of {point.name}.")
    return kind(execution)


def _others() -> dict[str, EntryPoint]:
    """Backends of other packages that are installed, by name; none of them is imported."""
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


def open_session(
    bundle: str | Path,
    backend: str = "onnxruntime",
    threads: int | None = None,
    kernels: str = "auto",
    public_key: str | Path | None = None,
    *,
    precision: str = "auto",
    provider: str = "cpu",
) -> Session:
    """Open a bundle whose hashes match, ready to run.

    Args:
        bundle: a folder made by `sparsifiner-edge export`.
        backend: one of `BACKENDS`, or another package's (`ENTRY_POINTS`).
        threads, kernels, precision, provider: see `Execution`.
        public_key: the bundle must be signed by this key; see `sign.require_signature`.

    Raises:
        ArtifactError: not a bundle, altered, of another version, or not signed by that key.
        BackendError: no such backend, kernels, precision or provider, `threads` below 1 or absurd, the backend has no
            such precision here, or rejects the model.
        MissingExtraError: the backend's package is not installed, or what checks signatures.
    """
    execution = Execution(backend=backend, precision=precision, provider=provider, kernels=kernels, threads=threads)
    return open_checked(checked_bundle(Path(bundle), public_key), execution)


def checked_bundle(folder: Path, public_key: str | Path | None = None) -> Bundle:
    """Everything that is demanded of a bundle before any of it is loaded, as `open_session` does it; returns it."""
    return open_bundle(folder) if public_key is None else require_signature(folder, Path(public_key))


def open_checked(bundle: Bundle, execution: Execution | None = None) -> Session:
    """`open_session` with what `checked_bundle` returned: only files that its manifest vouches for are used, and no
    code of other packages where a signature was required.
    """
    execution = execution or Execution()
    if bundle.signed and execution.backend not in BACKENDS:
        raise BackendError(
            f"{execution.backend} is no backend of sparsifiner-edge itself, and a signature is required.",
            f"Choose one of: {', '.join(BACKENDS)}.",
        )
    return find_backend(execution).open(bundle)
