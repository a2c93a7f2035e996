"""`verify_bundle`: all checks of a bundle, its golden pair on a backend among them."""

from __future__ import annotations

from pathlib import Path

from sparsifiner_edge.bundle.golden import beyond_text, check_golden
from sparsifiner_edge.bundle.store import Bundle
from sparsifiner_edge.bundle.verify import Verification, run_checks
from sparsifiner_edge.execution import Execution
from sparsifiner_edge.runtime.open import open_checked


def verify_bundle(
    bundle: str | Path,
    *,
    backend: str = "onnxruntime",
    precision: str = "auto",
    provider: str = "cpu",
    kernels: str = "auto",
    public_key: str | Path | None = None,
) -> Verification:
    """Check all of a bundle.

    Args:
        bundle: a folder made by `sparsifiner-edge export`.
        backend, precision, provider, kernels: what runs the golden pair; see `open_session`.
        public_key: the signature must be that key's; without it a signature is reported and not checked.

    Returns:
        What each check found. A model that is no valid ONNX is the last that is checked, and so is a signature that
        the key does not fit.

    Raises:
        ArtifactError: not a bundle, a file missing or altered, of another version: there is nothing to check then.
        BackendError: the backend cannot run it.
        MissingExtraError: the backend, or what checks signatures, is not installed.
    """

    execution = Execution(backend=backend, precision=precision, provider=provider, kernels=kernels)

    def answer(checked: Bundle) -> str:
        with open_checked(checked, execution) as session:
            found = check_golden(session, checked)
        parts = (
            f"{name} {f['range_relative_error']:.1e} of {f['tolerance']:.0e}{beyond_text(f)}"
            for name, f in found.items()
        )
        return f"{', '.join(parts)} ({backend})"

    return run_checks(Path(bundle), answer, None if public_key is None else Path(public_key))
