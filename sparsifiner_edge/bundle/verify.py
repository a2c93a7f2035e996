"""Is a bundle whole, does its manifest match its model, and does the golden pair pass?"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
from msgspec import Struct

from sparsifiner_edge.bundle.engines import Engine
from sparsifiner_edge.bundle.manifest import Manifest, TensorSpec
from sparsifiner_edge.bundle.sign import fingerprint_of, read_signature, require_signature, unlisted_files
from sparsifiner_edge.bundle.store import LABELS_FILE, Bundle, open_bundle
from sparsifiner_edge.errors import ArtifactError, GateError
from sparsifiner_edge.onnx_file import all_nodes
from sparsifiner_edge.ops.schema import DOMAIN, VERSION


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


def run_checks(folder: Path, golden: Callable[[Bundle], str], public_key: Path | None = None) -> Verification:
    """Check all of a bundle; see `runtime.verify_bundle`.

    Args:
        folder: made by `sparsifiner-edge export`.
        golden: runs the golden pair, given the checked bundle, and says how far it is off.
        public_key: the bundle must be signed by its holder.

    Raises:
        ArtifactError, MissingExtraError: as there.
    """
    bundle = open_bundle(folder)
    model = bundle.model()
    checks: dict[str, Callable[[], str]] = {
        "files": lambda: _files(bundle),
        "signature": lambda: _signature(bundle, public_key),
        "model": lambda: _onnx(model),
        "inputs, outputs": lambda: _interface(bundle.manifest, model.graph),
        "operators": lambda: _operators(bundle.manifest.ops, model),
        "metadata": lambda: _metadata(bundle, model),
        "engines": lambda: ", ".join(map(_engine, bundle.manifest.engines)) or "none",
        "golden pair": lambda: golden(dataclasses.replace(bundle, signed=public_key is not None)),
    }
    results: list[CheckResult] = []
    for name, check in checks.items():
        results.append(_run(name, check))
        if name in ("signature", "model") and not results[-1].passed:
            break  # An unsigned bundle is not run, and an invalid model is not examined further.
    passed = all(result.passed for result in results)
    return Verification(str(folder), hashlib.sha256(bundle.text).hexdigest(), passed, tuple(results))


def _run(name: str, check: Callable[[], str]) -> CheckResult:
    try:
        return CheckResult(name, True, check())
    except GateError as error:
        return CheckResult(name, False, error.what)
    except (KeyError, IndexError, ValueError, TypeError) as error:  # A form that export does not write.
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return CheckResult(name, False, f"cannot be checked: {reason}")


def _files(bundle: Bundle) -> str:
    extra = unlisted_files(bundle)
    if extra:
        raise GateError(f"not in the manifest: {', '.join(extra[:5])}")
    return f"{len(bundle.manifest.files)} files match their SHA-256; no others"


def _signature(bundle: Bundle, public_key: Path | None) -> str:
    if public_key is not None:
        fingerprint = fingerprint_of(public_key)
        try:
            if require_signature(bundle.folder, public_key) != bundle:
                raise GateError("the manifest was changed meanwhile")
        except ArtifactError as error:
            raise GateError(error.what) from error
        return f"by {fingerprint[:16]}"
    signature = read_signature(bundle.folder)
    return "none" if signature is None else f"claims the key {signature.key[:16]}; not checked without --public-key"


def _onnx(model: Any) -> str:
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise GateError(" ".join(str(error).split())[:200]) from error
    domains = {entry.domain: entry.version for entry in model.opset_import}
    foreign = sorted(set(domains) - {"", DOMAIN})
    if foreign:
        raise GateError(f"foreign domains: {', '.join(foreign)}")
    return f"well-formed; operator set {domains.get('')}, IR {model.ir_version}"


def _interface(manifest: Manifest, graph: Any) -> str:
    """Names, types and shapes of inputs and outputs, and a tolerance for each output that golden holds."""
    counts = []
    for key, specs, values in (
        ("inputs", manifest.inputs, graph.input),
        ("outputs", manifest.outputs, graph.output),
    ):
        stated = tuple(TensorSpec(spec.name, spec.dtype, spec.shape) for spec in specs)
        present = tuple(_tensor(value) for value in values)
        if stated != present:
            wrong = [entry for entry in (*stated, *present) if not (entry in stated and entry in present)]
            difference = f"{wrong[0].name} {wrong[0]}" if wrong else "their order"
            raise GateError(f"{key}: manifest and model differ in {difference}")
        counts.append(f"{len(present)} {key[:-1] if len(present) == 1 else key}")
    return f"{' and '.join(counts)} as the manifest says"


def _tensor(value: Any) -> TensorSpec:
    tensor = value.type.tensor_type
    shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in tensor.shape.dim)
    return TensorSpec(value.name, str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)), shape)


def _operators(stated: tuple[str, ...], model: Any) -> str:
    """The operators in the manifest are those in the file, each with its body."""
    used = {f"{DOMAIN}::{node.op_type}" for node in all_nodes(model) if node.domain == DOMAIN}
    bodies = {f"{function.domain}::{function.name}" for function in model.functions}
    versions = {entry.version for entry in model.opset_import if entry.domain == DOMAIN}
    if used - bodies:
        raise GateError(f"without a body: {', '.join(sorted(used - bodies))}")
    if set(stated) != bodies or (stated and versions != {VERSION}):
        said = f"the model has {sorted(bodies)} of version {sorted(versions)}"
        raise GateError(f"the manifest says {sorted(stated)} of version {VERSION}, {said}")
    return ", ".join(sorted(used)) or "standard ones alone"


def _metadata(bundle: Bundle, model: Any) -> str:
    """Every output has its tensor id; classes, labels and logits agree in number; the name is the manifest's."""
    entries = {entry.key: entry.value for entry in model.metadata_props}
    lacking = [output.name for output in model.graph.output if output.name not in entries]
    if lacking:
        raise GateError(f"no entry for {', '.join(lacking)}: GStreamer's onnxinference refuses the file")
    if entries.get("name") != bundle.manifest.name:
        raise GateError(f"name {entries.get('name')!r}, the manifest says {bundle.manifest.name!r}")
    shapes = {output.name: output.type.tensor_type.shape for output in model.graph.output}
    classes = shapes["logits"].dim[-1].dim_value if "logits" in shapes else 0
    labels = bundle.labels()
    stated = entries["classes"].splitlines() if entries.get("classes") else []
    if labels and (labels != stated or len(labels) != classes):
        raise GateError(f"{len(labels)} labels in {LABELS_FILE}, {len(stated)} in the model, for {classes} classes")
    return f"an id for each output; {len(stated) or 'no'} classes"


def _engine(engine: Engine) -> str:
    return f"{engine.backend} {engine.version} for {engine.compute_capability}"
