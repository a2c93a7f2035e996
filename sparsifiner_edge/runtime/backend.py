"""What a backend is: one class each; `open.find_backend` gives the one of a name. Importing this loads none."""

from __future__ import annotations

import abc
import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeAlias

import msgspec

from sparsifiner_edge.bundle.engines import BODIES, BatchRange, Details, Engine
from sparsifiner_edge.bundle.manifest import MODEL_FILE
from sparsifiner_edge.bundle.store import Bundle, open_bundle
from sparsifiner_edge.errors import ArtifactError, BackendError, MissingExtraError
from sparsifiner_edge.execution import Execution
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.runtime.session import Session

Option: TypeAlias = bool | int | str
"""A setting of a build that only some backends know."""
OptionValues: TypeAlias = Mapping[str, Option]


def cache_folder() -> Path:
    """The user's own folder for what is kept between runs outside of bundles: it belongs to a machine, and native code
    reads it. It need not exist yet.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsifiner-edge"


def import_package(module: str, package: str, extra: str, fix: str) -> Any:
    """Import a backend's Python module; that touches no driver.

    Args:
        module, package, extra: its names in Python and for pip, and the extra that installs it.
        fix: what to do where it is installed and does not import.

    Raises:
        MissingExtraError: it is not installed.
        BackendError: it is installed and cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in (module, f"{module}_bindings", f"{module}_libs"):
            raise BackendError(f"{module} lacks the module {error.name}.", f"Reinstall {package}.") from error
        raise MissingExtraError(package, extra) from error
    except Exception as error:  # Its libraries may be missing, or be those of another version.
        raise BackendError(f"{module} cannot be imported: {error}.", fix) from error


class Backend(abc.ABC):
    """What runs bundles.

    Attributes:
        name: as given to `open_session`.
        execution: how it shall run them; None: as it does by itself.
    """

    name: ClassVar[str]

    def __init__(self, execution: Execution | None = None) -> None:
        self.execution = execution or Execution(backend=self.name)

    @abc.abstractmethod
    def load(self) -> Any:
        """Its package, imported; that touches no driver.

        Raises:
            MissingExtraError: it is not installed.
            BackendError: it is installed and of no use: broken, too old, built without what is needed, or without the
                precision that is asked for.
        """

    @abc.abstractmethod
    def open(self, bundle: Bundle) -> Session:
        """A session on a bundle; see `open_session`."""


def refuse_native(kernels: str) -> None:
    """Refuse kernels that a GPU cannot run."""
    if kernels == "native":
        raise BackendError(
            "The native kernels are the processor's.", "Leave --kernels out, or use onnxruntime or openvino."
        )


def require_stored(precision: str, stored: str, name: str) -> None:
    """Refuse a precision (`PRECISIONS`) of what computes in a file's own types.

    Args:
        stored: what the file holds beside int8: "fp32" or "fp16". name: of what runs it.
    """
    if precision not in ("auto", stored):
        raise BackendError(
            f"{name} computes in what a file stores, {stored} here, and not in {precision}.",
            "Leave --precision out"
            + (f", or export with --precision {precision}." if precision in ("fp32", "fp16") else "."),
        )


class Candidates(NamedTuple):
    """What may carry out sparse attention in an engine (`bundle.engines.BODIES`, ..).

    Attributes:
        names: what is built, the one that always works first; where there are several they are timed.
        left_out: why others are not built.
    """

    names: tuple[str, ...]
    left_out: Mapping[str, str]


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One engine to build, as it goes to the process that builds it.

    Attributes:
        bundle: its folder. model_sha256: of its model when the engine was planned.
        output: path of the engine to write.
        engine: as planned: no file, no details.
        options: as `plan` had them.
        candidate: what shall carry out sparse attention: one of `Candidates.names`.
        timed: also run it, where there are others to compare it with.
    """

    bundle: str
    model_sha256: str
    output: str
    engine: Engine
    options: dict[str, Option] = {}
    candidate: str = BODIES
    timed: bool = False

    def checked_bundle(self) -> Bundle:
        """The bundle, opened in this process.

        Raises:
            ArtifactError: it is damaged, or its model is another by now.
        """
        bundle = open_bundle(Path(self.bundle))
        if bundle.manifest.files[MODEL_FILE] != self.model_sha256:
            raise ArtifactError(f"{self.bundle} was exported anew while the engines were built.", "Build them again.")
        return bundle


class EngineBackend(Backend):
    """A backend that runs engines, and builds them."""

    @abc.abstractmethod
    def plan(
        self, bundle: Bundle, capabilities: Sequence[str], batch: BatchRange, options: OptionValues
    ) -> list[Engine]:
        """What each engine will be, without file and details; what cannot be built is rejected before anything is.

        Args:
            capabilities: compute capabilities asked for, such as ("8.6", "8.9"); none: this machine's GPU.
            batch: sizes that the engines shall take; all equal where the bundle's batch is fixed.
            options: what only some backends know, checked here; see the backend's module.

        Raises:
            SparsifinerError: says what, and what to do.
        """

    @abc.abstractmethod
    def candidates(self, bundle: Bundle, engine: Engine, options: OptionValues) -> Candidates:
        """What a planned engine is built with.

        Raises:
            SparsifinerError: what the options ask for is not possible; says why.
        """

    def default_timeout_s(self) -> float:
        """Seconds that building one candidate may take."""
        return 600.0

    @abc.abstractmethod
    def build(self, job: Job, tell: Progress) -> Details:
        """Build one candidate of an engine; called in a worker process that may die.

        Returns:
            What is known of it; under `candidates` what its runs gave, where they are asked for.

        Raises:
            SparsifinerError: reaches the caller of `build_engine`.
        """

    @abc.abstractmethod
    def why_not_here(self, engine: Engine) -> str | None:
        """Why an engine cannot be run on this machine, such as "no CUDA device: ..."; None where it can."""

    @abc.abstractmethod
    def open_engine(self, path: Path, engine: Engine, bundle: Bundle) -> Session:
        """A session on an engine of a bundle, whose file may not be in it yet."""
