"""`sparsifiner-edge profile`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from msgspec.structs import replace

from sparsifiner_edge.bounds import MOST_SECONDS
from sparsifiner_edge.cli import common
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.execution import PRECISIONS
from sparsifiner_edge.records import Unavailable
from sparsifiner_edge.results import Quantity
from sparsifiner_edge.text import printable

if TYPE_CHECKING:
    from sparsifiner_edge.camera.pace import PaceResult
    from sparsifiner_edge.profiles.figures import ProfileResult


@click.command()
@common.bundle_argument
@common.execution_options
@click.option("--against", type=common.PATH, help="Another bundle: measure the ratio of the two.")
@click.option("--against-backend", help="What else runs that, on the CPU and in its own precision.")
@click.option("--against-precision", type=click.Choice(PRECISIONS), help="What it computes in, likewise.")
@common.threads_option
@click.option(
    "--seconds",
    type=common.FiniteRange(0, MOST_SECONDS, min_open=True),
    help="Minimum measuring time per bundle.  [default: 10]",
)
@click.option("--video", metavar="FILE|FOLDER", help="Instead: how BUNDLE keeps up with a camera that gives these.")
@click.option(
    "--rate", type=common.FiniteRange(0, 1000, min_open=True), help="Of --video: frames a second.  [default: 25]"
)
@click.option(
    "--deadline",
    metavar="MS",
    help="Of --video: until when a frame is answered, such as 40ms.  [default: when the next one comes]",
)
@click.option(
    "--no-stream",
    "stream",
    is_flag=True,
    flag_value=False,
    default=True,
    help="Of --video: compute every frame whole, though BUNDLE follows a stream.",
)
@common.fit_option
@common.region_option
@common.json_option
@common.result_option
def command(*, bundle: Path, as_json: bool, output: Path | None, **options: Any) -> None:
    """Measure latency, throughput, energy, memory and layers of BUNDLE, each bundle in a process of its own.

    With --video: how many frames of a camera are answered too late, or never.
    """
    import sparsifiner_edge as se

    of_video = {name: options.pop(name) for name in ("video", "rate", "deadline", "stream", "fit", "region")}
    if of_video["video"] is not None:
        _camera(bundle, of_video, options, as_json, output)
        return
    for name, value in of_video.items():
        if value not in (None, True):
            raise ConfigError(f"--{name if name != 'stream' else 'no-stream'} is for a camera.", "Give --video too.")
    other = {name: value for name in ("backend", "precision") if (value := options.pop(f"against_{name}"))}
    groups = common.group(options, execution=se.Execution, options=se.ProfileOptions)
    if other:
        of = {"precision": "auto", "provider": "cpu"} if "backend" in other else {}
        groups["against_execution"] = replace(groups["execution"], **of | other)
    with common.progress_bar("starting") as progress:
        result = se.profile_bundle(bundle, progress=progress, **groups)
    common.print_result(result, as_json, _print, output)


def _camera(bundle: Path, video: dict[str, Any], options: dict[str, Any], as_json: bool, output: Path | None) -> None:
    import sparsifiner_edge as se

    for name in ("against", "against_backend", "against_precision"):
        if options.pop(name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')} is not for a camera.", "Measure one after the other.")
    written = video.pop("deadline")
    try:
        video["deadline_ms"] = None if written is None else float(written.removesuffix("ms"))
    except ValueError:
        raise ConfigError(f"--deadline is {written!r}.", "Give milliseconds, such as 40ms.") from None
    run = {name: video.pop(name) for name in ("stream", "fit", "region")}
    timed = {name: value for name in ("seconds",) if (value := options.pop(name)) is not None}
    timed |= {name: value for name, value in video.items() if value is not None}
    with common.progress_bar("decoding") as progress:
        settings = se.RunOptions(**common.group(options | run, execution=se.Execution))
        result = se.profile_camera(bundle, options=settings, progress=progress, **timed)
    common.print_result(result, as_json, _print_camera, output)


def _print_camera(result: PaceResult) -> None:
    """What was late; how old answers were; energy."""
    method, figures = result.method, result.statistics
    rows = [
        [name, *(f"{value:.1f}" for value in marks.values())]
        for name, marks in (("age of an answer, ms", figures.age_ms), ("of that the answering, ms", figures.infer_ms))
    ]
    title = f"{printable(method.video)}, {figures.frames} frames at {method.rate:g} a second"
    common.print_table(title, ["", *figures.age_ms], rows)
    click.echo(f"Missed: {figures.missed:.1%}, not answered within {method.deadline_ms:g} ms.")
    click.echo(f"Dropped for a newer one: {figures.dropped} of them.")
    energy = figures.energy
    if isinstance(energy, Unavailable):
        click.echo(f"Energy: not measured: {printable(energy.why, 300)}")
    elif isinstance(joules := energy.gross_j_per_inference, Quantity):
        click.echo(f"Energy: {joules.value * 1e3:.1f} mJ a frame that came, idle time included ({energy.sensor}).")
    runtime, how = method.runtime, "as a stream" if method.stream else method.why_whole or "every frame whole"
    ran = f"{runtime.backend}, {runtime.precision}, kernels: {runtime.kernels}"
    click.echo(f"Ran on {printable(ran, 2000)}, {how}.")


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
