"""Declared types read from JSON or TOML by msgspec, with our own error messages."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar, get_args, get_origin

import msgspec

from sparsifiner_edge.errors import ArtifactError, SparsifinerError

Record = TypeVar("Record")


MISSING = "unavailable"
"""Key of the reason in files, and text in place of a missing number in tables."""


class Unavailable(msgspec.Struct, frozen=True):
    """Reason why a value could not be determined, in place of that value.

    In JSON it is `{"unavailable": "why"}`.
    """

    why: str = msgspec.field(name=MISSING)


if TYPE_CHECKING:
    Known: TypeAlias = Record | Unavailable
else:

    class _AnyInstance(type):
        def __instancecheck__(cls, other):
            return True

    class Known(Generic[Record], metaclass=_AnyInstance):
        """Record, or the reason why there is none (msgspec reads a union of records only if each has a tag)."""


_PLACE = re.compile(r" - at `(?:key(?:` in `| in ))?\$(.*)`$")
_WORDS = {"array": "list", "object": "dict", "null": "null"}


def read_record(
    content: object, kind: type[Record], origin: object, fix: str, error: type[SparsifinerError] = ArtifactError
) -> Record:
    """Convert parsed content to a declared type.

    Args:
        content: Result of `json.loads` or `tomllib.loads`.
        kind: A msgspec.Struct or dataclass; it decides itself whether unknown fields are refused or ignored.
        origin: Source of the content, for messages.
        fix: What to do if the content does not fit.
        error: Class of the error to raise.

    Raises:
        SparsifinerError: `error`: a field is unknown, missing, of another type or out of range; the message names it,
            its value and what it must be. Or a text holds half of a surrogate pair.
    """
    try:
        return msgspec.convert(content, kind, dec_hook=_parse_value)
    except msgspec.ValidationError as cause:
        raise error(f"{origin}: {_explanation(content, str(cause))}.", fix) from cause
    except UnicodeEncodeError as cause:  # Half of a surrogate pair, which JSON can hold and UTF-8 cannot.
        raise error(f"{origin} holds a text that is not Unicode: {cause.reason}.", fix) from cause


def _parse_value(kind: Any, content: object) -> object:
    """Convert a `Known` value of a record."""
    if get_origin(kind) is not Known:
        raise NotImplementedError(f"{kind} cannot be read")
    is_missing = isinstance(content, dict) and content.keys() == {MISSING}
    try:
        return msgspec.convert(content, Unavailable if is_missing else get_args(kind)[0], dec_hook=_parse_value)
    except msgspec.ValidationError as error:  # Its path starts here; for any other error msgspec gives the whole path.
        raise ValueError(_explanation(content, str(error))) from error


def write_record(record: object) -> Any:
    """Convert a record to JSON-ready values; None is left out."""
    return _without_none(msgspec.to_builtins(record))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_none(child) for name, child in value.items() if child is not None}
    return [_without_none(child) for child in value] if isinstance(value, (list, tuple)) else value


def _explanation(content: object, message: str) -> str:
    """Rewrite msgspec's message.

    "Expected `int`, got `str` - at `$.preprocessing.size`" becomes "preprocessing.size is "4", not int".
    """
    match = _PLACE.search(message)
    place = match[1] if match else ""
    message = message[: match.start()] if match else message
    missing = re.fullmatch(r"Object missing required field `(.*)`", message)
    if missing:
        return f"{place}.{missing[1]}".lstrip(".") + " is missing"
    unknown = re.fullmatch(r"Object contains unknown field `(.*)`", message)
    if unknown:
        return "unknown key " + f"{place}.{unknown[1]}".lstrip(".")
    expected = re.match(r"Expected `([^`]*)`(.*)", message)
    words = message[:1].lower() + message[1:]
    if expected:
        kinds = " or ".join(_WORDS.get(kind, kind) for kind in expected[1].split(" | "))
        more = "" if expected[2].startswith(", got") else expected[2]
        words = f"not {kinds}{more}".replace(" matching regex ", " of the form ")
        words = words.replace(r" of the form '\\S'", " with something in it")
    outer, entry, _ = place.partition("[...]")  # For the values of a dict, the path does not name the key.
    if entry:
        return f"an entry of {outer.lstrip('.') or 'it'} is {words}"
    return f"{place.lstrip('.') or 'it'} is {_value(content, place)}, {words}"


def _value(content: Any, place: str) -> str:
    """Return the value at msgspec's path as JSON, cut short."""
    for name, number in re.findall(r"\.([^.\[]+)|\[(\d+)\]", place):
        content = content[int(number)] if number else content[name]
    return f"{json.dumps(content, default=str):.60}"
