"""From a bundle and a backend's name to a session."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoint
from pathlib import Path

from msgspec.structs import replace

from sparsifiner_edge.bounds import MOST_THREADS
from sparsifiner_edge.bundle.sign import require_signature
from sparsifiner_edge.bundle.store import Bundle, open_bundle
from sparsifiner_edge.errors import BackendError, MissingExtraError, SparsifinerError
from sparsifiner_edge.execution import (
    AUTO,
    KERNEL_CHOICES,
    ON_PROCESSOR,
    PRECISIONS,
    PROVIDERS,
    Execution,
    execution_of,
    execution_text,
)
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
    """The backend that an execution names, set up to run as it says; "auto" without a bundle is ONNX Runtime.

    Raises:
        BackendError: the name or a choice is unknown; the message lists those that are known. Or another package's
            backend is not a class of `Backend`, or cannot be imported.
    """
    if execution.backend == AUTO:
        execution = replace(execution, backend=ON_PROCESSOR[0])
    known = BACKENDS if execution.backend in BACKENDS else {**BACKENDS, **plugins(ENTRY_POINTS)}
    if execution.backend not in known:
        raise BackendError(f"Unknown backend {execution.backend!r}.", f"Choose one of: {', '.join(known)}.")
    for name, choices in (("kernels", KERNEL_CHOICES), ("precision", PRECISIONS), ("provider", PROVIDERS)):
        if getattr(execution, name) not in choices:
            raise BackendError(f"{name} is {getattr(execution, name)!r}.", f"Choose one of: {', '.join(choices)}.")
    if execution.provider != "cpu" and execution.backend != "onnxruntime":
        raise BackendError(
            f"{execution.backend} has no provider {execution.provider}: those are ONNX Runtime's.",
            "Leave --provider out, or choose --backend onnxruntime.",
        )
    threads = execution.threads
    if threads is not None and not (type(threads) is int and 1 <= threads <= MOST_THREADS):
        raise BackendError(
            f"threads is {threads!r}.", f"Give 1 to {MOST_THREADS}, or leave it out to use every core allowed."
        )
    return subclass(Backend, known[execution.backend], BackendError)(execution)  # type: ignore[type-abstract]


def choose_execution(bundle: Bundle, execution: Execution) -> tuple[Execution, str | None]:
    """How a bundle is run, by name: what an execution leaves to the bundle ("auto") is decided here and nowhere else.

    Nothing is timed, a precision is never lowered, and no bundle decides that another package's code is run.

    Returns:
        The execution, whose precision is "auto" where it is as stored; and why, for people, if there is more to say
        than that ONNX Runtime is what runs a bundle that says nothing.

    Raises:
        BackendError, MissingExtraError: nothing can run it here; or the execution is refused by `find_backend`.
    """
    find_backend(execution)
    refused: dict[str, SparsifinerError] = {}
    for choice in _choices(bundle, execution):
        if choice == execution:  # Asked for: it runs, or opening it says why not.
            return execution, _reason(choice, bundle, refused) if refused else None
        error = _refusal(choice, bundle, execution.backend)
        if error is None:
            return choice, _reason(choice, bundle, refused)
        refused.setdefault(choice.backend, error)
    raise refused[ON_PROCESSOR[0]]


def _refusal(choice: Execution, bundle: Bundle, asked: str) -> SparsifinerError | None:
    """Why a bundle does not run so here."""
    if choice.backend not in (*BACKENDS, asked):
        return BackendError(f"{choice.backend} is another package's, and runs where it is named.", "Name it.")
    try:
        find_backend(choice).check(bundle)
    except (BackendError, MissingExtraError) as error:
        return error
    return None


def _choices(bundle: Bundle, execution: Execution) -> Iterable[Execution]:
    """What to try, in this order."""
    found, choices = bundle.manifest.found_for, list[Execution]()
    if found is not None and execution.precision == AUTO and execution.backend in (AUTO, found.backend):
        choices.append(replace(execution, backend=found.backend, precision=found.precision))
    if execution.backend != AUTO:
        return dict.fromkeys((*choices, execution))
    engines = (engine.backend for engine in reversed(bundle.manifest.engines))
    names = (*([] if found is None else [found.backend]), *engines, *ON_PROCESSOR)
    return dict.fromkeys((*choices, *(replace(execution, backend=name) for name in names)))


def _reason(choice: Execution, bundle: Bundle, refused: Mapping[str, SparsifinerError]) -> str | None:
    """Why this one: what the bundle was found for, and what is wrong with the first that was tried."""
    found, first = bundle.manifest.found_for, next(iter(refused.values()), None)
    if found is None and first is None:
        return None
    runs = execution_text(choice.backend, choice.precision)
    wanted = None if found is None else execution_text(found.backend, found.precision)
    of = "" if wanted is None else f", which was found for {'it' if runs == wanted else wanted}"
    why = "." if first is None else f": {first.what}"
    install = f" {first.fix}" if isinstance(first, MissingExtraError) else ""
    return f"{runs} runs this bundle{of}{why}{install}"


def open_session(
    bundle: str | Path,
    execution: Execution | str | None = None,
    *,
    public_key: str | Path | None = None,
) -> Session:
    """Open a bundle whose hashes match, ready to run.

    Args:
        bundle: a folder made by `sparsifiner-edge export`.
        execution: what runs it: a backend's name, of `BACKENDS` or another package's; or a whole `Execution`. What it
            leaves open is chosen by `choose_execution`.
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


def session_on(bundle: Bundle, execution: Execution | None = None) -> Session:
    """`open_session` with what `checked_bundle` returned: only files that its manifest vouches for are used, and no
    code of other packages where a signature was required.
    """
    execution = execution or Execution()
    if bundle.signed and execution.backend not in (AUTO, *BACKENDS):
        raise BackendError(
            f"{execution.backend} is no backend of sparsifiner-edge itself, and a signature is required.",
            f"Choose one of: {', '.join(BACKENDS)}.",
        )
    chosen, why = choose_execution(bundle, execution)
    session = find_backend(chosen).open(bundle)
    if why is not None:
        session.description = replace(session.description, chosen=why)
    return session
