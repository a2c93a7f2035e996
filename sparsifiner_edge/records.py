"""Declared types read from JSON or TOML by msgspec, with error texts of our own."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar, get_args, get_origin

import msgspec

from sparsifiner_edge.errors import ArtifactError, SparsifinerError

Record = TypeVar("Record")


MISSING = "unavailable"
"""The word in files: key of a reason, or what stands in a column of numbers where one is missing."""


class Unavailable(msgspec.Struct, frozen=True):
    """What stands in place of a value that could not be found: `why`. In JSON `{"unavailable": "why"}`."""

    why: str = msgspec.field(name=MISSING)


if TYPE_CHECKING:
    Known: TypeAlias = Record | Unavailable
else:

    class _AnyInstance(type):
        def __instancecheck__(cls, other):
            return True

    class Known(Generic[Record], metaclass=_AnyInstance):
        """A record, or why there is none. (msgspec reads no union of two records unless each names itself.)"""


_PLACE = re.compile(r" - at `(?:key(?:` in `| in ))?\$(.*)`$")
_WORDS = {"array": "list", "object": "dict", "null": "null"}


def read_record(
    content: object, kind: type[Record], origin: object, fix: str, error: type[SparsifinerError] = ArtifactError
) -> Record:
    """What was parsed, as a declared type.

    Args:
        content: of `json.loads` or `tomllib.loads`.
        kind: a msgspec.Struct or dataclass; whether unknown fields are refused or ignored is its own setting.
        origin: where the content is from, for messages. fix: what to do if it does not fit.
        error: raised.

    Raises:
        SparsifinerError: `error`: a field is unknown, missing, of another type or out of range; names it, its value,
            and what it must be. Or a text holds half of a surrogate pair.
    """
    try:
        return msgspec.convert(content, kind, dec_hook=_parse_value)
    except msgspec.ValidationError as cause:
        raise error(f"{origin}: {_explanation(content, str(cause))}.", fix) from cause
    except UnicodeEncodeError as cause:  # Half a character, which JSON can hold and UTF-8 cannot.
        raise error(f"{origin} holds a text that is not Unicode: {cause.reason}.", fix) from cause


def _parse_value(kind: Any, content: object) -> object:
    """A `Known` of some record."""
    if get_origin(kind) is not Known:
        raise NotImplementedError(f"{kind} cannot be read")
    is_missing = isinstance(content, dict) and content.keys() == {MISSING}
    try:
        return msgspec.convert(content, Unavailable if is_missing else get_args(kind)[0], dec_hook=_parse_value)
    except msgspec.ValidationError as error:  # Its path starts here; of any other error msgspec gives the whole path.
        raise ValueError(_explanation(content, str(error))) from error


def write_record(record: object) -> Any:
    """JSON-ready dicts, lists, texts and numbers; what is None is left out."""
    return _without_none(msgspec.to_builtins(record))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_none(child) for name, child in value.items() if child is not None}
    return [_without_none(child) for child in value] if isinstance(value, (list, tuple)) else value


def _explanation(content: object, said: str) -> str:
    """ "preprocessing.size is "4", not int" for msgspec's "Expected `int`, got `str` - at `$.preprocessing.size`"."""
    match = _PLACE.search(said)
    place = match[1] if match else ""
    said = said[: match.start()] if match else said
    missing = re.fullmatch(r"Object missing required field `(.*)`", said)
    if missing:
        return f"{place}.{missing[1]}".lstrip(".") + " is missing"
    unknown = re.fullmatch(r"Object contains unknown field `(.*)`", said)
    if unknown:
        return "unknown key " + f"{place}.{unknown[1]}".lstrip(".")
    expected = re.match(r"Expected `([^`]*)`(.*)", said)
    words = said[:1].lower() + said[1:]
    if expected:
        kinds = " or ".join(_WORDS.get(kind, kind) for kind in expected[1].split(" | "))
        more = "" if expected[2].startswith(", got") else expected[2]
        words = f"not {kinds}{more}".replace(" matching regex ", " of the form ")
        words = words.replace(r" of the form '\\S'", " with something in it")
    outer, entry, _ = place.partition("[...]")  # Of a dict's values the path does not say which.
    if entry:
        return f"an entry of {outer.lstrip('.') or 'it'} is {words}"
    return f"{place.lstrip('.') or 'it'} is {_value(content, place)}, {words}"


def _value(content: Any, place: str) -> str:
    """The value at msgspec's path, as JSON, cut short."""
    for name, number in re.findall(r"\.([^.\[]+)|\[(\d+)\]", place):
        content = content[int(number)] if number else content[name]
    return f"{json.dumps(content, default=str):.60}"
