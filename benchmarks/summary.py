"""The one way a benchmark writes what it found: a summary that git keeps, and beside it all samples, which git ignores.

A summary is a result without samples; `results.read_result` reads it. Figures have five digits, an interval is value,
low and high, and how intervals were found stands once, in `method.intervals` ("95%: Student's t, 33 samples"). The
whole result lies in the folder `raw` beside it, on the machine that measured it alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from msgspec.structs import replace

from sparsifiner_edge.files import write_text
from sparsifiner_edge.records import MISSING, write_record
from sparsifiner_edge.results import Result, read_result, write_result

RESULTS = Path(__file__).parents[1] / "profiles" / "results"
LINES, DIGITS, SHORT = 250, 5, 160
"""A summary's most lines; the digits of its figures; characters below which what is nested stands on one line too."""
BOUNDS = {"value", "low", "high"}


def write_summary(path: Path, result: Result, *, statistics: Any = None, method: Any = None) -> None:
    """Write a summary, and the result whole into `raw` where it has samples; folders are made.

    Args:
        path: of the summary, `NAME.json`.
        statistics, method: what the summary says in the place of the result's, where those are long.

    Raises:
        ValueError: the summary is longer than `LINES`: say less of it.
        ArtifactError: see `write_result`.
    """
    raw_of(path).parent.mkdir(parents=True, exist_ok=True)
    if result.samples:
        write_result(raw_of(path), result)
    text = summary_of(result, path.name, statistics=statistics, method=method)
    if text.count("\n") > LINES:
        raise ValueError(f"{path}: a summary of {text.count(chr(10))} lines; {LINES} at most: pass shorter statistics")
    write_text(path, text)


def summary_of(result: Result, name: str, *, statistics: Any = None, method: Any = None) -> str:
    """The text of the summary."""
    intervals: set[str] = set()
    short = _rounded(write_record(statistics or result.statistics), intervals)
    said = _rounded(write_record(method or result.method), intervals)
    told = {"intervals": sorted(intervals)} if intervals else {}
    samples = {"raw": f"raw/{name}, where it was measured"} if result.samples else {}
    content = write_record(replace(result, samples=samples, statistics=short, method=said | told))
    # Of the machine's own folders nobody else learns anything.
    content["command"] = [Path(word).name if word.startswith("/") else word for word in content["command"]]
    return laid_out(content) + "\n"


def said(figure: dict[str, Any], digits: int = 2, sign: str = "") -> str:
    """A figure and its interval, for people; "?" where rounds gave no bound."""
    value, low, high = (
        f"{x:{sign}.{digits}f}" if isinstance(x, float) else "?" for x in (figure[k] for k in ("value", "low", "high"))
    )
    return f"{value} ({low} to {high})"


def brief(record: dict[str, Any]) -> dict[str, Any]:
    """Of a record what is short: of a profile's method not every condition, of a training not its recipe."""
    return {name: x for name, x in record.items() if len(json.dumps(x)) < 2 * SHORT}


def raw_of(path: Path) -> Path:
    """Where the samples of a summary lie."""
    return path.parent / "raw" / path.name


def read_raw(path: Path) -> Result | None:
    """The result whole, of a run on this machine; None, and it is said, where git brought the summary alone."""
    raw = raw_of(path)
    if raw.is_file():
        return read_result(raw)
    if path.is_file():
        click.echo(f"{raw} is missing, so what {path.name} says of an earlier run is not gone on from", err=True)
    return None


def _rounded(x: Any, intervals: set[str]) -> Any:
    """Figures with few digits; how an interval was found goes into `intervals`."""
    if isinstance(x, float):
        return round(x) if abs(x) >= 10**DIGITS else float(f"{x:.{DIGITS}g}")
    if isinstance(x, dict):
        if x.keys() >= BOUNDS | {"confidence", "interval"}:
            intervals.add(f"{x['confidence']:.0%}: {x['interval']}")
            x = {name: y for name, y in x.items() if name not in ("confidence", "interval")}
        return {name: _rounded(y, intervals) for name, y in x.items()}
    return [_rounded(y, intervals) for y in x] if isinstance(x, (list, tuple)) else x


def laid_out(x: Any, indent: int = 0) -> str:
    """JSON with a row a line: what holds figures, texts and intervals alone is not broken."""
    line, inner = json.dumps(x, ensure_ascii=False), " " * (indent + 1)
    parts = x.values() if isinstance(x, dict) else x if isinstance(x, list) else ()
    if all(map(_is_plain, parts)) or (indent and len(line) < SHORT):
        return line
    if isinstance(x, dict):
        rows = [f"{inner}{json.dumps(name, ensure_ascii=False)}: {laid_out(y, indent + 1)}" for name, y in x.items()]
        return "{\n" + ",\n".join(rows) + "\n" + " " * indent + "}"
    return "[\n" + ",\n".join(inner + laid_out(y, indent + 1) for y in x) + "\n" + " " * indent + "]"


def _is_plain(x: Any) -> bool:
    if isinstance(x, dict):
        return x.keys() <= BOUNDS or x.keys() == {MISSING}
    return not x or not isinstance(x, list)
