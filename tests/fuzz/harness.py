"""Common parts of all fuzz targets: the command line in this process, a time limit and the failure criteria."""

from __future__ import annotations

import contextlib
import json
import random
import re
import shutil
import signal
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from sparsifiner_edge.cli.main import main
from tests.commands import handlers_kept

LIMIT_S = 30
_RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that must never reach a terminal or a line of JSON unescaped."""


class FailureError(Exception):
    """A try that reveals a defect."""


class HangError(BaseException):
    """A try that exceeds the time limit."""


class Try(NamedTuple):
    """One try: its random generator, a read-only folder of valid examples and a working folder.

    The examples are those of `tests.made`; the working folder exists as long as its class runs.
    """

    rng: random.Random
    number: int
    good: Path
    work: Path

    def words(self, line: str) -> list[str]:
        """Return the arguments of a command, with the folders inserted for {good} and {work}."""
        return words(line, self.good, self.work)

    def copied(self, name: str, to: str = "subject") -> Path:
        """Copy a valid folder, replacing the copy of the previous try."""
        shutil.rmtree(self.work / to, ignore_errors=True)
        return Path(shutil.copytree(self.good / name, self.work / to))


class Target(NamedTuple):
    """A class of tries: the number in a full run, one try (raises on failure), and names of the materials."""

    tries: int
    attempt: Callable[[Try], None]
    needs: tuple[str, ...] = ()


def words(line: str, good: Path, work: Path) -> list[str]:
    return [word.replace("{good}", str(good)).replace("{work}", str(work)) for word in line.split()]


def command(*arguments: Any) -> str:
    """Run the command line in this process and return its output.

    Raises:
        FailureError: The exit code is unknown, or the output has a traceback, control characters or invalid JSON.
    """
    # A command may write directly to the file descriptor, bypassing Python.
    kept = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
    with tempfile.TemporaryFile("w+", **kept) as out, tempfile.TemporaryFile("w+", **kept) as err:
        with handlers_kept(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main([str(argument) for argument in arguments])
            except SystemExit as left:
                code = left.code
        for file in (out, err):
            file.seek(0)
        printed, complained = out.read(), err.read()
    said = printed + complained
    if not isinstance(code, int) or code not in (0, 1, 2):
        raise FailureError(f"exit code {code}: {complained[:300]}")
    if "Traceback" in said:
        raise FailureError(said[-500:])
    if found := _RAW.search(said):
        raise FailureError(f"raw {found[0]!r} in {said[max(0, found.start() - 60) : found.end() + 20]!r}")
    if "--json" in map(str, arguments) and code == 0:
        strict_json(printed)
    return said


def strict_json(text: str) -> Any:
    """Parse JSON without the extra numbers that Python's reader accepts; otherwise raise FailureError."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    try:
        return json.loads(text, parse_constant=refuse)
    except ValueError as error:
        raise FailureError(f"no JSON ({error}): {text[:200]}") from error


def attempt(target: Target, one: Try) -> str | None:
    """Run one try; return the failure, or None."""

    def ring(*_: object) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(LIMIT_S)
    try:
        target.attempt(one)
    except HangError:
        return f"took more than {LIMIT_S} s"
    except FailureError as error:
        return str(error)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} in {Path(place.filename).name}:{place.lineno}: {str(error)[:200]}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return None
