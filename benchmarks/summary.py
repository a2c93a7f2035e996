"""Writes benchmark results: a summary for git, and all samples in a folder that git ignores.

A summary is a result without samples; `results.read_result` reads it. Figures have five digits, an interval is value,
low and high, and the method of the intervals is given once, in `method.intervals` ("95%: Student's t, 33 samples"). The
complete result is in the folder `raw` next to it, only on the machine that measured it.
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
"""Maximum lines of a summary; digits of its figures; characters up to which nested values stay on one line."""
BOUNDS = {"value", "low", "high"}


def write_summary(path: Path, result: Result, *, statistics: Any = None, method: Any = None) -> None:
    """Write a summary and, if there are samples, the complete result into `raw`; folders are made.

    Args:
        path: Path of the summary, `NAME.json`.
        statistics: Shorter replacement of the result's statistics.
        method: Shorter replacement of the result's method.

    Raises:
        ValueError: The summary is longer than `LINES`.
        ArtifactError: See `write_result`.
    """
    raw_of(path).parent.mkdir(parents=True, exist_ok=True)
    if result.samples:
        write_result(raw_of(path), result)
    text = summary_of(result, path.name, statistics=statistics, method=method)
    if text.count("\n") > LINES:
        raise ValueError(f"{path}: a summary of {text.count(chr(10))} lines; {LINES} at most: pass shorter statistics")
    write_text(path, text)


def summary_of(result: Result, name: str, *, statistics: Any = None, method: Any = None) -> str:
    """Return the text of the summary."""
    intervals: set[str] = set()
    short = _rounded(write_record(statistics or result.statistics), intervals)
    said = _rounded(write_record(method or result.method), intervals)
    told = {"intervals": sorted(intervals)} if intervals else {}
    samples = {"raw": f"raw/{name}, where it was measured"} if result.samples else {}
    content = write_record(replace(result, samples=samples, statistics=short, method=said | told))
    # The machine's own folders mean nothing to other readers.
    content["command"] = [Path(word).name if word.startswith("/") else word for word in content["command"]]
    return laid_out(content) + "\n"


def said(figure: dict[str, Any], digits: int = 2, sign: str = "") -> str:
    """Format a figure and its interval for people; "?" if rounds gave no bound."""
    value, low, high = (
        f"{x:{sign}.{digits}f}" if isinstance(x, float) else "?" for x in (figure[k] for k in ("value", "low", "high"))
    )
    return f"{value} ({low} to {high})"


def brief(record: dict[str, Any]) -> dict[str, Any]:
    """Return the short entries of a record, without a profile's conditions or a training's recipe."""
    return {name: x for name, x in record.items() if len(json.dumps(x)) < 2 * SHORT}


def raw_of(path: Path) -> Path:
    """Return the path of a summary's samples."""
    return path.parent / "raw" / path.name


def read_raw(path: Path) -> Result | None:
    """Return the complete result of a run on this machine; None, with a message, if only the summary exists."""
    raw = raw_of(path)
    if raw.is_file():
        return read_result(raw)
    if path.is_file():
        click.echo(f"{raw} is missing, so what {path.name} says of an earlier run is not gone on from", err=True)
    return None


def _rounded(x: Any, intervals: set[str]) -> Any:
    """Round figures; the method of an interval goes into `intervals`."""
    if isinstance(x, float):
        return round(x) if abs(x) >= 10**DIGITS else float(f"{x:.{DIGITS}g}")
    if isinstance(x, dict):
        if x.keys() >= BOUNDS | {"confidence", "interval"}:
            intervals.add(f"{x['confidence']:.0%}: {x['interval']}")
            x = {name: y for name, y in x.items() if name not in ("confidence", "interval")}
        return {name: _rounded(y, intervals) for name, y in x.items()}
    return [_rounded(y, intervals) for y in x] if isinstance(x, (list, tuple)) else x


def laid_out(x: Any, indent: int = 0) -> str:
    """Return JSON with a row per line: a container of only figures, texts and intervals stays on one line."""
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
