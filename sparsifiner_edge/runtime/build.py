"""Build of engines for a bundle (`build_engine`).

Sparse attention can run in an engine in several ways, the variants. Each variant is built and timed in a process of its
own with a time limit of its own, because a native parser or compiler may abort or hang; a failure then affects one
variant only. The fastest variant that passes the golden check is kept. The times of the others, or the reasons why they
failed, are recorded. All engines are added to the bundle in one step.
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
"""Batch sizes of an engine for a bundle of dynamic batch, tuned for 1 because a camera gives one image at a time."""
_FIX = (
    "The bundle is unchanged. If the build took too long, raise --timeout; if the system ran out of memory, close "
    "other programs or build for a smaller batch; else report this with the model's name, or try another version."
)
"""Advice for the case that the process of a build dies or hangs."""


class BuildResult(msgspec.Struct, frozen=True, kw_only=True):
    """Result of `build_engine`.

    Attributes:
        bundle: Folder of the bundle.
        backend: Name of the backend.
        version: Version of the backend's package.
        engines: Engines that were added to the bundle.
        seconds: Total duration in seconds.
    """

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
    """Build engines for a bundle and add them to it.

    If this machine has the GPU that an engine is for, all possible variants of sparse attention and, for comparison,
    dense attention are built and timed. The fastest variant that reproduces the golden output is kept.

    Args:
        bundle: Folder written by `sparsifiner-edge export`.
        backend: "tensorrt" or "tensorrt-rtx"; other backends run the bundle's model directly.
        compute_capabilities: Compute capabilities to build for, such as ("8.6", "8.9"), one engine each. If empty,
            that of this machine's GPU.
        batch: Minimum, optimal and maximum batch size, for a bundle of dynamic batch. None selects `DEFAULT_BATCH`.
        timeout_s: Time limit in seconds for one variant of an engine. None selects 600, and 1800 on a Jetson.
        kernels: "auto" for the fastest variant, "native" for this project's CUDA kernels, "portable" for the ONNX
            function bodies of the operators.
        progress: Callback that receives (stage, done, total).

    Returns:
        The engines that were added, and facts about the build.

    Raises:
        GateError: No variant reproduces the golden output. Nothing was written.
        SparsifinerError: The build failed. Nothing was written, and the bundle is unchanged.

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
            "Choose --backend tensorrt or tensorrt-rtx. To run the golden pair: sparsifiner-edge bundle verify",
        )
    opened, version = open_bundle(Path(bundle)), str(builder.load().__version__)
    capabilities = tuple(dict.fromkeys(map(parse_capability, compute_capabilities)))
    planned = builder.engines_to_build(opened, capabilities, batch_range(opened, batch))
    if timeout_s is None:
        timeout_s = 600.0 if jetson_release() is None else 1800.0  # The CPU of a Jetson is slow.
    engines = _build_all(opened, planned, timeout_s, progress)
    seconds = time.monotonic() - start
    return BuildResult(bundle=str(opened.folder), backend=backend, version=version, engines=engines, seconds=seconds)


