"""Code that others add: by the entry points of installed packages, or as "package.module:object"."""

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


def plugins(group: str) -> dict[str, EntryPoint]:
    """What installed packages name in a group of entry points; none of it is imported."""
    return {point.name: point for point in entry_points(group=group)}


def import_object(place: EntryPoint | str, fix: str, error: type[SparsifinerError] = ConfigError) -> Any:
    """The object that an entry point stands for, or "package.module:object" does. The latter is looked for in the
    current folder too, behind all that is installed: no file there takes a library's place.

    Raises:
        SparsifinerError: `error`: it cannot be imported, for any reason: it is others' code; `fix`: if none is there.
    """
    here, (module, _, name) = "", (place.value if isinstance(place, EntryPoint) else place).partition(":")
    try:
        if isinstance(place, EntryPoint):
            module, name = place.module, place.attr or ""
        else:
            with contextlib.suppress(OSError):  # The current folder may be deleted.
                here = str(Path.cwd())
            if here and here not in sys.path and not getattr(sys.flags, "safe_path", False):
                sys.path.append(here)
        imported = importlib.import_module(module)
    except Exception as cause:
        if isinstance(cause, ModuleNotFoundError) and f"{module}.".startswith(f"{cause.name}."):
            hint = nearest(module, (path.stem for path in Path(here).glob("*"))) if here else ""
            what = f"There is no module {module!r}, looked for from {here or 'a package'}."
            raise error(what, f"{hint} {fix}".strip()) from cause
        what = f"{module} cannot be imported: {type(cause).__name__}: {one_line(cause)}."
        raise error(what, "Mend it, or install what it needs.") from cause
    try:
        return functools.reduce(getattr, filter(None, name.split(".")), imported)
    except AttributeError as cause:
        where, hint = getattr(imported, "__file__", None) or "a folder", nearest(name, vars(imported))
        raise error(f"{module} ({where}) has no {name!r}.", hint or "Check the name.") from cause


def subclass(base: type[Kind], point: EntryPoint, error: type[SparsifinerError]) -> type[Kind]:
    """The class of this base that an entry point stands for.

    Raises:
        SparsifinerError: `error`: it cannot be imported, or is none.
    """
    kind = import_object(point, f"Reinstall {point.name}.", error)
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise error(f"{point.value} is no class of {base.__name__}.", f"Report it to the authors of {point.name}.")
    return kind
