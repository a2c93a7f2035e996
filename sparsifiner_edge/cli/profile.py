"""`sparsifiner-edge profile`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from msgspec.structs import replace

from sparsifiner_edge.bounds import MOST_SECONDS
from sparsifiner_edge.cli import common
from sparsifiner_edge.execution import PRECISIONS
from sparsifiner_edge.text import printable

if TYPE_CHECKING:
    from sparsifiner_edge.profiles.figures import ProfileResult


@click.command()
@common.bundle_argument
@common.execution_options
@click.option("--against", type=common.PATH, help="Another bundle: measure the ratio of the two.")
@click.option("--against-backend", help="What else runs that, on the CPU and in its own precision.")
@click.option("--against-precision", type=click.Choice(PRECISIONS), help="What it computes in, likewise.")
@common.threads_option
@click.option("--seconds", type=common.FiniteRange(0, MOST_SECONDS, min_open=True),
              help="Minimum measuring time per bundle.  [default: 10]")  # fmt: skip
@common.json_option
@common.result_option
def command(*, bundle: Path, as_json: bool, output: Path | None, **options: Any) -> None:
    """Measure latency, throughput, energy, memory and layers of BUNDLE, each bundle in a process of its own."""
    import sparsifiner_edge as se

    other = {name: value for name in ("backend", "precision") if (value := options.pop(f"against_{name}"))}
    groups = common.group(options, execution=se.Execution, options=se.ProfileOptions)
    if other:
        of = {"precision": "auto", "provider": "cpu"} if "backend" in other else {}
        groups["against_execution"] = replace(groups["execution"], **of | other)
    with common.progress_bar("starting") as progress:
        result = se.profile_bundle(bundle, progress=progress, **groups)
    common.print_result(result, as_json, _print, output)


def _print(result: ProfileResult) -> None:
    """Remarks first, as on the page."""
    for subject, figures in zip(result.subjects, result.statistics.sides(), strict=True):
        chosen = result.method.runtime[str(subject.role)].chosen
        remarks = [f"{flag.flag}: {flag.what}. {flag.do}" for flag in figures.flags]
        for remark in remarks if chosen is None else (chosen, *remarks):
            click.echo(f"{printable(Path(str(subject.path)).name)}: {printable(remark, 2000)}")
    for problem in result.method.problems:
        click.echo(f"Sensor: {printable(problem, 2000)}.")
    common.print_page(result)