def batch_range(bundle: Bundle, batch: tuple[int, int, int] | None) -> BatchRange:
    """Return the batch sizes for the engines of a bundle.

    Args:
        bundle: Bundle to build engines for.
        batch: Minimum, optimal and maximum batch size; None for the default.

    Raises:
        ConfigError: The bundle has a fixed batch of another size, or not 1 <= minimum <= optimum <= maximum.
        ArtifactError: The manifest does not state the shape of the input.
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
    """Build all planned engines in a scratch folder, then add them to the bundle in one step."""
    engines: list[Engine] = []
    with bundle_scratch(bundle.folder) as scratch:
        files: dict[str, Path] = {}
        for number, engine in enumerate(planned):
            prefix = f"{number + 1} of {len(planned)}, compute capability {engine.compute_capability}: "
            place = scratch.resolve() / engine.name
            details = build_fastest(engine, bundle, place, timeout_s, progress and with_prefix(progress, prefix))
            path = _file(place, str(details.kernels))
            # The hash in the name leaves an earlier engine of the same name intact until the manifest is replaced.
            file = f"{ENGINE_FOLDER}/{engine.name}-{sha256(path)[:8]}.engine"
            engines.append(msgspec.structs.replace(engine, file=file, details=details))
            files[file] = path
        extend_bundle(bundle.folder, files, lambda manifest: _with_engines(manifest, engines, bundle))
    return tuple(engines)


def _file(place: Path, variant: str) -> Path:
    """Return the path of the engine file of a variant."""
    return place.with_name(f"{place.name}.{variant}")


def _require_same(manifest: Manifest, bundle: Bundle) -> None:
    """Check that the bundle's model did not change since the build began.

    Raises:
        ArtifactError: The model on disk is not the one that the build began with.
    """
    if manifest.files.get(MODEL_FILE) != bundle.manifest.files[MODEL_FILE]:
        raise ArtifactError(f"{bundle.folder} was exported again while the engines were built.", "Build them again.")


def _with_engines(manifest: Manifest, engines: Sequence[Engine], bundle: Bundle) -> Manifest:
    """Return the manifest with engines added and earlier engines of the same names removed.

    The backend of the engines becomes the bundle's preferred one (`intended`), which "auto" takes. An earlier
    preference is kept only if none of the engines could run on this machine.
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
    """Build every variant of an engine and keep the fastest one that reproduces the golden output.

    Args:
        engine: Planned engine from `TensorRtBackend.engines_to_build`.
        bundle: Bundle of the engine.
        place: Path prefix of the engine files; each variant is written to a file next to it.
        timeout_s: Time limit in seconds for each variant.
        progress: Callback that receives (stage, done, total).

    Returns:
        Details of the variant that is kept. Its `variants` hold all variants, including failed ones.

    Raises:
        SparsifinerError: No variant could be built, none reproduces the golden output, or the bundle changed.
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
    # Variants without a time come last: they were not run, for example because the GPU was lost.
    best = min(passed, key=lambda name: math.inf if (ms := tried[name].compute_ms) is None else ms)
    with io_errors(place):
        for name in built.keys() - {best}:
            _file(place, name).unlink(missing_ok=True)
    return msgspec.structs.replace(built[best], variants=tried)


def verdict(details: Details) -> list[str]:
    """Return lines for users with the time of each variant and the one that was kept; none if there was one variant."""
    if len(details.variants) < 2:
        return []
    lines = []
    for name, variant in details.variants.items():
        outcome = f"{variant.compute_ms:.3f} ms" if variant.compute_ms is not None else str(variant.failed)
        refused = f"; not kept: {variant.golden}" if isinstance(variant.golden, str) else ""
        lines.append(f"{name}: {outcome}{refused}{f' ({variant.warning})' if variant.warning else ''}")
    ms = details.chosen.compute_ms
    others = [name for name, variant in details.variants.items() if (variant.compute_ms or math.inf) < (ms or 0.0)]
    why = f"although {' and '.join(others)} took less time" if others else "the fastest of those"
    advice = "; for dense attention export with --keep 1" if DENSE in others else ""
    advice = "; export the dense model instead" if UNMERGED in others else advice
    return [*lines, f"kept: {details.kernels}, {'nothing was measured' if ms is None else why + advice}"]


def build_variant(engine: Engine, folder: Path, output: Path, timeout_s: float) -> Details:
    """Build one variant in a child process, which is killed at the end.

    Args:
        engine: Engine to build; `details.kernels` names the variant.
        folder: Absolute path of the bundle.
        output: Absolute path of the engine file to write.
        timeout_s: Seconds after which the child counts as hung.

    Returns:
        Details of the engine, from `TensorRtBackend.build`.

    Raises:
        SparsifinerError: The backend's `build` raised this error.
        BackendError: The child died, was killed, or exceeded the timeout; the message quotes the end of its log.
    """
    with start_child(__name__, f"The builder of {engine.backend}", _FIX) as child:
        arguments = {"engine": write_record(engine), "folder": str(folder), "output": str(output)}
        return child.ask("build", timeout_s, Details, **arguments)


def _build(engine: object, folder: str, output: str) -> Details:
    """Build one variant in this process, the child."""
    read = read_record(engine, Engine, "The engine", "Report this.")
    backend = find_backend(Execution(backend=read.backend))
    assert isinstance(backend, TensorRtBackend)
    return backend.build(read, Path(folder), Path(output))


if __name__ == "__main__":
    serve({"build": _build})
