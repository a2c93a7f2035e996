"""Is a bundle whole, does its manifest say what its model is, and does it answer as it did?"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import onnx
from msgspec import Struct

from sparsifiner_edge.bundle.manifest import TensorSpec
from sparsifiner_edge.bundle.sign import fingerprint_of, read_signature, require_signature, unlisted_files
from sparsifiner_edge.bundle.store import LABELS_FILE, Bundle, check_bundle, read_manifest
from sparsifiner_edge.errors import ArtifactError, GateError
from sparsifiner_edge.onnx_file import all_nodes
from sparsifiner_edge.ops.schema import DOMAIN

Answer = Callable[[Bundle], str]


class CheckResult(Struct, frozen=True):
    """One check of a bundle, and what it found."""

    name: str
    passed: bool
    details: str


class Verification(Struct, frozen=True):
    """All checks of a bundle. hash: SHA-256 of its manifest. passed: all of them."""

    bundle: str
    hash: str
    passed: bool
    checks: tuple[CheckResult, ...]


class _Subject(NamedTuple):
    bundle: Bundle
    model: Any
    answer: Answer
    public_key: Path | None


def verify(folder: Path, answer: Answer, public_key: Path | None = None) -> Verification:
    """Check all of a bundle; see `runtime.verify_bundle`.

    Args:
        folder: made by `sparsifiner-edge export`.
        answer: runs the golden pair, given the checked bundle, and says how far it is off.
        public_key: of whoever must have signed it.

    Raises:
        ArtifactError, MissingExtraError: as there.
    """
    text = read_manifest(folder)
    bundle = check_bundle(folder, text)
    subject = _Subject(bundle, bundle.model(), answer, public_key)
    checks: list[CheckResult] = []
    for name, check in _CHECKS.items():
        checks.append(_run(name, check, subject))
        if check in (_signature, _onnx) and not checks[-1].passed:
            break  # What nobody vouches for is not run, and what is no model is not looked into.
    passed = all(check.passed for check in checks)
    return Verification(str(folder), hashlib.sha256(text).hexdigest(), passed, tuple(checks))


def _run(name: str, check: Callable[[_Subject], str], subject: _Subject) -> CheckResult:
    try:
        return CheckResult(name, True, check(subject))
    except GateError as error:
        return CheckResult(name, False, error.what)
    except (KeyError, IndexError, ValueError, TypeError) as error:  # A form that no export of ours has.
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return CheckResult(name, False, f"cannot be checked: {reason}")


def _files(subject: _Subject) -> str:
    extra = unlisted_files(subject.bundle)
    if extra:
        raise GateError(f"not in the manifest: {', '.join(extra[:5])}")
    return f"{len(subject.bundle.manifest.files)} files match their SHA-256; no others"


def _signature(subject: _Subject) -> str:
    if subject.public_key is not None:
        fingerprint = fingerprint_of(subject.public_key)
        try:
            if require_signature(subject.bundle.folder, subject.public_key) != subject.bundle:
                raise GateError("the manifest was changed meanwhile")
        except ArtifactError as error:
            raise GateError(error.what) from error
        return f"by {fingerprint[:16]}"
    signature = read_signature(subject.bundle.folder)
    return "none" if signature is None else f"claims the key {signature.key[:16]}; not checked without --public-key"


def _onnx(subject: _Subject) -> str:
    try:
        onnx.checker.check_model(subject.model)
    except onnx.checker.ValidationError as error:
        raise GateError(" ".join(str(error).split())[:200]) from error
    domains = {entry.domain: entry.version for entry in subject.model.opset_import}
    foreign = sorted(set(domains) - {"", DOMAIN})
    if foreign:
        raise GateError(f"foreign domains: {', '.join(foreign)}")
    return f"well-formed; operator set {domains.get('')}, IR {subject.model.ir_version}"


def _interface(subject: _Subject) -> str:
    """Names, types and shapes of inputs and outputs, and a tolerance for each output that golden holds."""
    counts = []
    manifest, graph = subject.bundle.manifest, subject.model.graph
    for key, specs, values in (
        ("inputs", manifest.inputs, graph.input),
        ("outputs", manifest.outputs, graph.output),
    ):
        stated = tuple(TensorSpec(spec.name, spec.dtype, spec.shape) for spec in specs)
        present = tuple(_tensor(value) for value in values)
        if stated != present:
            wrong = [entry for entry in (*stated, *present) if not (entry in stated and entry in present)]
            told = f"{wrong[0].name} {wrong[0]}" if wrong else "their order"
            raise GateError(f"{key}: manifest and model differ in {told}")
        counts.append(f"{len(present)} {key[:-1] if len(present) == 1 else key}")
    return f"{' and '.join(counts)} as the manifest says"


def _tensor(value: Any) -> TensorSpec:
    tensor = value.type.tensor_type
    shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in tensor.shape.dim)
    return TensorSpec(value.name, str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)), shape)


def _operators(subject: _Subject) -> str:
    """Operators of ours: those in the manifest are those in the file, each with its body."""
    stated = subject.bundle.manifest.ops
    used = {f"{DOMAIN}::{node.op_type}" for node in all_nodes(subject.model) if node.domain == DOMAIN}
    bodies = {f"{function.domain}::{function.name}" for function in subject.model.functions}
    versions = {entry.version for entry in subject.model.opset_import if entry.domain == DOMAIN}
    if used - bodies:
        raise GateError(f"without a body: {', '.join(sorted(used - bodies))}")
    if set(stated) != bodies or not {str(version) for version in stated.values()} <= {str(v) for v in versions}:
        raise GateError(f"the manifest says {stated}, the model has {sorted(bodies)} of version {sorted(versions)}")
    return ", ".join(sorted(used)) or "standard ones alone"


def _metadata(subject: _Subject) -> str:
    """Every output has its tensor id; classes, labels and logits agree in number; the name is the manifest's."""
    entries = {entry.key: entry.value for entry in subject.model.metadata_props}
    lacking = [output.name for output in subject.model.graph.output if output.name not in entries]
    if lacking:
        raise GateError(f"no entry for {', '.join(lacking)}: GStreamer's onnxinference refuses the file")
    if entries.get("name") != subject.bundle.manifest.name:
        raise GateError(f"name {entries.get('name')!r}, the manifest says {subject.bundle.manifest.name!r}")
    classes = _classes(subject.model.graph.output)
    labels = subject.bundle.labels()
    stated = entries["classes"].splitlines() if entries.get("classes") else []
    if labels and (labels != stated or len(labels) != classes):
        raise GateError(f"{len(labels)} labels in {LABELS_FILE}, {len(stated)} in the model, for {classes} classes")
    return f"an id for each output; {len(stated) or 'no'} classes"


def _classes(outputs: Iterable[Any]) -> int:
    return next((o.type.tensor_type.shape.dim[-1].dim_value for o in outputs if o.name == "logits"), 0)


def _engines(subject: _Subject) -> str:
    engines = subject.bundle.manifest.engines
    return ", ".join(f"{e.backend} {e.version} for {e.compute_capability}" for e in engines) or "none"


def _golden(subject: _Subject) -> str:
    return subject.answer(subject.bundle)


_CHECKS: dict[str, Callable[[_Subject], str]] = {
    "files": _files,
    "signature": _signature,
    "model": _onnx,
    "inputs, outputs": _interface,
    "operators": _operators,
    "metadata": _metadata,
    "engines": _engines,
    "golden pair": _golden,
}
