"""Engines in a bundle: what each was built for, how its file is named, and which of them fits a machine.

An engine is compiled for one backend and version, one GPU architecture, one operating system and processor. All of
that stands in `manifest.json` under `engines` and in the file's name, so that it is checked before anything is
deserialised: deserialising runs native code.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple, TypeAlias

import msgspec

from sparsifiner_edge.errors import BackendError, ConfigError

BODIES, PLUGIN, MIXED, DENSE, UNMERGED = "bodies", "plugin", "mixed", "dense", "unmerged"
"""What carries out sparse attention and merging: bodies, the project's CUDA kernels, those with dense attention in the
layers where it is taken to be faster, dense attention in all, or the dense model, where nothing merges either."""
BASELINES = (MIXED, DENSE, UNMERGED)
"""They compute something else than the file."""
_CAPABILITY = re.compile(r"(\d{1,2})\.(\d)", re.ASCII)
_Word: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9.+_-]{0,64}\Z")]
"""Fit for names of files, configurations and terminals."""
Golden: TypeAlias = dict[str, dict[str, float]]
"""What `golden.check_golden` returns."""


class BatchRange(msgspec.Struct, frozen=True):
    """Batch sizes that an engine takes, from `least` to `most`; it is tuned for `best`. All equal where fixed."""

    least: int
    best: int
    most: int

    def __str__(self) -> str:
        return str(self.best) if self.least == self.most else f"{self.least}-{self.best}-{self.most}"


class EngineVariant(msgspec.Struct, frozen=True, kw_only=True):
    """One way of carrying out sparse attention (`BODIES`, ..); see `runtime.build`.

    Attributes:
        golden: what the golden check returned, or its message where it failed.
        compute_ms: median of some runs.
        failed: why there is no such engine, or why it was not run.
        warning: what its time does not say.
    """

    golden: Golden | str | None = None
    compute_ms: float | None = None
    failed: str | None = None
    warning: str | None = None


class Details(msgspec.Struct, frozen=True, kw_only=True):
    """What the builder of an engine reports, for people; a backend leaves out what it does not know.

    Attributes:
        build_seconds: by the clock; cpu_seconds: of the building process, its start included. bytes: size of the file.
        kernels: the variant that was kept; variants: all of them, also those that were not built.
    """

    build_seconds: float | None = None
    cpu_seconds: float | None = None
    bytes: int | None = None
    kernels: str | None = None
    variants: dict[str, EngineVariant] = {}

    @property
    def chosen(self) -> EngineVariant:
        """What is known of the variant that was kept."""
        return self.variants.get(self.kernels or "", EngineVariant())


class Engine(msgspec.Struct, frozen=True):
    """What an engine was built for, and runs on alone.

    Attributes:
        backend: as given to `open_session`. version: of its package, such as "1.7.1.116".
        compute_capability: of the GPU, such as "8.6". os, cpu: as `system` gives them.
        precision: the bundle's. batch: sizes that it takes.
        details: what the builder says about it. file: its path in the bundle; "" before it is built.
    """

    backend: _Word
    version: _Word
    compute_capability: _Word
    os: _Word
    cpu: _Word
    precision: _Word
    batch: BatchRange
    details: Details = Details()
    file: str = ""

    @property
    def name(self) -> str:
        """Such as "tensorrt-rtx-1.7.1.116-sm86-linux-x86_64-fp16-b1"; two engines of one name take the same place."""
        sm = self.compute_capability.replace(".", "")
        return f"{self.backend}-{self.version}-sm{sm}-{self.os}-{self.cpu}-{self.precision}-b{self.batch}"

    def __str__(self) -> str:
        return f"{self.backend} {self.version} for {self.compute_capability}"


class EngineDevice(NamedTuple):
    """What would run an engine on this machine: the version of its backend's package; the GPU's compute capability,
    such as "8.6", "" where it is not known yet; the GPU's name, for messages.
    """

    version: str
    compute_capability: str = ""
    name: str = "this GPU"


def system() -> tuple[str, str]:
    """Operating system and processor of this machine, such as ("linux", "x86_64")."""
    return platform.system().lower(), platform.machine().lower()


def parse_capability(text: str) -> str:
    """ "8.6", as the command line takes it, checked.

    Raises:
        ConfigError: not two numbers with a point between.
    """
    if not _CAPABILITY.fullmatch(text.strip()):
        raise ConfigError(
            f"compute capability is {text!r}.",
            "Give major and minor version with a point, such as 8.6; nvidia-smi --query-gpu=compute_cap prints it.",
        )
    return text.strip()


def mismatches(engine: Engine, device: EngineDevice) -> list[str]:
    """Why an engine does not run on a device; empty where it does."""
    (os, cpu), reasons = system(), []
    if (engine.os, engine.cpu) != (os, cpu):
        reasons.append(f"built for {engine.os} on {engine.cpu}, this is {os} on {cpu}")
    if engine.version != device.version:
        reasons.append(f"built by {engine.backend} {engine.version}, installed is {device.version}")
    if device.compute_capability not in ("", engine.compute_capability):
        reasons.append(
            f"built for compute capability {engine.compute_capability}, {device.name} has {device.compute_capability}"
        )
    return reasons


def fitting_engine(engines: Sequence[Engine], backend: str, device: EngineDevice, folder: Path) -> Engine:
    """The engine of a backend built last that runs on a device.

    Args:
        engines: of a manifest. folder: the bundle, for messages.

    Raises:
        BackendError: no engine runs there; the message says why not, and which command builds one.
    """
    of_backend = [engine for engine in engines if engine.backend == backend]
    for engine in reversed(of_backend):
        if not mismatches(engine, device):
            return engine
    fix = f"On a machine like this one: sparsifiner-edge build {folder} --backend {backend}"
    if device.compute_capability:
        fix += f" --compute-capability {device.compute_capability}"
    if not of_backend:
        raise BackendError(f"{folder} holds no engine for {backend}.", fix)
    reasons = "; ".join(f"{engine.file}: {', '.join(mismatches(engine, device))}" for engine in of_backend)
    raise BackendError(f"No engine of {folder} runs here. {reasons}.", fix)
