"""Engines in a bundle: target of each engine, file names, and the choice of an engine for a machine.

An engine is compiled for one backend and version, one GPU architecture, one operating system and one processor
architecture. `manifest.json` records all of these under `engines`, and the file name repeats them. They are checked
before the engine is deserialized, because deserializing runs native code.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple, TypeAlias

import msgspec

from sparsifiner_edge.errors import BackendError, ConfigError

BODIES = "bodies"
"""Engine variant that runs sparse attention and merging as ONNX function bodies."""
PLUGIN = "plugin"
"""Engine variant that runs them in this package's CUDA kernels."""
MIXED = "mixed"
"""Engine variant with CUDA kernels, and dense attention in the layers where that is estimated to be faster."""
DENSE = "dense"
"""Engine variant with dense attention in all layers; tokens still merge."""
UNMERGED = "unmerged"
"""Engine variant of the dense model: dense attention and no merging."""
BASELINES = (MIXED, DENSE, UNMERGED)
"""Engine variants whose results differ from those of the model file."""
_CAPABILITY = re.compile(r"(\d{1,2})\.(\d)", re.ASCII)
_Word: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9.+_-]{0,64}\Z")]
"""Text that is safe in file names, configurations and terminals."""
Golden: TypeAlias = dict[str, dict[str, float]]
"""Result of `golden.check_golden`."""


class BatchRange(msgspec.Struct, frozen=True):
    """Batch sizes that an engine accepts; all three are equal for a fixed batch size.

    Attributes:
        least: Minimum batch size.
        best: Batch size that the engine is tuned for.
        most: Maximum batch size.
    """

    least: int
    best: int
    most: int

    def __str__(self) -> str:
        return str(self.best) if self.least == self.most else f"{self.least}-{self.best}-{self.most}"


class EngineVariant(msgspec.Struct, frozen=True, kw_only=True):
    """Build result of one way to run sparse attention (`BODIES`, `PLUGIN` and so on); see `runtime.build`.

    Attributes:
        golden: Result of the golden check, or its error message if the check failed.
        compute_ms: Median compute time of several runs in milliseconds.
        failed: Reason why the variant was not built or not run.
        warning: Limitation of the measured time.
    """

    golden: Golden | str | None = None
    compute_ms: float | None = None
    failed: str | None = None
    warning: str | None = None


class Details(msgspec.Struct, frozen=True, kw_only=True):
    """Build report of an engine, for people; a backend leaves out values that it does not know.

    Attributes:
        build_seconds: Wall-clock time of the build.
        cpu_seconds: Processor time of the building process, including its start.
        bytes: Size of the engine file.
        kernels: Variant that was kept.
        variants: All variants by name, including those that were not built.
    """

    build_seconds: float | None = None
    cpu_seconds: float | None = None
    bytes: int | None = None
    kernels: str | None = None
    variants: dict[str, EngineVariant] = {}

    @property
    def chosen(self) -> EngineVariant:
        """Build result of the variant that was kept."""
        return self.variants.get(self.kernels or "", EngineVariant())


class Engine(msgspec.Struct, frozen=True):
    """Target of an engine: the only configuration that it runs on.

    Attributes:
        backend: Backend name, as passed to `open_session`.
        version: Version of the backend's package, such as "1.7.1.116".
        compute_capability: Compute capability of the GPU, such as "8.6".
        os: Operating system, as `system` returns it.
        cpu: Processor architecture, as `system` returns it.
        precision: Weight precision of the bundle.
        batch: Batch sizes that the engine accepts.
        details: Build report.
        file: Path inside the bundle; "" before the engine is built.
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
        """Name such as "tensorrt-rtx-1.7.1.116-sm86-linux-x86_64-fp16-b1"; an engine replaces another of its name."""
        sm = self.compute_capability.replace(".", "")
        return f"{self.backend}-{self.version}-sm{sm}-{self.os}-{self.cpu}-{self.precision}-b{self.batch}"

    def __str__(self) -> str:
        return f"{self.backend} {self.version} for {self.compute_capability}"


class EngineDevice(NamedTuple):
    """Device of this machine that would run an engine.

    Attributes:
        version: Version of the backend's package.
        compute_capability: Compute capability of the GPU, such as "8.6"; "" if it is not known yet.
        name: Name of the GPU, for messages.
    """

    version: str
    compute_capability: str = ""
    name: str = "this GPU"


def system() -> tuple[str, str]:
    """Return operating system and processor architecture of this machine, such as ("linux", "x86_64")."""
    return platform.system().lower(), platform.machine().lower()


def parse_capability(text: str) -> str:
    """Check a compute capability from the command line, such as "8.6", and strip surrounding whitespace.

    Raises:
        ConfigError: The text is not two numbers separated by a point.
    """
    if not _CAPABILITY.fullmatch(text.strip()):
        raise ConfigError(
            f"The compute capability is {text!r}.",
            "Give major and minor version with a point, such as 8.6; nvidia-smi --query-gpu=compute_cap prints it.",
        )
    return text.strip()


def mismatches(engine: Engine, device: EngineDevice) -> list[str]:
    """Return the reasons why an engine does not run on a device; empty if it does."""
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
    """Return the most recently built engine of a backend that runs on a device.

    Args:
        engines: Engines in a manifest, oldest first.
        backend: Backend name.
        device: Device to run on.
        folder: Bundle folder, for messages.

    Raises:
        BackendError: No engine fits. The message gives the reason for each engine and the command that builds one.
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
