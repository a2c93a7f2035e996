"""Results of public functions as plain JSON values, as in files and `--json`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import msgspec

from sparsifiner_edge.records import write_record


def _plain(module: str, name: str) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        return write_record(getattr(importlib.import_module(module, "sparsifiner_edge"), name)(*arguments, **options))

    return call


profile_bundle = _plain("tests.flat", "profile_bundle")
estimate_bundle = _plain(".profiles.estimate", "estimate_bundle")
evaluate_student = _plain("tests.flat", "evaluate_student")
write_report = _plain(".report", "write_report")
energy = _plain(".profiles.sensors.energy", "energy")
conditions = _plain(".profiles.sensors.conditions", "conditions")
read_result = _plain(".results", "read_result")
machine = _plain(".machine", "machine")
environment = _plain(".machine", "environment")


def examine() -> Any:
    """Return what `doctor --json` prints; a missing library is null."""
    from sparsifiner_edge.doctor import examine

    return msgspec.to_builtins(examine())
