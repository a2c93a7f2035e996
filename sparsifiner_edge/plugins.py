"""Plugins: entry points of installed packages, or "package.module:object"."""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, TypeVar

from sparsifiner_edge.errors import ConfigError, SparsifinerError
from sparsifiner_edge.text import nearest, one_line

Kind = TypeVar("Kind")
NAME_IT = "Name it as module:function in the folder of its file, or install its package."
"""Advice for a plugin that cannot be found."""


def plugins(group: str) -> dict[str, EntryPoint]:
    """Return the entry points of a group by name, without importing them."""
    return {point.name: point for point in entry_points(group=group)}


def import_object(place: EntryPoint | str, fix: str, error: type[SparsifinerError] = ConfigError) -> Any:
    """Import the object of an entry point or of "package.module:object".

    The latter is also searched in the current folder, after all installed packages, so that no file there can replace a
    library.

    Raises:
        SparsifinerError: `error`, with `fix` if the module or object does not exist; importing it may fail in any way,
            because it is third-party code.
    """
    here, (module, _, name) = "", (place.value if isinstance(place, EntryPoint) else place).partition(":")
    try:
        if isinstance(place, EntryPoint):
            module, name = place.module, place.attr or ""
        else:
            with contextlib.suppress(OSError):  # The current folder may have been deleted.
                here = str(Path.cwd())
            if here and here not in sys.path and not getattr(sys.flags, "safe_path", False):
                sys.path.append(here)
        imported = importlib.import_module(module)
    except Exception as cause:
        if isinstance(cause, ModuleNotFoundError) and f"{module}.".startswith(f"{cause.name}."):
            hint = nearest(module, (path.stem for path in Path(here).glob("*"))) if here else ""
            what = f"There is no module {module!r} in {here or 'the installed packages'}."
            raise error(what, f"{hint} {fix}".strip()) from cause
        what = f"{module} cannot be imported: {type(cause).__name__}: {one_line(cause)}."
        raise error(what, "Fix it, or install the packages that it needs.") from cause
    try:
        return functools.reduce(getattr, filter(None, name.split(".")), imported)
    except AttributeError as cause:
        where, hint = getattr(imported, "__file__", None) or "a folder", nearest(name, vars(imported))
        raise error(f"{module} ({where}) has no {name!r}.", hint or "Check the name.") from cause


def subclass(base: type[Kind], point: EntryPoint, error: type[SparsifinerError]) -> type[Kind]:
    """Import the class of an entry point that extends `base`.

    Raises:
        SparsifinerError: `error`: it cannot be imported, or does not extend `base`.
    """
    kind = import_object(point, f"Reinstall {point.name}.", error)
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise error(
            f"{point.value} is not a subclass of {base.__name__}.", f"Report it to the authors of {point.name}."
        )
    return kind
