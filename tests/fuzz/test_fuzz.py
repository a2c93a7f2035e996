"""A few tries of each quick class, and that the options which are tried exist."""

from __future__ import annotations

import random
from pathlib import Path

import click
import pytest

from sparsifiner_edge.cli import main as program
from tests.fuzz import materials
from tests.fuzz.__main__ import TARGETS
from tests.fuzz.harness import Try, attempt
from tests.fuzz.others import USAGES
from tests.once import Once

QUICK = ("golden", "model", "manifest", "injection", "settings", "usage")


@pytest.mark.everything
@pytest.mark.parametrize("name", QUICK)
def test_nothing_hostile_gets_through(name: str, once: Once, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = once("good", lambda folder: materials.make(folder, ("plain", "keys", "bundle", "images", "results")))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = {}
    for number in range(1_000_000, 1_000_015):  # Others than a run of the benchmark begins with.
        found[number] = attempt(TARGETS[name], Try(random.Random(f"{name}{number}"), number, good, tmp_path))
    assert not any(found.values()), found


def test_the_options_that_are_tried_exist() -> None:
    for line, options in USAGES.items():
        command: click.Command | None = program.cli
        for word in line.split():
            if isinstance(command, click.Group):
                command = command.get_command(click.Context(command), word)
        assert command is not None
        known = {name for parameter in command.params for name in parameter.opts}
        assert set(options.split()) <= known, line
