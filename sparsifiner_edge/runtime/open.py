"""From a bundle and a backend's name to a session."""

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
from sparsifiner_edge.execution import KERNEL_CHOICES, ON_PROCESSOR, PRECISIONS, PROVIDERS, Execution, execution_of
from sparsifiner_edge.plugins import plugins, subclass
from sparsifiner_edge.runtime.backend import Backend
from sparsifiner_edge.runtime.session import Session

ENTRY_POINTS = "sparsifiner_edge.backends"
"""Group in which other packages name theirs: classes of `backend.Backend`. Looked at for names that are not ours."""
BACKENDS = {
    name: EntryPoint(name, f"sparsifiner_edge.runtime.{place}", ENTRY_POINTS)
    for name, place in {
        "onnxruntime": "onnxruntime:OnnxRuntime",
        "openvino": "openvino:OpenVino",
        "tensorrt": "tensorrt.full:TensorRt",
        "tensorrt-rtx": "tensorrt.rtx:TensorRtRtx",
    }.items()
}
"""Ours by name, imported on first use."""


def find_backend(execution: Execution) -> Backend:
    """The backend that an execution names, set up to run as it says.

    Raises:
        BackendError: the name or a choice is unknown; the message lists those that are known. Or another package's
            backend is not a class of `Backend`, or cannot be imported.
    """
    known = BACKENDS if execution.backend in BACKENDS else {**BACKENDS, **plugins(ENTRY_POINTS)}
    if execution.backend not in known:
        raise BackendError(f"Unknown backend {execution.backend!r}.", f"Choose one of: {', '.join(known)}.")
    for name, choices in (("kernels", KERNEL_CHOICES), ("precision", PRECISIONS), ("provider", PROVIDERS)):
        if getattr(execution, name) not in choices:
            raise BackendError(f"{name} is {getattr(execution, name)!r}.", f"Choose one of: {', '.join(choices)}.")
    if execution.provider != "cpu" and execution.backend != "onnxruntime":
        what = f"{execution.backend} has no provider {execution.provider}: those are ONNX Runtime's."
        raise BackendError(what, "Leave --provider out, or choose --backend onnxruntime.")
    threads = execution.threads
    if threads is not None and not (type(threads) is int and 1 <= threads <= MOST_THREADS):
        fix = f"Give 1 to {MOST_THREADS}, or leave it out to use every core allowed."
        raise BackendError(f"threads is {threads!r}.", fix)
    return subclass(Backend, known[execution.backend], BackendError)(execution)  # type: ignore[type-abstract]


def choose_execution(bundle: Bundle, execution: Execution) -> tuple[Execution, str | None]:
    """How a bundle is run: what is left to it ("auto") is decided here alone. And why, where there is more to say than
    that ONNX Runtime runs what names no other. Nothing is timed, and no precision lowered.

    Raises:
        BackendError, MissingExtraError: see `find_backend`; or nothing can run it here.
    """
    intended, refused = bundle.manifest.intended, list[SparsifinerError]()
    for choice in _choices(bundle, execution):
        try:
            if choice != execution:  # Of what is named, opening says whether it runs.
                find_backend(choice).check(bundle)
        except (BackendError, MissingExtraError) as error:
            refused.append(error)
            continue
        if not refused and (intended is None or choice == execution):
            return choice, None
        aim = intended and str(replace(choice, backend=intended.backend, precision=intended.precision))
        of = f", which is intended for {'it' if aim == str(choice) else aim}" if aim else ""
        why = f": {refused[0].what}" if refused else "."
        install = f" {refused[0].fix}" if refused and isinstance(refused[0], MissingExtraError) else ""
        return choice, f"{choice} runs this bundle{of}{why}{install}"
    raise refused[0]


def _choices(bundle: Bundle, execution: Execution) -> Iterator[Execution]:
    """What to try, in this order; another package's backend only if a caller names it, whatever a bundle does."""
    intended, names = bundle.manifest.intended or Intended("auto"), [execution.backend]
    if names == ["auto"]:
        engines = (engine.backend for engine in reversed(bundle.manifest.engines))
        names = [name for name in (intended.backend, *engines, *ON_PROCESSOR) if name in BACKENDS]
    for name in names:
        if name == intended.backend and execution.precision == "auto":
            yield replace(execution, backend=name, precision=intended.precision)
        yield replace(execution, backend=name)


def open_session(
    bundle: str | Path, execution: Execution | str | None = None, *, public_key: str | Path | None = None
) -> Session:
    """Open a bundle whose hashes match, ready to run.

    Args:
        bundle: a folder made by `sparsifiner-edge export`.
        execution: what runs it: a backend's name, of `BACKENDS` or another package's; or a whole `Execution`.
        public_key: the bundle must be signed by this key; see `sign.require_signature`.

    Raises:
        ArtifactError: not a bundle, altered, of another version, or not signed by that key.
        BackendError: no such backend, kernels, precision or provider, `threads` below 1 or absurd, the backend has no
            such precision here, or rejects the model.
        MissingExtraError: the backend's package is not installed, or what checks signatures.

    Example:
        >>> import numpy as np
        >>> with open_session("bundle", Execution(threads=1)) as session:
        ...     outputs = session.infer({"image": np.zeros((1, 160, 160, 3), np.uint8)})
        >>> sorted(outputs)
        ['features', 'logits']
    """
    return session_on(checked_bundle(Path(bundle), public_key), execution_of(execution))


def checked_bundle(folder: Path, public_key: str | Path | None = None) -> Bundle:
    """A bundle, after all checks that precede loading any of it; see `open_session`."""
    return open_bundle(folder) if public_key is None else require_signature(folder, Path(public_key))


def session_on(
    bundle: Bundle, execution: Execution | None = None, chosen: tuple[Execution, str | None] | None = None
) -> Session:
    """`open_session` with what `checked_bundle` returned: only files that its manifest vouches for are used, and no
    code of other packages where a signature was required. chosen: what `choose_execution` gave, if it was asked.
    """
    execution = execution or Execution()
    if bundle.signed and execution.backend not in ("auto", *BACKENDS):
        what = f"{execution.backend} is no backend of sparsifiner-edge itself, and a signature is required."
        raise BackendError(what, f"Choose one of: {', '.join(BACKENDS)}.")
    choice, why = chosen or choose_execution(bundle, execution)
    backend = find_backend(choice)
    session = backend.open(bundle)
    session.opened_as = bundle, backend
    if why is not None:
        session.description = replace(session.description, chosen=why)
    return session
