"""What a backend is: one class each; `open.find_backend` gives the one of a name. Importing this loads none."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeAlias

import msgspec

from sparsifiner_edge.bundle.engines import BatchRange, Details, Engine
from sparsifiner_edge.bundle.store import Bundle
from sparsifiner_edge.errors import BackendError
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.runtime.session import Session

Option: TypeAlias = bool | int | str
"""A setting of a build that only some backends know."""


class Backend(abc.ABC):
    """What runs bundles. Attributes: name: as given to `open_session`."""

    name: ClassVar[str]

    @abc.abstractmethod
    def load(self) -> Any:
        """Its package, imported; that touches no driver.

        Raises:
            MissingExtraError: it is not installed.
            BackendError: it is installed and of no use: broken, too old, or built without what is needed.
        """

    @abc.abstractmethod
    def open(self, bundle: Bundle, threads: int, kernels: str) -> Session:
        """A session on a bundle; see `open_session`. `kernels` is what `choose_kernels` returned."""

    def choose_kernels(self, bundle: Bundle, kernels: str) -> str:  # noqa: ARG002
        """What a choice of kernels (`open.KERNELS`) means for a bundle here.

        Raises:
            BackendError: it cannot be.
        """
        if kernels == "native":
            raise BackendError("The native kernels are the processor's.", "Leave --kernels out, or use onnxruntime.")
        return kernels


@dataclasses.dataclass(frozen=True)
class BuildRequest:
    """What a backend is asked to plan.

    Attributes:
        capabilities: compute capabilities asked for, such as ("8.6", "8.9"); none: this machine's GPU.
        batch: sizes that the engines shall take; all equal where the bundle's batch is fixed.
        options: what only some backends know, checked by them; see the backend's module.
    """

    bundle: Bundle
    capabilities: tuple[str, ...]
    batch: BatchRange
    options: Mapping[str, Option]


class Planned(NamedTuple):
    """One engine to build: what it will be (no file, no details), and the backend's own record for `build`, if any."""

    engine: Engine
    settings: msgspec.Struct | None = None


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One engine to build, as it goes to the process that builds it.

    Attributes:
        model, model_sha256: path and hash of the ONNX file; see `build_worker.job_model`.
        output: path of the engine to write.
        engine, settings: as planned; the settings are read by the backend.
    """

    backend: str
    model: str
    model_sha256: str
    output: str
    engine: Engine
    settings: Any = None


class EngineBackend(Backend):
    """A backend that runs engines, and builds them."""

    @abc.abstractmethod
    def plan(self, request: BuildRequest) -> list[Planned]:
        """Refuse what cannot be built, before anything is; one entry per engine.

        Raises:
            SparsifinerError: says what, and what to do.
        """

    @abc.abstractmethod
    def build(self, job: Job, tell: Progress) -> Details:
        """Build one engine; called in a worker process that may die.

        Raises:
            SparsifinerError: reaches the caller of `build_engine`.
        """

    @abc.abstractmethod
    def why_not_here(self, engine: Engine) -> str | None:
        """Why an engine cannot be run on this machine, such as "no CUDA device: ..."; None where it can."""

    @abc.abstractmethod
    def open_engine(self, path: Path, engine: Engine, bundle: Bundle) -> Session:
        """A session on an engine of a bundle, whose file may not be in it yet."""
