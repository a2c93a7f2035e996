"""Opening of a session on a bundle: lookup of the backend by name, and its choice where none is named."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

from msgspec.structs import replace

from sparsifiner_edge.bounds import MOST_THREADS
from sparsifiner_edge.bundle.manifest import Intended
from sparsifiner_edge.bundle.sign import require_signature
from sparsifiner_edge.bundle.store import Bundle, open_bundle
from sparsifiner_edge.errors import BackendError, MissingExtraError, SparsifinerError
from sparsifiner_edge.execution import (
    COMPUTE_PRECISIONS,
    KERNEL_CHOICES,
    ON_PROCESSOR,
    PROVIDERS,
    Execution,
    execution_of,
)
from sparsifiner_edge.plugins import plugins, subclass
from sparsifiner_edge.runtime.backend import Backend
from sparsifiner_edge.runtime.session import Session

ENTRY_POINTS = "sparsifiner_edge.backends"
"""Entry point group in which other packages register backends (subclasses of `backend.Backend`).

It is searched only for names that are not in `BACKENDS`.
"""
BACKENDS = {
    name: EntryPoint(name, f"sparsifiner_edge.runtime.{location}", ENTRY_POINTS)
    for name, location in {
        "onnxruntime": "onnxruntime:OnnxRuntime",
        "openvino": "openvino:OpenVino",
        "tensorrt": "tensorrt.full:TensorRt",
        "tensorrt-rtx": "tensorrt.rtx:TensorRtRtx",
    }.items()
}
"""Backends of this package by name; each is imported on first use."""


def find_backend(execution: Execution) -> Backend:
    """Return the backend that an execution names, configured with that execution.

    Raises:
        BackendError: The backend or the value of an option is unknown (the message lists the valid ones), or the
            backend of another package cannot be imported or is not a subclass of `Backend`.
    """
    known = BACKENDS if execution.backend in BACKENDS else {**BACKENDS, **plugins(ENTRY_POINTS)}
    if execution.backend not in known:
        raise BackendError(f"Unknown backend {execution.backend!r}.", f"Choose one of: {', '.join(known)}.")
    for name, choices in (
        ("kernels", KERNEL_CHOICES),
        ("compute_precision", COMPUTE_PRECISIONS),
        ("provider", PROVIDERS),
    ):
        if getattr(execution, name) not in choices:
            raise BackendError(f"{name} is {getattr(execution, name)!r}.", f"Choose one of: {', '.join(choices)}.")
    if execution.provider != "cpu" and execution.backend != "onnxruntime":
        what = f"{execution.backend} has no provider {execution.provider}: only ONNX Runtime has providers."
        raise BackendError(what, "Leave --provider out, or choose --backend onnxruntime.")
    threads = execution.threads
    if threads is not None and not (type(threads) is int and 1 <= threads <= MOST_THREADS):
        fix = f"Give 1 to {MOST_THREADS}, or leave it out to use every core that this process may use."
        raise BackendError(f"threads is {threads!r}.", fix)
    return subclass(Backend, known[execution.backend], BackendError)(execution)  # type: ignore[type-abstract]


def choose_execution(bundle: Bundle, execution: Execution) -> tuple[Execution, str | None]:
    """Resolve the options that are left to the bundle ("auto") to a backend and a compute precision.

    This is the only place that decides them. The candidates are tried in a fixed order; nothing is timed, and no
    precision is lowered.

    Args:
        bundle: Bundle to run.
        execution: Options as the caller gave them.

    Returns:
        The resolved options, and a sentence with the reason. The reason is None if it is obvious: the first candidate
        runs, and the bundle names no intended backend or the caller's own choice applies.

    Raises:
        BackendError: An option is invalid, or no backend can run the bundle on this machine.
        MissingExtraError: The package of the first candidate is not installed and no other candidate runs.
    """
    intended, refused = bundle.manifest.intended, list[SparsifinerError]()
    for choice in _choices(bundle, execution):
        try:
            if choice != execution:  # A choice of the caller is checked when it is opened.
                find_backend(choice).check(bundle)
        except (BackendError, MissingExtraError) as error:
            refused.append(error)
            continue
        if not refused and (intended is None or choice == execution):
            return choice, None
        aim = intended and str(replace(choice, backend=intended.backend, compute_precision=intended.compute_precision))
        intention = f", which is intended for {'it' if aim == str(choice) else aim}" if aim else ""
        why = f": {refused[0].what}" if refused else "."
        install = f" {refused[0].fix}" if refused and isinstance(refused[0], MissingExtraError) else ""
        return choice, f"{choice} runs this bundle{intention}{why}{install}"
    raise refused[0]


def _choices(bundle: Bundle, execution: Execution) -> Iterator[Execution]:
    """Yield the candidates in the order in which to try them.

    A backend of another package is tried only if the caller names it, even if the bundle is intended for it.
    """
    intended, names = bundle.manifest.intended or Intended("auto"), [execution.backend]
    if names == ["auto"]:
        engines = (engine.backend for engine in reversed(bundle.manifest.engines))
        names = [name for name in (intended.backend, *engines, *ON_PROCESSOR) if name in BACKENDS]
    for name in names:
        if name == intended.backend and execution.compute_precision == "auto":
            yield replace(execution, backend=name, compute_precision=intended.compute_precision)
        yield replace(execution, backend=name)


def open_session(
    bundle: str | Path, execution: Execution | str | None = None, *, public_key: str | Path | None = None
) -> Session:
    """Open a session on a bundle, after a check of its file hashes.

    Args:
        bundle: Folder written by `sparsifiner-edge export`.
        execution: Name of a backend, either in `BACKENDS` or of another package, or an `Execution` with all options.
            None selects the defaults.
        public_key: Public key that must have signed the bundle; see `sign.require_signature`. None skips the check.

    Returns:
        A session that is ready to run. Use it as a context manager or close it.

    Raises:
        ArtifactError: The folder is not a bundle, was altered, is of another version, or is not signed by the key.
        BackendError: The backend, kernels, precision, provider or number of threads is invalid, the backend does not
            support the precision on this machine, or it rejects the model.
        MissingExtraError: The backend's package, or the package that verifies signatures, is not installed.

    Example:
        >>> import numpy as np
        >>> with open_session("bundle", Execution(threads=1)) as session:
        ...     outputs = session.infer({"image": np.zeros((1, 160, 160, 3), np.uint8)})
        >>> sorted(outputs)
        ['features', 'logits']
    """
    return session_on(checked_bundle(Path(bundle), public_key), execution_of(execution))


def checked_bundle(folder: Path, public_key: str | Path | None = None) -> Bundle:
    """Open a bundle and run all checks that precede loading its files; see `open_session`."""
    return open_bundle(folder) if public_key is None else require_signature(folder, Path(public_key))


def session_on(
    bundle: Bundle, execution: Execution | None = None, chosen: tuple[Execution, str | None] | None = None
) -> Session:
    """Open a session on a bundle that `checked_bundle` returned.

    Only files whose hashes match the manifest are used. If a signature was required, no backend of another package is
    loaded.

    Args:
        bundle: Checked bundle.
        execution: Options for running it; None selects the defaults.
        chosen: Result of `choose_execution`, if it was called before.

    Raises:
        BackendError: The bundle cannot be run as requested.
        MissingExtraError: The backend's package is not installed.
    """
    execution = execution or Execution()
    if bundle.signed and execution.backend not in ("auto", *BACKENDS):
        what = f"{execution.backend} is not a backend of sparsifiner-edge itself, and a signature is required."
        raise BackendError(what, f"Choose one of: {', '.join(BACKENDS)}.")
    choice, why = chosen or choose_execution(bundle, execution)
    backend = find_backend(choice)
    session = backend.open(bundle)
    session.opened_as = bundle, backend
    if why is not None:
        session.description = replace(session.description, chosen=why)
    return session
