"""The result file: what was measured, on which machine and software, every raw sample, and the statistics.

It is one JSON object with the fields of `Result`. Names of fields contain units (`latency_ms`). A value that could not
be determined gives the reason (`records.Unavailable`); it is never null.
"""

from __future__ import annotations

import datetime
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import msgspec
from msgspec import Meta

from sparsifiner_edge.artifacts import read_json
from sparsifiner_edge.bounds import flaw
from sparsifiner_edge.errors import ArtifactError
from sparsifiner_edge.files import write_text
from sparsifiner_edge.machine import Environment, Machine, environment, machine
from sparsifiner_edge.records import Unavailable, read_record, write_record
from sparsifiner_edge.text import dump_json

RESULT_SCHEMA = 4
"""Version of the format of result files."""
Kind = Literal[
    "profile",
    "evaluation",
    "comparison",
    "demo",
    "estimate",
    "search",
    "robustness",
    "explanation",
    "stream",
    "pace",
]
MEASURE_AGAIN = "Measure again: sparsifiner-edge profile, evaluate, explain, estimate or optimize, with -o."
"""Fix for a result file that cannot be used."""
_Time = Annotated[str, Meta(pattern=r"^[0-9]{4}(-[0-9]{2}){2}T([0-9]{2}:){2}[0-9]{2}Z\Z")]
"""Time in UTC, such as 2025-01-31T12:00:00Z."""


class Quantity(msgspec.Struct, frozen=True):
    """Value with its interval and the method of the interval, in the unit of the field that holds it."""

    value: float
    low: float | Unavailable
    high: float | Unavailable
    confidence: float
    interval: str

    def times(self, factor: float) -> Quantity:
        """Return the quantity multiplied by a factor, as for another unit."""
        low, high = (bound * factor if isinstance(bound, float) else bound for bound in (self.low, self.high))
        return Quantity(self.value * factor, low, high, self.confidence, self.interval)


class Subject(msgspec.Struct, frozen=True, kw_only=True):
    """Subject of a measurement.

    Attributes:
        role: "subject", "against" or "teacher".
        kind: "bundle" or another artifact.
        path: Path as given.
        sha256: Hash of the file, or of a bundle's manifest.
        to_float32: For an int8 bundle, its cosine to the float32 file, as export measured it.
    """

    role: str | None = None
    kind: str | None = None
    path: str | Unavailable
    name: str | None = None
    sha256: str | Unavailable
    to_float32: float | None = None


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def command_line() -> list[str]:
    """Return the command that was typed, with the program's path relative to the working directory or its name."""
    program = os.path.relpath(sys.argv[0])
    return [Path(program).name if program.startswith("..") else program, *sys.argv[1:]]


class Result(msgspec.Struct, frozen=True):
    """Result of a measurement; each kind declares the types of `method`, `samples` and `statistics`.

    Attributes:
        subjects: Measured artifacts. The first one of a comparison is the one that is evaluated.
        method: Method of the measurement, in enough detail to repeat it.
        samples: Every raw sample.
        statistics: Values derived from the samples, with their intervals.
        created: Time in UTC.
        command: Command that was typed.
    """

    kind: Kind
    subjects: Annotated[list[Subject], Meta(min_length=1)]
    method: Any
    samples: Any
    statistics: Any
    schema_version: int = RESULT_SCHEMA
    created: _Time = msgspec.field(default_factory=_now)
    command: list[Any] = msgspec.field(default_factory=command_line)
    machine: Machine = msgspec.field(default_factory=machine)
    environment: Environment = msgspec.field(default_factory=environment)


Form = TypeVar("Form", bound=Result)


def check_result(content: dict[str, Any], origin: object, form: type[Form]) -> Form:
    """Convert the JSON of a result to a record.

    Raises:
        ArtifactError: A field is missing, mistyped, null, NaN or infinite, or too deeply nested; the message names it.
    """
    for name in Result.__struct_fields__:
        if name not in content:
            _refuse(origin, f"{name} is missing")
    for name in ("method", "samples", "statistics"):
        if not isinstance(content[name], dict):
            _refuse(origin, f"{name} is {content[name]!r:.60}, not dict")
    # A score may be undefined for an image, such as AUROC without an object.
    scored = content["kind"] in ("evaluation", "robustness")
    defect = flaw({**content, "samples": {}}, nulls=False) or flaw({"samples": content["samples"]}, nulls=scored)
    if defect is not None:
        _refuse(origin, defect)
    return read_record(content, form, origin, MEASURE_AGAIN)


def _refuse(origin: object, problem: str) -> NoReturn:
    raise ArtifactError(f"{origin}: {problem}.", MEASURE_AGAIN)


def write_result(path: Path, result: Result) -> None:
    """Write a result completely or not at all.

    Raises:
        ArtifactError: The result does not fit the schema, holds NaN or infinity, or cannot be written.
    """
    try:
        content = write_record(result)
        text = dump_json(content)
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"{path}: the result cannot be JSON: {error}.", "Report this as a bug.") from error
    check_result(content, path, Result)
    write_text(path, text)


def read_result(path: Path, form: type[Form] = Result) -> Form:  # type: ignore[assignment]
    """Read and check a result.

    Args:
        path: File that `write_result` wrote.
        form: Record to return. `Result` checks only the common fields, as for benchmarks. The class of a kind checks
            all fields.

    Raises:
        ArtifactError: The file is missing, not a regular file, not JSON or of another version, or `check_result`
            refuses it.
    """
    return check_result(read_json(path, RESULT_SCHEMA, MEASURE_AGAIN), path, form)
