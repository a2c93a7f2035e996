"""`build_engine`: engines for a bundle, each built in a process of its own, checked, and put into the bundle whole.

What carries out sparse attention in an engine is measured where it runs. Each variant is built and timed by a process
of its own, with a time limit of its own: a parser or compiler of native code may abort or hang, and one that does
leaves the others. The fastest that passes the golden check is kept; the others' times, or why they failed, are
recorded.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from sparsifiner_edge.artifacts import BUNDLE_FILE, ENGINE_FOLDER, sha256
from sparsifiner_edge.bundle.engines import (
    DENSE,
    UNMERGED,
    BatchRange,
    Details,
    Engine,
    EngineVariant,
    parse_capability,
)
from sparsifiner_edge.bundle.manifest import MODEL_FILE, Intended, Manifest, parse_manifest
from sparsifiner_edge.bundle.store import Bundle, bundle_scratch, extend_bundle, open_bundle, read_manifest
from sparsifiner_edge.errors import ArtifactError, ConfigError, GateError, SparsifinerError
from sparsifiner_edge.execution import Execution
from sparsifiner_edge.files import io_errors
from sparsifiner_edge.machine import jetson_release
from sparsifiner_edge.progress import Progress, with_prefix
from sparsifiner_edge.records import read_record, write_record
from sparsifiner_edge.runtime.child import serve, start_child
from sparsifiner_edge.runtime.open import find_backend
from sparsifiner_edge.runtime.tensorrt.backend import TensorRtBackend

DEFAULT_BATCH = BatchRange(1, 1, 8)
"""For a bundle of dynamic batch: a camera gives one image at a time."""
_FIX = (
    "The bundle is as it was. If it took too long, give it longer with --timeout; if the system ran out of memory, "
    "close other programs or build smaller; else report this with the model's name, or build with another version."
)


class BuildResult(msgspec.Struct, frozen=True, kw_only=True):
    """What `build_engine` did. version: of the backend's package. engines: that were added. seconds: all of it took."""

    bundle: str
    backend: str
    version: str
    engines: tuple[Engine, ...]
    seconds: float


def build_engine(
    bundle: str | Path,
    backend: str,
    *,
    compute_capabilities: Sequence[str] = (),
    batch: tuple[int, int, int] | None = None,
    timeout_s: float | None = None,
    kernels: str = "auto",
    progress: Progress | None = None,
) -> BuildResult:
    """Build engines for a bundle and put them into it.

    Where this machine has the GPU that an engine is for, sparse attention is built in every way that is possible, dense
    attention is built beside it, and the fastest that gives the golden output is kept.

    Args:
        bundle: a folder made by `sparsifiner-edge export`.
        backend: "tensorrt" or "tensorrt-rtx"; others run a bundle's model itself.
        compute_capabilities: such as ("8.6", "8.9"), one engine each; none: this machine's GPU.
        batch: least, best and greatest batch size, for a bundle of dynamic batch; None: `DEFAULT_BATCH`.
        timeout_s: seconds that one variant of an engine may take; None: 600, on a Jetson 1800.
        kernels: "auto" is the fastest of all, "native" the CUDA kernels of this project, "portable" the operators'
            bodies.
        progress: called with (stage, done, total).

    Raises:
        GateError: the golden pair fails; nothing was written.
        SparsifinerError: nothing was written, the bundle is as it was.

    Example:
        >>> result = build_engine("bundle", "tensorrt-rtx", compute_capabilities=["8.6"])
        >>> result.engines[0].compute_capability
        '8.6'
    """
    start = time.monotonic()
    builder = find_backend(Execution(backend=backend, kernels=kernels))
    if not isinstance(builder, TensorRtBackend):
        raise ConfigError(
            f"{backend} builds no engine: it runs a bundle's model itself.",
            "Choose --backend tensorrt or tensorrt-rtx. The golden pair is run by: sparsifiner-edge bundle verify",
        )
    opened, version = open_bundle(Path(bundle)), str(builder.load().__version__)
    capabilities = tuple(dict.fromkeys(map(parse_capability, compute_capabilities)))
    planned = builder.engines_to_build(opened, capabilities, batch_range(opened, batch))
    if timeout_s is None:
        timeout_s = 600.0 if jetson_release() is None else 1800.0  # A Jetson's processor is a small one.
    engines = _build_all(opened, planned, timeout_s, progress)
    seconds = time.monotonic() - start
    return BuildResult(bundle=str(opened.folder), backend=backend, version=version, engines=engines, seconds=seconds)


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
    sizes = BatchRange(*batch) if batch else DEFAULT_BATCH
    if not 1 <= sizes.least <= sizes.best <= sizes.most:
        raise ConfigError(
            f"batch sizes are {sizes.least}, {sizes.best}, {sizes.most}.",
            "Give least, best and greatest in this order, from 1: --batch 1,1,8.",
        )
    return sizes


def _build_all(
    bundle: Bundle, planned: Sequence[Engine], timeout_s: float, progress: Progress | None
) -> tuple[Engine, ...]:
    engines: list[Engine] = []
    with bundle_scratch(bundle.folder) as scratch:
        files: dict[str, Path] = {}
        for number, engine in enumerate(planned):
            prefix = f"{number + 1} of {len(planned)}, compute capability {engine.compute_capability}: "
            place = scratch.resolve() / engine.name
            details = build_fastest(engine, bundle, place, timeout_s, progress and with_prefix(progress, prefix))
            path = _file(place, str(details.kernels))
            # The hash in the name keeps an earlier engine of this kind whole until the manifest is replaced.
            file = f"{ENGINE_FOLDER}/{engine.name}-{sha256(path)[:8]}.engine"
            engines.append(msgspec.structs.replace(engine, file=file, details=details))
            files[file] = path
        extend_bundle(bundle.folder, files, lambda manifest: _with_engines(manifest, engines, bundle))
    return tuple(engines)


