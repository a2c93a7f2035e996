"""Code that others add: by the entry points of installed packages, or as "package.module:object"."""

from __future__ import annotations

import functools
import importlib
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from sparsifiner_edge.errors import ConfigError, SparsifinerError
from sparsifiner_edge.text import one_line

Kind = TypeVar("Kind")


def plugins(group: str) -> dict[str, EntryPoint]:
    """What installed packages name in a group of entry points; none of it is imported."""
    return {point.name: point for point in entry_points(group=group)}


def import_object(place: EntryPoint | str, fix: str, error: type[SparsifinerError] = ConfigError) -> Any:
    """The object that an entry point stands for, or "package.module:object" does.

    Raises:
        SparsifinerError: `error`, with this `fix`: it cannot be imported, for any reason: it is others' code.
    """
    try:
        if isinstance(place, EntryPoint):
            return place.load()
        module, _, name = place.partition(":")
        return functools.reduce(getattr, name.split("."), importlib.import_module(module))
    except Exception as cause:
        text = place if isinstance(place, str) else place.value
        raise error(f"{text} cannot be imported: {type(cause).__name__}: {one_line(cause)}.", fix) from cause


def subclass(base: type[Kind], point: EntryPoint, error: type[SparsifinerError]) -> type[Kind]:
    """The class of this base that an entry point stands for.

    Raises:
        SparsifinerError: `error`: it cannot be imported, or is none.
    """
    kind = import_object(point, f"Reinstall {point.name}.", error)
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise error(f"{point.value} is no class of {base.__name__}.", f"Report it to the authors of {point.name}.")
    return kind
