"""`build_engine`: engines for a bundle, made by a backend, checked, and put into the bundle whole or not at all.

A backend that builds is a module, named in `open.BACKENDS`, with the functions of `EngineBackend`.
"""

from __future__ import annotations

import dataclasses
import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import msgspec

from sparsifiner_edge.artifacts import ENGINE_FOLDER, sha256
from sparsifiner_edge.bundle.engines import BatchRange, Engine, parse_capability
from sparsifiner_edge.bundle.golden import check_golden
from sparsifiner_edge.bundle.manifest import MODEL_FILE, Manifest
from sparsifiner_edge.bundle.store import bundle_scratch, extend_bundle, open_bundle
from sparsifiner_edge.errors import ArtifactError, ConfigError
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.records import write_record
from sparsifiner_edge.runtime.build_worker import Job, run_job
from sparsifiner_edge.runtime.open import BACKENDS, check_backend, load_backend, open_checked
from sparsifiner_edge.runtime.session import Session

DEFAULT_BATCH = BatchRange(1, 1, 8)
"""For a bundle of dynamic batch: a camera gives one picture at a time."""


@dataclasses.dataclass(frozen=True)
class BuildRequest:
    """What a backend is asked to plan.

    Attributes:
        folder, manifest: the bundle, checked.
        capabilities: compute capabilities asked for, such as ("8.6", "8.9"); none: this machine's GPU.
        batch: sizes that the engines shall take; all equal where the bundle's batch is fixed.
        options: what only some backends know, checked by them; see the backend's module.
    """

    folder: Path
    manifest: Manifest
    capabilities: tuple[str, ...]
    batch: BatchRange
    options: Mapping[str, Any]

    @property
    def precision(self) -> str:
        """The bundle's own word for it, such as "fp16"."""
        return self.manifest.precision or "fp32"


class Planned(NamedTuple):
    """One engine to build: what it will be (no file, no details), and settings for `build`, JSON-ready."""

    engine: Engine
    settings: Mapping[str, Any]


class EngineBackend(Protocol):
    """What the module of a backend that builds engines offers, beside `load_backend` and `open_model`."""

    def plan(self, request: BuildRequest) -> list[Planned]:
        """Refuse what cannot be built, before anything is; one entry per engine.

        Raises:
            SparsifinerError: says what, and what to do.
        """

    def build(self, job: Job, tell: Progress) -> dict[str, Any]:
        """Build one engine; called in a worker process that may die.

        Args:
            job: `backend`; `model` and `model_sha256`, path and hash of the ONNX file (see `build_worker.job_model`);
                `output`, path of the engine to write; `engine`, an `Engine.to_dict`; `settings`, as planned.
            tell: called with (stage, done, total).

        Returns:
            The engine's `details`, JSON-ready.

        Raises:
            SparsifinerError: reaches the caller of `build_engine`.
        """

    def why_not_here(self, engine: Engine) -> str | None:
        """Why an engine cannot be run on this machine, such as "no CUDA device: ..."; None where it can."""

    def open_engine(self, path: Path, engine: Engine, manifest: Manifest) -> Session:
        """A session on an engine's file, which may not be in a bundle yet."""