def _file(place: Path, variant: str) -> Path:
    return place.with_name(f"{place.name}.{variant}")


def _require_same(manifest: Manifest, bundle: Bundle) -> None:
    """Refuse a bundle whose model has changed meanwhile, by its manifest.

    Raises:
        ArtifactError: it does.
    """
    if manifest.files.get(MODEL_FILE) != bundle.manifest.files[MODEL_FILE]:
        raise ArtifactError(f"{bundle.folder} was exported anew while the engines were built.", "Build them again.")


def _with_engines(manifest: Manifest, engines: Sequence[Engine], bundle: Bundle) -> Manifest:
    """A bundle's manifest with engines added; those of the same names go. It is intended for their backend, unless
    they are for other machines and it is for something.
    """
    _require_same(manifest, bundle)
    names = {engine.name for engine in engines}
    stale = {engine.file for engine in manifest.engines if engine.name in names}
    remaining = [engine for engine in manifest.engines if engine.name not in names]
    files = {name: digest for name, digest in manifest.files.items() if name not in stale}
    elsewhere = all(engine.details.chosen.failed for engine in engines)
    intended = (manifest.intended if elsewhere else None) or Intended(engines[0].backend)
    return msgspec.structs.replace(manifest, files=files, engines=(*remaining, *engines), intended=intended)


def build_fastest(engine: Engine, bundle: Bundle, place: Path, timeout_s: float, progress: Progress | None) -> Details:
    """Build every variant into a file beside `place`, and find the fastest that gives the golden output.

    Args:
        engine: as planned (`TensorRtBackend.engines_to_build`). timeout_s: seconds that each variant may take.

    Returns:
        Details of the one that is kept; under `variants` all of them, failed ones too.

    Raises:
        SparsifinerError: not one of them could be built, or not one gives the golden output; or the bundle changed.
    """
    tried = dict(engine.details.variants)
    names = [name for name, variant in tried.items() if variant.failed is None]
    built: dict[str, Details] = {}
    failures: list[SparsifinerError] = []
    for number, name in enumerate(names):
        if progress:
            progress(f"building {name}", number, len(names))
        _require_same(parse_manifest(read_manifest(bundle.folder), bundle.folder / BUNDLE_FILE), bundle)
        target = msgspec.structs.replace(engine, details=Details(kernels=name))
        try:
            built[name] = build_variant(target, bundle.folder.resolve(), _file(place, name), timeout_s)
            tried |= built[name].variants
        except SparsifinerError as error:
            failures.append(error)
            tried[name] = EngineVariant(failed=error.what)
    passed = [name for name in built if not isinstance(tried[name].golden, str)]
    if not passed:
        raise failures[0] if failures else GateError(str(tried[names[0]].golden), "Export it again.")
    # Variants that were not run, since the GPU was lost meanwhile, come last.
    best = min(passed, key=lambda name: math.inf if (ms := tried[name].compute_ms) is None else ms)
    with io_errors(place):
        for name in built.keys() - {best}:
            _file(place, name).unlink(missing_ok=True)
    return msgspec.structs.replace(built[best], variants=tried)


def verdict(details: Details) -> list[str]:
    """Lines that say what each variant took, and which was kept; none where there was no choice."""
    if len(details.variants) < 2:
        return []
    lines = []
    for name, variant in details.variants.items():
        outcome = f"{variant.compute_ms:.3f} ms" if variant.compute_ms is not None else str(variant.failed)
        refused = f"; not kept: {variant.golden}" if isinstance(variant.golden, str) else ""
        lines.append(f"{name}: {outcome}{refused}{f' ({variant.warning})' if variant.warning else ''}")
    ms = details.chosen.compute_ms
    others = [name for name, variant in details.variants.items() if (variant.compute_ms or math.inf) < (ms or 0.0)]
    why = f"though {' and '.join(others)} took less" if others else "the fastest of those"
    advice = "; for dense attention export with --keep 1" if DENSE in others else ""
    advice = "; export the dense model in its place" if UNMERGED in others else advice
    return [*lines, f"kept: {details.kernels}, {'nothing was measured' if ms is None else why + advice}"]


def build_variant(engine: Engine, folder: Path, output: Path, timeout_s: float) -> Details:
    """Build one variant in a fresh process, which is killed when this returns or raises.

    Args:
        engine, folder, output: see `TensorRtBackend.build`; the paths are absolute.
        timeout_s: seconds after which the builder counts as hung.

    Raises:
        SparsifinerError: what the backend's `build` raised.
        BackendError: the process died, was killed, or took too long; the end of its log is in the message.
    """
    with start_child(__name__, f"The builder of {engine.backend}", _FIX) as child:
        arguments = {"engine": write_record(engine), "folder": str(folder), "output": str(output)}
        return child.ask("build", timeout_s, Details, **arguments)


def _build(engine: object, folder: str, output: str) -> Details:
    """Build one variant in this process."""
    read = read_record(engine, Engine, "The engine", "Report this.")
    backend = find_backend(Execution(backend=read.backend))
    assert isinstance(backend, TensorRtBackend)
    return backend.build(read, Path(folder), Path(output))


if __name__ == "__main__":
    serve({"build": _build})
