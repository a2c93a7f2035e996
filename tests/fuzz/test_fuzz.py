"""A few tries of each quick class, and the harness itself: what it calls a failure is one."""

from __future__ import annotations

import random
from pathlib import Path

import click
import pytest

from sparsifiner_edge.cli import main as program
from tests.fuzz import materials
from tests.fuzz.harness import FailureError, Target, Try, attempt, command, strict_json
from tests.fuzz.others import USAGES
from tests.fuzz.targets import TARGETS
from tests.once import Once

QUICK = ("golden", "model", "signature", "manifest", "injection", "settings", "usage")


@pytest.mark.everything
@pytest.mark.parametrize("name", QUICK)
def test_nothing_hostile_gets_through(name: str, once: Once, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = once("good", lambda folder: materials.make(folder, ("plain", "signed", "bundle", "images", "results")))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = {}
    for number in range(1_000_000, 1_000_015):  # Others than a run of the benchmark begins with.
        found[number] = attempt(TARGETS[name], Try(random.Random(f"{name}{number}"), number, good, tmp_path))
    assert not any(found.values()), found


@pytest.mark.parametrize(
    ("said", "code", "wrong"),
    [
        ("fine", 0, None), ("fine", 3, "exit code 3"), ("a\x1b[31m", 0, "raw '\\x1b'"), ("a\x9b31m", 2, "raw '\\x9b'"),
        ("a\u202eb", 0, "raw '\\u202e'"), ("Traceback (most recent", 2, "Traceback"),
    ],
)  # fmt: skip
def test_the_harness_sees_it(said: str, code: int, wrong: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def spoilt() -> None:
        print(said)
        raise SystemExit(code)

    monkeypatch.setattr(program, "cli", spoilt)
    if wrong is None:
        assert command() == (code, f"{said}\n")
        return
    with pytest.raises(FailureError) as caught:
        command()
    assert wrong in str(caught.value)


def test_errors_hangs_and_numbers_that_json_has_not_are_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Try(random.Random(0), 0, tmp_path, tmp_path)

    def wrong(_: Try) -> None:
        raise KeyError("x")

    def hangs(_: Try) -> None:
        while True:
            pass

    assert attempt(Target(1, lambda _: None), one) is None
    assert "KeyError in test_fuzz.py" in str(attempt(Target(1, wrong), one))
    monkeypatch.setattr("tests.fuzz.harness.LIMIT_S", 1)
    assert "took more than" in str(attempt(Target(1, hangs), one))
    assert strict_json('{"a": [1, null]}') == {"a": [1, None]}
    for text in ("NaN", "[Infinity]", "{", ""):
        with pytest.raises(FailureError):
            strict_json(text)


def test_the_options_that_are_tried_exist() -> None:
    for line, options in USAGES.items():
        command: click.Command | None = program.cli
        for word in line.split():
            if isinstance(command, click.Group):
                command = command.get_command(click.Context(command), word)
        assert command is not None
        known = {name for parameter in command.params for name in parameter.opts}
        assert set(options.split()) <= known, line
