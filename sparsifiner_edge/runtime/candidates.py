"""What carries out sparse attention in an engine is measured where it runs: sparse where it is faster, dense elsewhere.

Each candidate is built by a process of its own, with a time limit of its own: one that fails, hangs or dies leaves the
others. The fastest that passes the golden check is kept; what the others took, or why they are none, is recorded.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from sparsifiner_edge.bundle.engines import DENSE, Candidate, Details
from sparsifiner_edge.errors import GateError, SparsifinerError
from sparsifiner_edge.files import io_errors
from sparsifiner_edge.progress import Progress, prefixed
from sparsifiner_edge.runtime.backend import Candidates, Job
from sparsifiner_edge.runtime.build_worker import run_job


def build_fastest(job: Job, candidates: Candidates, timeout_s: float, progress: Progress | None) -> Details:
    """Build every candidate, and leave the fastest that gives the golden output at `job.output`.

    Args:
        timeout_s: seconds that each candidate may take.

    Returns:
        What is known of the one that is kept; under `candidates` all of them, those left out too.

    Raises:
        SparsifinerError: not one of them could be built, or not one gives the golden output.
    """
    names, output = candidates.names, Path(job.output)
    left_out = {name: Candidate(failed=f"not built: {why}") for name, why in candidates.left_out.items()}
    if len(names) == 1:
        details = run_job(msgspec.structs.replace(job, candidate=names[0]), timeout_s, progress)
        return msgspec.structs.replace(details, candidates=left_out or None)
    found: dict[str, Candidate] = {}
    built: dict[str, Details] = {}
    failures: list[SparsifinerError] = []
    for name in names:
        one = msgspec.structs.replace(job, candidate=name, output=str(_file(output, name)), timed=True)
        try:
            built[name] = run_job(one, timeout_s, progress and prefixed(progress, f"{name}: "))
            found |= built[name].candidates or {}
        except SparsifinerError as error:
            failures.append(error)
            found[name] = Candidate(failed=error.what)
    passed = {n: c.compute_ms for n, c in found.items() if c.compute_ms is not None and isinstance(c.golden, dict)}
    if not passed:
        raise failures[0] if failures else GateError(str(found[names[0]].golden), "Export the bundle again.")
    best = min(passed, key=passed.__getitem__)
    with io_errors(output):
        _file(output, best).replace(output)
        for name in names:
            _file(output, name).unlink(missing_ok=True)
    return msgspec.structs.replace(built[best], candidates=found | left_out)


def _file(output: Path, name: str) -> Path:
    return output.with_name(f"{output.name}.{name}")


def verdict(details: Details) -> list[str]:
    """Lines that say what each candidate took, which was kept, and why."""
    if not details.candidates:
        return []
    lines = []
    for name, one in details.candidates.items():
        took = f"{one.compute_ms:.3f} ms" if one.compute_ms is not None else str(one.failed)
        refused = f"; not kept: {one.golden}" if isinstance(one.golden, str) else ""
        lines.append(f"{name}: {took}{refused}{f' ({one.warning})' if one.warning else ''}")
    times = {name: one.compute_ms for name, one in details.candidates.items() if one.compute_ms is not None}
    own = times.get(details.kernels or "")
    if own is None:
        return [*lines, f"kept: {details.kernels}; nothing was measured"]
    faster = [name for name, ms in times.items() if ms < own]
    why = f"although {' and '.join(faster)} took less: see there" if faster else "the fastest"
    advice = "; for dense attention export the student with --keep 1" if DENSE in faster else ""
    return [*lines, f"kept: {details.kernels}, {why}{advice}"]
