"""`build_engine`: engines for a bundle, made by a backend, checked, and put into the bundle whole or not at all."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from sparsifiner_edge.artifacts import ENGINE_FOLDER, sha256
from sparsifiner_edge.bundle.engines import BatchRange, Engine, Golden, parse_capability
from sparsifiner_edge.bundle.golden import check_golden
from sparsifiner_edge.bundle.manifest import MODEL_FILE, Manifest
from sparsifiner_edge.bundle.store import Bundle, bundle_scratch, extend_bundle, open_bundle
from sparsifiner_edge.errors import ArtifactError, ConfigError
from sparsifiner_edge.execution import Execution
from sparsifiner_edge.progress import Progress, prefixed
from sparsifiner_edge.records import Known, Unavailable
from sparsifiner_edge.runtime.backend import EngineBackend, Job, OptionValues
from sparsifiner_edge.runtime.candidates import build_fastest
from sparsifiner_edge.runtime.open import find_backend
from sparsifiner_edge.runtime.session import Description

DEFAULT_BATCH = BatchRange(1, 1, 8)
"""For a bundle of dynamic batch: a camera gives one image at a time."""


class BuildResult(msgspec.Struct, frozen=True, kw_only=True):
    """What `build_engine` did.

    Attributes:
        version: of the backend's package.
        engines: those that were added; none on the processor, which has `description` and `golden` instead: what ran
            the model, and what the golden check found.
        seconds: all of it took.
    """

    bundle: str
    backend: str
    version: str
    engines: tuple[Engine, ...] = ()
    description: Description | None = None
    golden: Golden | None = None
    seconds: float


def build_engine(
    bundle: str | Path,
    backend: str = "onnxruntime",
    *,
    compute_capabilities: Sequence[str] = (),
    batch: tuple[int, int, int] | None = None,
    timeout_s: float | None = None,
    options: OptionValues | None = None,
    precision: str = "auto",
    provider: str = "cpu",
    kernels: str = "auto",
    progress: Progress | None = None,
) -> BuildResult:
    """Build engines for a bundle and put them into it.

    Where this machine has the GPU that an engine is for, sparse attention is built in every way that is possible, dense
    attention is built beside it, and the fastest is kept (see `candidates`); the golden pair is run through it first,
    and an engine that fails is not kept.

    Args:
        bundle: a folder made by `sparsifiner-edge export`.
        backend: one of `open.BACKENDS`. Those on the processor need no file: the model is loaded, and the golden
            pair run.
        compute_capabilities: such as ("8.6", "8.9"), one engine each; none: this machine's GPU.
        batch: least, best and greatest batch size, for a bundle of dynamic batch; None: `DEFAULT_BATCH`.
        timeout_s: seconds that one candidate of an engine may take; None: 600, on a board that shares memory 1800.
        options: see the backend's module.
        precision, provider, kernels: what runs the golden pair on the processor; see `open_session`. An engine computes
            in what the file stores, and TensorRT's kernels are an option of its own.
        progress: called with (stage, done, total).

    Raises:
        GateError: the golden pair fails; nothing was written.
        SparsifinerError: nothing was written, the bundle is as it was.
    """
    start = time.monotonic()
    execution = Execution(backend=backend, precision=precision, provider=provider, kernels=kernels)
    found = find_backend(execution)
    checked = open_bundle(Path(bundle))
    capabilities = tuple(dict.fromkeys(map(parse_capability, compute_capabilities)))
    engines: tuple[Engine, ...] = ()
    described, golden = None, None
    if isinstance(found, EngineBackend):
        if kernels != "auto":
            raise ConfigError(f"kernels {kernels} are ONNX Runtime's.", f"For {backend}: --option kernels=portable.")
        planned = found.plan(checked, capabilities, batch_range(checked, batch), options or {})
        limit = found.default_timeout_s() if timeout_s is None else timeout_s
        engines = _build_all(found, checked, planned, options or {}, limit, progress)
    else:
        _require_plain(backend, bool(capabilities or batch or options))
        with found.open(checked) as session:
            golden = check_golden(session, checked)
            described = session.description
    return BuildResult(
        bundle=str(checked.folder),
        backend=backend,
        version=str(found.load().__version__),
        engines=engines,
        description=described,
        golden=golden,
        seconds=time.monotonic() - start,
    )


def _require_plain(backend: str, for_engines: bool) -> None:
    """Refuse what only backends with engines take."""
    if for_engines:
        raise ConfigError(
            f"{backend} builds no engine: compute capability, batch sizes and options are for TensorRT.",
            "Leave them out, or choose --backend tensorrt or tensorrt-rtx.",
        )


def batch_range(bundle: Bundle, batch: tuple[int, int, int] | None) -> BatchRange:
    """Batch sizes for the engines of a bundle.

    Raises:
        ConfigError: the bundle's batch is fixed, or the sizes are not 1 <= least <= best <= greatest.
        ArtifactError: the manifest does not say the input's shape.
    """
    manifest = bundle.manifest
    if not manifest.inputs or not manifest.inputs[0].shape:
        raise ArtifactError(f"{bundle.folder} does not say the shape of its input.", "Export the bundle again.")
    size = manifest.batch
    if size is not None:
        if batch not in (None, (size, size, size)):
            raise ConfigError(
                f"{bundle.folder} has a fixed batch of {size}.",
                "Leave the batch sizes out, or export it with --batch dynamic.",
            )
        return BatchRange(size, size, size)
    made = BatchRange(*batch) if batch else DEFAULT_BATCH
    if not 1 <= made.least <= made.best <= made.most:
        raise ConfigError(
            f"batch sizes are {made.least}, {made.best}, {made.most}.",
            "Give least, best and greatest in this order, from 1: --min-batch 1 --opt-batch 1 --max-batch 8.",
        )
    return made


def _build_all(
    backend: EngineBackend,
    bundle: Bundle,
    planned: Sequence[Engine],
    options: OptionValues,
    timeout_s: float,
    progress: Progress | None,
) -> tuple[Engine, ...]:
    engines: list[Engine] = []
    with bundle_scratch(bundle.folder) as scratch:
        files: dict[str, Path] = {}
        for number, engine in enumerate(planned):
            start, path = time.monotonic(), scratch / f"{engine.name}.engine"
            job = Job(
                bundle=str(bundle.folder.resolve()),
                model_sha256=bundle.manifest.files[MODEL_FILE],
                output=str(path.resolve()),
                engine=engine,
                options=dict(options),
            )
            prefix = f"{number + 1} of {len(planned)}, compute capability {engine.compute_capability}: "
            candidates = backend.candidates(bundle, engine, options)
            built = build_fastest(job, candidates, timeout_s, progress and prefixed(progress, prefix))
            if not path.is_file():
                raise ArtifactError(
                    f"{path} vanished while it was built.", "Leave the bundle in place and build again."
                )
            seconds, size = time.monotonic() - start, path.stat().st_size
            golden = _check_engine(backend, msgspec.structs.replace(engine, details=built), path, bundle)
            details = msgspec.structs.replace(built, build_seconds=seconds, bytes=size, golden=golden)
            # The hash in the name keeps an earlier engine of this kind whole until the manifest is replaced.
            place = f"{ENGINE_FOLDER}/{engine.name}-{sha256(path)[:8]}.engine"
            engines.append(msgspec.structs.replace(engine, file=place, details=details))
            files[place] = path
        extend_bundle(bundle.folder, files, lambda manifest: with_engines(manifest, engines, bundle))
    return tuple(engines)


def _check_engine(backend: EngineBackend, engine: Engine, path: Path, bundle: Bundle) -> Known[Golden]:
    """The golden pair through a fresh engine, or why it was not run."""
    reason = backend.why_not_here(engine)
    if reason is not None:
        return Unavailable(reason)
    with backend.open_engine(path, engine, bundle) as session:
        return check_golden(session, bundle)


def with_engines(manifest: Manifest, engines: Sequence[Engine], built_of: Bundle) -> Manifest:
    """A bundle's manifest with engines added; those of the same names go.

    Raises:
        ArtifactError: the model is another than the one that the engines were built from.
    """
    if manifest.files.get(MODEL_FILE) != built_of.manifest.files[MODEL_FILE]:
        raise ArtifactError(f"{built_of.folder} was exported anew while the engines were built.", "Build them again.")
    names = {engine.name for engine in engines}
    gone = {engine.file for engine in manifest.engines if engine.name in names}
    kept = [engine for engine in manifest.engines if engine.name not in names]
    files = {name: digest for name, digest in manifest.files.items() if name not in gone}
    return msgspec.structs.replace(manifest, files=files, engines=(*kept, *engines))