def build_engine(
    bundle: str | Path,
    backend: str = "onnxruntime",
    *,
    compute_capabilities: Sequence[str] = (),
    batch: tuple[int, int, int] | None = None,
    timeout_s: float = 600,
    options: Mapping[str, Any] | None = None,
    kernels: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Build engines for a bundle and put them into it.

    Each engine is built in a process of its own. Where this machine has the GPU that it is for, the golden pair is
    run through it first, and an engine that fails is not kept.

    Args:
        bundle: a folder made by `sparsifiner-edge export`.
        backend: one of `open.BACKENDS`. onnxruntime needs no file: the model is loaded and the golden pair run.
        compute_capabilities: such as ("8.6", "8.9"), one engine each; none: this machine's GPU.
        batch: least, best and greatest batch size, for a bundle of dynamic batch; None: `DEFAULT_BATCH`.
        timeout_s: seconds that one engine may take.
        options: see the backend's module.
        kernels: what runs the golden pair in onnxruntime; see `open_session`. TensorRT's are an option of its own.
        progress: called with (stage, done, total).

    Returns:
        `bundle`, `backend`, `version`, `engines` (see `Engine.to_dict`; none for onnxruntime) and `seconds`; for
        onnxruntime also `description` and `golden`.

    Raises:
        GateError: the golden pair fails; nothing was written.
        SparsifinerError: nothing was written, the bundle is as it was.
    """
    start = time.monotonic()
    check_backend(backend)
    folder = Path(bundle)
    manifest = open_bundle(folder)
    capabilities = tuple(dict.fromkeys(map(parse_capability, compute_capabilities)))
    result: dict[str, Any] = {"bundle": str(folder), "backend": backend}
    if backend == "onnxruntime":
        _refuse_settings(capabilities, batch, options)
        result |= _run_in_onnxruntime(folder, manifest, kernels)
    else:
        if kernels != "auto":
            raise ConfigError(f"kernels {kernels} are ONNX Runtime's.", f"For {backend}: --option kernels=portable.")
        request = BuildRequest(folder, manifest, capabilities, batch_range(manifest, batch, folder), options or {})
        engines = _build_all(request, backend, timeout_s, progress)
        result |= {"version": load_backend(backend), "engines": engines}
    return result | {"seconds": time.monotonic() - start}


def _refuse_settings(
    capabilities: Sequence[str], batch: tuple[int, int, int] | None, options: Mapping[str, Any] | None
) -> None:
    if capabilities or batch or options:
        raise ConfigError(
            "onnxruntime builds no engine: compute capability, batch sizes and options are for TensorRT.",
            "Leave them out, or choose --backend tensorrt or tensorrt-rtx.",
        )


def _run_in_onnxruntime(folder: Path, manifest: Manifest, kernels: str) -> dict[str, Any]:
    with open_checked(folder, manifest, kernels=kernels) as session:
        golden = check_golden(session, folder, manifest)
        described = session.description
    return {"version": described.version, "engines": [], "description": write_record(described), "golden": golden}


def batch_range(manifest: Manifest, batch: tuple[int, int, int] | None, folder: Path) -> BatchRange:
    """Batch sizes for the engines of a bundle.

    Raises:
        ConfigError: the bundle's batch is fixed, or the sizes are not 1 <= least <= best <= greatest.
        ArtifactError: the manifest does not say the input's shape.
    """
    if not manifest.inputs or not manifest.inputs[0].shape:
        raise ArtifactError(f"{folder} does not say the shape of its input.", "Export the bundle again.")
    size = manifest.batch
    if size is not None:
        if batch not in (None, (size, size, size)):
            raise ConfigError(
                f"{folder} has a fixed batch of {size}.",
                "Leave the batch sizes out, or export it with --batch dynamic.",
            )
        return BatchRange(size, size, size)
    made = BatchRange(*(batch or DEFAULT_BATCH))
    if not 1 <= made.least <= made.best <= made.most:
        raise ConfigError(
            f"batch sizes are {made.least}, {made.best}, {made.most}.",
            "Give least, best and greatest in this order, from 1: --min-batch 1 --opt-batch 1 --max-batch 8.",
        )
    return made


def _build_all(
    request: BuildRequest, backend: str, timeout_s: float, progress: Progress | None
) -> list[dict[str, Any]]:
    module = cast(EngineBackend, importlib.import_module(BACKENDS[backend]))
    planned = module.plan(request)
    engines: list[Engine] = []
    with bundle_scratch(request.folder) as scratch:
        files: dict[str, Path] = {}
        for number, plan in enumerate(planned):
            tell = _numbered(progress, plan.engine, number, len(planned))
            path = scratch / f"{plan.engine.name}.engine"
            details = _build_one(request, plan, path, timeout_s, tell)
            details["golden"] = _gate(module, plan.engine, path, request)
            # The hash in the name keeps an earlier engine of this kind whole until the manifest is replaced.
            place = f"{ENGINE_FOLDER}/{plan.engine.name}-{sha256(path)[:8]}.engine"
            engines.append(dataclasses.replace(plan.engine, file=place, details=details))
            files[place] = path
        extend_bundle(request.folder, files, lambda manifest: with_engines(manifest, engines, request))
    return [engine.to_dict() for engine in engines]


def _numbered(progress: Progress | None, engine: Engine, number: int, total: int) -> Progress | None:
    if progress is None:
        return None
    tell: Callable[[str, float, float], None] = progress
    prefix = f"{number + 1} of {total}, compute capability {engine.compute_capability}: "
    return lambda stage, done, steps: tell(prefix + stage, done, steps)


def _build_one(
    request: BuildRequest, plan: Planned, path: Path, timeout_s: float, progress: Progress | None
) -> dict[str, Any]:
    start = time.monotonic()
    job = {
        "backend": plan.engine.backend,
        "model": str((request.folder / MODEL_FILE).resolve()),
        "model_sha256": request.manifest.files[MODEL_FILE],
        "output": str(path.resolve()),
        "engine": plan.engine.to_dict(),
        "settings": dict(plan.settings),
    }
    details = run_job(job, timeout_s, progress)
    if not path.is_file():
        raise ArtifactError(f"{path} vanished while it was built.", "Leave the bundle in its place and build again.")
    return {**details, "build_seconds": time.monotonic() - start, "bytes": path.stat().st_size}


def _gate(module: EngineBackend, engine: Engine, path: Path, request: BuildRequest) -> dict[str, Any]:
    """The golden pair through a fresh engine, or why it was not run."""
    reason = module.why_not_here(engine)
    if reason is not None:
        return {"unavailable": reason}
    with module.open_engine(path, engine, request.manifest) as session:
        return dict(check_golden(session, request.folder))


def with_engines(manifest: Manifest, engines: Sequence[Engine], request: BuildRequest) -> Manifest:
    """A bundle's manifest with engines added; those of the same names go.

    Raises:
        ArtifactError: the model is another than the one that the engines were built from.
    """
    if manifest.files.get(MODEL_FILE) != request.manifest.files[MODEL_FILE]:
        raise ArtifactError(f"{request.folder} was exported anew while the engines were built.", "Build them again.")
    names = {engine.name for engine in engines}
    gone = {engine.file for engine in manifest.engines if engine.name in names}
    kept = [engine for engine in manifest.engines if engine.name not in names]
    files = {name: digest for name, digest in manifest.files.items() if name not in gone}
    return msgspec.structs.replace(manifest, files=files, engines=(*kept, *engines))
