"""What every try has in common: the command line in this process, a time limit, and what counts as a failure."""

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
"""What must never reach a terminal or a line of JSON as it is."""


class FailureError(Exception):
    """A try that shows a hole."""


class HangError(BaseException):
    """A try took too long."""


class Try(NamedTuple):
    """One try: its own randomness, a folder of good examples, read only (see `tests.made`), and one for whatever it
    makes, which lasts as long as the class.
    """

    rng: random.Random
    number: int
    good: Path
    work: Path

    def words(self, line: str) -> list[str]:
        """Arguments of a command, with both folders in the places of {good} and {work}."""
        return words(line, self.good, self.work)

    def copied(self, name: str, to: str = "subject") -> Path:
        """A copy of a good folder, in the place of the one of the try before."""
        shutil.rmtree(self.work / to, ignore_errors=True)
        return Path(shutil.copytree(self.good / name, self.work / to))


class Target(NamedTuple):
    """A class of tries: how many make a full run, one try (raises for a failure), and names of materials."""

    tries: int
    attempt: Callable[[Try], None]
    needs: tuple[str, ...] = ()


def words(line: str, good: Path, work: Path) -> list[str]:
    return [word.replace("{good}", str(good)).replace("{work}", str(work)) for word in line.split()]


def command(*arguments: Any) -> str:
    """The command line in this process: what it said.

    Raises:
        FailureError: an exit code that none of ours is, a traceback, characters that a terminal obeys, or JSON that is
            none.
    """
    # What a command writes may go past Python, to the descriptor.
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
    """JSON, and none of the numbers that Python's reader takes beyond it; else raises FailureError."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    try:
        return json.loads(text, parse_constant=refuse)
    except ValueError as error:
        raise FailureError(f"no JSON ({error}): {text[:200]}") from error


def attempt(target: Target, one: Try) -> str | None:
    """Carry out one try; what failed, or None."""

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
