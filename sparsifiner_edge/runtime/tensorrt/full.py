"""Full TensorRT, 10.3 (JetPack 6) to 11.x: engines for the GPU of this machine."""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping
from typing import Any

import msgspec

from sparsifiner_edge.bundle.engines import AMPERE_PLUS, VERSION_COMPATIBLE, Details, Engine, system
from sparsifiner_edge.errors import BackendError, ConfigError
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.records import read_record
from sparsifiner_edge.runtime.backend import BuildRequest, Job, Option, Planned
from sparsifiner_edge.runtime.build_worker import job_model
from sparsifiner_edge.runtime.cuda import Device, open_driver, probe
from sparsifiner_edge.runtime.tensorrt import choose
from sparsifiner_edge.runtime.tensorrt.backend import TensorRtBackend, import_package
from sparsifiner_edge.runtime.tensorrt.build import Settings, timing_cache_path
from sparsifiner_edge.runtime.tensorrt.session import BODIES

OLDEST = (10, 3)


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """Options of a build, beside those of every backend.

    Attributes:
        kernels: one of `choose.KERNELS`.
        optimisation_level: 0 (fast) to 5 (slow). workspace_mib: None decides by what is free.
        version_compatible, hardware_compatible: for later versions, and for other GPUs.
        timing_cache: keep measured times between builds. detailed: for the inspector.
    """

    kernels: str = "auto"
    optimisation_level: int = 3
    workspace_mib: int | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    timing_cache: bool = True
    detailed: bool = False


class TensorRt(TensorRtBackend):
    """Builds one engine, for the GPU of this machine."""

    name = "tensorrt"

    def load(self) -> Any:
        """The module `tensorrt`, 10.3 or later; see `Backend.load`."""
        trt = import_package("tensorrt", "tensorrt", "Reinstall it; on a Jetson it comes with JetPack.")
        version = str(getattr(trt, "__version__", "0"))
        if version_numbers(version) < OLDEST or not hasattr(trt, "IProgressMonitor"):
            raise BackendError(
                f"TensorRT {version} is older than {'.'.join(map(str, OLDEST))}.",
                "Install a newer one; on a Jetson upgrade to JetPack 6 or later.",
            )
        return trt

    def plan(self, request: BuildRequest) -> list[Planned]:
        """See `EngineBackend.plan`."""
        trt = self.load()
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
        candidates = choose.candidates(trt, request.bundle, device, options.kernels)
        variant = candidates[0] if len(candidates) == 1 else choose.MEASURED
        engine = Engine(
            self.name, version, device.compute_capability, *system(), request.bundle.precision, request.batch,
            "" if variant == BODIES else variant, compatible,
        )  # fmt: skip
        settings = Settings(
            optimisation_level=options.optimisation_level,
            workspace_bytes=options.workspace_mib and options.workspace_mib << 20,
            timing_cache=str(timing_cache_path(device, version)) if options.timing_cache else None,
            detailed=options.detailed,
            candidates=candidates,
            bundle=str(request.bundle.folder.resolve()),
        )
        return [Planned(engine, settings)]

    def build(self, job: Job, tell: Progress) -> Details:
        """See `EngineBackend.build`."""
        settings = read_record(job.settings, Settings, "The job", "Report this.")
        trt = self.load()
        driver = open_driver()  # Stays open while TensorRT has objects.
        try:
            return choose.build_fastest(choose.Work(trt, job_model(job), job, settings, driver), tell)
        finally:
            driver.close()


def version_numbers(version: str) -> tuple[int, ...]:
    """ "10.16.1.11" -> (10, 16, 1, 11)."""
    return tuple(int(number) for number in re.findall(r"\d+", version))


def check_options(options: Mapping[str, Option]) -> Options:
    """The options of a build, checked.

    Raises:
        ConfigError: unknown, of another type, or out of range.
    """
    # The type of a value that may be None is the first of two.
    kinds = {field.name: (*typing.get_args(field.type), field.type)[0] for field in msgspec.structs.fields(Options)}
    for name, value in options.items():
        if name not in kinds:
            raise ConfigError(f"tensorrt has no option {name!r}.", f"It has: {', '.join(kinds)}.")
        if type(value) is not kinds[name]:
            raise ConfigError(f"option {name} is {value!r}.", f"Give a value of type {kinds[name].__name__}.")
    found = msgspec.convert(options, Options)
    if not 0 <= found.optimisation_level <= 5:
        raise ConfigError(f"optimisation_level is {found.optimisation_level}.", "Give 0 (fast) to 5 (slow).")
    if found.workspace_mib is not None and found.workspace_mib < 1:
        raise ConfigError(f"workspace_mib is {found.workspace_mib}.", "Give at least 1, or leave it out.")
    return found


def _compatible(options: Options, device: Device) -> tuple[str, ...]:
    if options.hardware_compatible and (device.integrated or device.sm < (8, 0)):
        kind = "a Jetson's" if device.integrated else "an older"
        raise ConfigError(
            f"Hardware-compatible engines need a GPU card of compute capability 8.0 or later; {device.name} is {kind}.",
            "Leave the option hardware_compatible out.",
        )
    wanted = ((VERSION_COMPATIBLE, options.version_compatible), (AMPERE_PLUS, options.hardware_compatible))
    return tuple(word for word, asked in wanted if asked)
