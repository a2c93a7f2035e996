"""Exceptions of this package. Each says what happened, which value, and what to do.

The command line prints the message and exits with `exit_code`: 2 for unusable input, 1 for a failed gate.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from sparsifiner_edge.text import printable

_LONGEST = 2000
"""Maximum number of characters of a message or fix."""


class SparsifinerError(Exception):
    """Base class of every error that a user can cause.

    Args:
        what: One sentence with the offending value. It may contain untrusted names and values: they are escaped here,
            once for every error (see `text.printable`).
        fix: What to do about it, printed on its own line.
    """

    exit_code = 2

    def __init__(self, what: str, fix: str = "") -> None:
        self.what = printable(what, _LONGEST)
        self.fix = printable(fix, _LONGEST)
        super().__init__(f"{self.what}\n  {self.fix}" if fix else self.what)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the message and the fix, so that errors can cross processes whatever their own arguments are."""
        return rebuilt, (type(self), self.what, self.fix)


def rebuilt(kind: type[SparsifinerError], what: str, fix: str) -> SparsifinerError:
    """Rebuild an error that another process raised."""
    error = kind.__new__(kind)
    SparsifinerError.__init__(error, what, fix)
    return error


class ConfigError(SparsifinerError):
    """A setting is out of range or does not fit the model."""


class UnsupportedModelError(SparsifinerError):
    """A model is unknown or its architecture cannot be made sparse. The message lists the reasons."""


class WeightsError(SparsifinerError):
    """A weights file is corrupt or belongs to another architecture."""


class ArtifactError(SparsifinerError):
    """A sparse model, bundle or result is corrupt, altered, of another version, or from another program."""


class ImageError(SparsifinerError):
    """An image or a folder of images cannot be read."""


class MissingExtraError(SparsifinerError):
    """An optional dependency is not installed. The message holds the pip command."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed, and is needed for this.", f"Install it: {pip_install(extra)}")


def pip_install(extras: str) -> str:
    """Return the pip command that installs extras such as "train,cpu" from a checkout; the package is on no index."""
    place = Path(__file__).resolve().parents[1]
    known = (place / "pyproject.toml").is_file()
    return f"pip install {shlex.quote(f'{place}[{extras}]')}" if known else f'pip install ".[{extras}]" in a checkout'


class BackendError(SparsifinerError):
    """A backend is unavailable, or refused the model or the input."""


class SlowKernelsWarning(UserWarning):
    """Operators run slower than necessary, because their kernels are missing or do not fit the installed OpenVINO.

    The message says how to fix it.
    """


class GateError(SparsifinerError):
    """A numerical or accuracy gate failed. Nothing was written."""

    exit_code = 1
