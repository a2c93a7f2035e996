"""What a backend is: one class each; `open.find_backend` gives the one of a name. Importing this loads none."""

from __future__ import annotations

import abc
import importlib
import os
from pathlib import Path
from typing import Any, ClassVar

from sparsifiner_edge.bundle.store import Bundle
from sparsifiner_edge.errors import BackendError, MissingExtraError
from sparsifiner_edge.execution import Execution
from sparsifiner_edge.runtime.session import Session


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
