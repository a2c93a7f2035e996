"""Reading TOML that a user or a stranger wrote: boards, recipes, values on the command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from sparsifiner_edge.bounds import flaw
from sparsifiner_edge.errors import ArtifactError, ConfigError
from sparsifiner_edge.files import read_bytes

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_TOML = 1 << 15
"""Bytes; the largest file of ours has 4,000. Readers take time that grows with the square of the parts of a name."""


def read_toml(path: Path, fix: str) -> Any:
    """The content of a TOML file: a dict of whatever stands there; see `records.read_record`.

    Args:
        path: the file, or a link to it.
        fix: what to do where it is none, for the message.

    Raises:
        ConfigError: missing, no regular file, too large, no UTF-8, or see `parse_toml`.
    """
    try:
        text = read_bytes(path, MAX_TOML).decode("utf-8")
    except ArtifactError as error:
        why = error.what.removeprefix(f"{path} ").removeprefix("cannot be read: ")
        raise ConfigError(f"{path} cannot be read: {why}", fix) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} cannot be read: {error}.", fix) from error
    return parse_toml(text, str(path), fix)


def parse_toml(text: str, origin: str, fix: str) -> Any:
    """The content of TOML text; `origin` and `fix` stand in messages.

    Raises:
        ConfigError: no TOML, a number of thousands of digits, or deep nesting. NaN and infinity are TOML: who
            takes a value says what it must be.
    """
    try:
        content = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # Each kind of damage has a ValueError of its own.
        raise ConfigError(f"{origin} is no TOML: {error}.", fix) from error
    found = flaw(content, finite=False)
    if found is not None:
        raise ConfigError(f"{origin}: {found}.", fix)
    return content
