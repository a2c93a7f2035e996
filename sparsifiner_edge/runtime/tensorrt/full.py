"""Full TensorRT, 10.3 (JetPack 6) to 11.x: engines for the GPU of this machine.

Options of a build, beside those of every backend: `kernels` ("auto", "portable", "plugin"), `optimisation_level`
(0 to 5), `workspace_mib`, `version_compatible`, `hardware_compatible`, `timing_cache` (False for none), `detailed`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsifiner_edge.bundle.engines import AMPERE_PLUS, VERSION_COMPATIBLE, BatchRange, Engine, system
from sparsifiner_edge.bundle.manifest import Manifest
from sparsifiner_edge.errors import BackendError, ConfigError
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.runtime.build import BuildRequest, Planned
from sparsifiner_edge.runtime.build_worker import Job, job_model
from sparsifiner_edge.runtime.cuda import Device, open_driver, probe
from sparsifiner_edge.runtime.tensorrt import choose
from sparsifiner_edge.runtime.tensorrt.build import Settings, timing_cache_path
from sparsifiner_edge.runtime.tensorrt.open import import_package, open_listed, why_no_fit
from sparsifiner_edge.runtime.tensorrt.session import BODIES, EngineSession

BACKEND = "tensorrt"
OLDEST = (10, 3)
OPTIONS: Mapping[str, type] = {
    "kernels": str, "optimisation_level": int, "workspace_mib": int, "version_compatible": bool,
    "hardware_compatible": bool, "timing_cache": bool, "detailed": bool,
}  # fmt: skip


def load_backend() -> Any:
    """The module `tensorrt`.

    Raises:
        MissingExtraError: it is not installed.
        BackendError: it is installed and cannot be imported, or is older than 10.3.
    """
    trt = import_package("tensorrt", "tensorrt", "Reinstall it; on a Jetson it comes with JetPack.")
    version = str(getattr(trt, "__version__", "0"))
    if version_numbers(version) < OLDEST or not hasattr(trt, "IProgressMonitor"):
        raise BackendError(
            f"TensorRT {version} is older than {'.'.join(map(str, OLDEST))}.",
            "Install a newer one; on a Jetson upgrade to JetPack 6 or later.",
        )
    return trt


def version_numbers(version: str) -> tuple[int, ...]:
    """ "10.16.1.11" -> (10, 16, 1, 11)."""
    return tuple(int(number) for number in re.findall(r"\d+", version))


def plan(request: BuildRequest) -> list[Planned]:
    """See `build.EngineBackend`: one engine, for the GPU of this machine."""
    trt = load_backend()
    options = check_options(request.options)
    device = probe()
    others = [c for c in request.capabilities if c != device.compute_capability]
    if others:
        raise ConfigError(
            f"TensorRT builds for the GPU that it runs on ({device.name}, {device.compute_capability}), "
            f"not for {', '.join(others)}.",
            "Build on a machine that has that GPU, or use --backend tensorrt-rtx, which builds ahead of time.",
        )
    compatible = _compatible(options, device)
    version = str(trt.__version__)
    candidates = choose.candidates(trt, request.folder, request.manifest, device, str(options.get("kernels", "auto")))
    variant = candidates[0] if len(candidates) == 1 else choose.MEASURED
    engine = Engine(
        BACKEND, version, device.compute_capability, *system(), request.precision, request.batch,
        "" if variant == BODIES else variant, compatible,
    )  # fmt: skip
    cache = timing_cache_path(device, version) if options.get("timing_cache", True) else None
    workspace = options.get("workspace_mib")
    settings = {
        "optimisation_level": options.get("optimisation_level", 3),
        "workspace": workspace << 20 if workspace else None,
        "timing_cache": str(cache) if cache else None,
        "detailed": options.get("detailed", False),
        "candidates": list(candidates),
        "bundle": str(request.folder.resolve()),
    }
    return [Planned(engine, settings)]


def check_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a build, checked.

    Raises:
        ConfigError: unknown, of another type, or out of range.
    """
    for name, value in options.items():
        if name not in OPTIONS:
            raise ConfigError(f"tensorrt has no option {name!r}.", f"It has: {', '.join(OPTIONS)}.")
        if type(value) is not OPTIONS[name]:
            raise ConfigError(f"option {name} is {value!r}.", f"Give a value of type {OPTIONS[name].__name__}.")
    if not 0 <= options.get("optimisation_level", 3) <= 5:
        raise ConfigError(f"optimisation_level is {options['optimisation_level']}.", "Give 0 (fast) to 5 (slow).")
    if not options.get("workspace_mib", 1) > 0:
        raise ConfigError(f"workspace_mib is {options['workspace_mib']}.", "Give at least 1, or leave it out.")
    return dict(options)


def _compatible(options: Mapping[str, Any], device: Device) -> tuple[str, ...]:
    if options.get("hardware_compatible") and (device.integrated or device.sm < (8, 0)):
        kind = "a Jetson's" if device.integrated else "an older"
        raise ConfigError(
            f"Hardware-compatible engines need a GPU card of compute capability 8.0 or later; {device.name} is {kind}.",
            "Leave the option hardware_compatible out.",
        )
    wanted = ((VERSION_COMPATIBLE, "version_compatible"), (AMPERE_PLUS, "hardware_compatible"))
    return tuple(word for word, option in wanted if options.get(option))


def build(job: Job, tell: Progress) -> dict[str, Any]:
    """See `build.EngineBackend`."""
    trt = load_backend()
    driver = open_driver()  # Stays open while TensorRT has objects.
    try:
        planned, settings = job["engine"], job["settings"]
        how = Settings(
            batch=BatchRange(**planned["batch"]),
            optimisation_level=settings["optimisation_level"],
            workspace=settings["workspace"],
            compatible=tuple(planned["compatible"]),
            timing_cache=settings["timing_cache"],
            detailed=settings["detailed"],
        )
        engine = Engine(**{**planned, "batch": how.batch, "compatible": how.compatible})
        work = choose.Work(trt, job_model(job), Path(job["output"]), engine, Path(settings["bundle"]), how)
        return choose.build_fastest(work, settings["candidates"], driver, tell)
    finally:
        driver.close()


def why_not_here(engine: Engine) -> str | None:
    """See `build.EngineBackend`."""
    return why_no_fit(load_backend, engine)


def open_engine(path: Path, engine: Engine, manifest: Manifest) -> EngineSession:
    """See `build.EngineBackend`."""
    return EngineSession(load_backend(), path, engine, manifest)


def open_model(folder: Path, manifest: Manifest, _threads: int, kernels: str) -> EngineSession:
    """See `open.open_listed`."""
    return open_listed(load_backend(), BACKEND, folder, manifest, kernels)
