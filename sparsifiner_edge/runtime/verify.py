"""Verification of a bundle: file hashes, signature, manifest, operators, and the golden pair on a backend."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
from msgspec import Struct

from sparsifiner_edge.bundle.manifest import tensor_spec
from sparsifiner_edge.bundle.sign import fingerprint_of, read_signature, require_signature, unlisted_files
from sparsifiner_edge.bundle.store import Bundle, open_bundle
from sparsifiner_edge.errors import ArtifactError, GateError
from sparsifiner_edge.execution import Execution, execution_of
from sparsifiner_edge.onnx_file import all_nodes
from sparsifiner_edge.ops.schema import DOMAIN, VERSION
from sparsifiner_edge.runtime.golden import beyond_text, check_golden, check_sequence
from sparsifiner_edge.runtime.open import session_on
from sparsifiner_edge.text import one_line


class CheckResult(Struct, frozen=True):
    """Result of one check of a bundle.

    Attributes:
        name: Name of the check.
        passed: True if the check passed.
        details: Findings, or the reason for the failure.
    """

    name: str
    passed: bool
    details: str


class Verification(Struct, frozen=True):
    """Results of all checks of a bundle.

    Attributes:
        bundle: Folder of the bundle.
        hash: SHA-256 of the manifest.
        passed: True if all checks passed.
        checks: Results in the order in which the checks ran.
    """

    bundle: str
    hash: str
    passed: bool
    checks: tuple[CheckResult, ...]


def verify_bundle(
    bundle: str | Path, execution: Execution | str | None = None, *, public_key: str | Path | None = None
) -> Verification:
    """Run all checks of a bundle.

    Args:
        bundle: Folder written by `sparsifiner-edge export`.
        execution: Backend name or options for running the golden pair; None selects the defaults.
        public_key: Public key that must have signed the bundle. Without it, a signature is reported but not verified.

    Returns:
        The result of each check. An invalid ONNX file or a signature of another key ends the verification: later
        checks are left out.

    Raises:
        ArtifactError: The folder is not a bundle, has a missing or altered file, or is of another version.
        BackendError: The backend cannot run the bundle.
        MissingExtraError: The backend, or the package that verifies signatures, is not installed.

    Example:
        >>> verify_bundle("bundle").passed
        True
    """
    execution = execution_of(execution)
    key, checked = None if public_key is None else Path(public_key), open_bundle(Path(bundle))
    model, results = checked.model(), list[CheckResult]()
    checks: dict[str, Callable[[], str]] = {
        "files": lambda: _files(checked),
        "signature": lambda: _signature(checked, key),
        "model": lambda: _onnx(model),
        "inputs, outputs": lambda: _interface(checked, model.graph),
        "operators": lambda: _operators(checked.manifest.ops, model),
        "engines": lambda: ", ".join(map(str, checked.manifest.engines)) or "none",
        "golden pair": lambda: _golden(dataclasses.replace(checked, signed=key is not None), execution),
    }
    for name, check in checks.items():
        try:
            results.append(CheckResult(name, True, check()))
        except GateError as error:
            results.append(CheckResult(name, False, error.what))
        except (KeyError, IndexError, ValueError, TypeError) as error:  # Content that `export` never writes.
            reason = f"cannot be checked: {type(error).__name__}: {one_line(error, 200)}"
            results.append(CheckResult(name, False, reason))
        if name in ("signature", "model") and not results[-1].passed:
            break  # Never run a bundle whose signature is wrong, nor examine an invalid model further.
    digest, passed = hashlib.sha256(checked.text).hexdigest(), all(result.passed for result in results)
    return Verification(str(checked.folder), digest, passed, tuple(results))


def _files(bundle: Bundle) -> str:
    """Check that the folder has no files besides those in the manifest (`open_bundle` has checked their hashes)."""
    extra = unlisted_files(bundle)
    if extra:
        raise GateError(f"not in the manifest: {', '.join(extra[:5])}")
    return f"{len(bundle.manifest.files)} files match their SHA-256; no others"


def _signature(bundle: Bundle, public_key: Path | None) -> str:
    """Verify the signature with a public key, or describe it if there is no key."""
    if public_key is None:
        signature = read_signature(bundle.folder)
        claims = signature and f"claims the key {signature.key[:16]}; not verified without --public-key"
        return claims or "none"
    fingerprint = fingerprint_of(public_key)
    try:
        if require_signature(bundle.folder, public_key) != bundle:
            raise GateError("the manifest changed during the verification")
    except ArtifactError as error:
        raise GateError(error.what) from error
    return f"by {fingerprint[:16]}"


def _onnx(model: Any) -> str:
    """Check that the model is valid ONNX and uses no foreign operator domains."""
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise GateError(one_line(error, 200)) from error
    domains = {entry.domain: entry.version for entry in model.opset_import}
    foreign = sorted(set(domains) - {"", DOMAIN})
    if foreign:
        raise GateError(f"foreign domains: {', '.join(foreign)}")
    return f"well-formed; operator set {domains.get('')}, IR {model.ir_version}"


def _interface(bundle: Bundle, graph: Any) -> str:
    """Check that names, types and shapes of inputs and outputs match the manifest."""
    counts, manifest = [], bundle.manifest
    for key, specs, values in (("input", manifest.inputs, graph.input), ("output", manifest.outputs, graph.output)):
        stated, present = list(specs), [tensor_spec(value) for value in values]
        if stated != present:
            wrong = [entry for entry in (*stated, *present) if not (entry in stated and entry in present)]
            difference = f"{wrong[0].name} {wrong[0]}" if wrong else "their order"
            raise GateError(f"{key}s: manifest and model differ in {difference}")
        counts.append(f"{len(present)} {key}{'' if len(present) == 1 else 's'}")
    return f"{' and '.join(counts)}, as in the manifest"


def _operators(stated: tuple[str, ...], model: Any) -> str:
    """Check that the manifest lists the operators in the file, and that each has an ONNX function body."""
    used = {f"{DOMAIN}::{node.op_type}" for node in all_nodes(model) if node.domain == DOMAIN}
    bodies = {f"{function.domain}::{function.name}" for function in model.functions}
    versions = {entry.version for entry in model.opset_import if entry.domain == DOMAIN}
    if used - bodies:
        raise GateError(f"no function body for: {', '.join(sorted(used - bodies))}")
    if set(stated) != bodies or (stated and versions != {VERSION}):
        present = f"the model has {sorted(bodies)} of version {sorted(versions)}"
        raise GateError(f"the manifest says {sorted(stated)} of version {VERSION}, {present}")
    return ", ".join(sorted(used)) or "standard operators only"


def _golden(bundle: Bundle, execution: Execution) -> str:
    """Run the golden pair, and the golden sequence of a bundle with a stream."""
    with session_on(bundle, execution) as session:
        report, ran = check_golden(session, bundle), session.description
        stream = check_sequence(*session.opened_as) if session.opened_as else ""
    parts = (
        f"{name} {figures['range_relative_error']:.1e} (at most {figures['tolerance']:.0e}){beyond_text(figures)}"
        for name, figures in report.items()
    )
    return f"difference: {', '.join(parts)} ({ran.chosen or ran.backend}){stream}"
