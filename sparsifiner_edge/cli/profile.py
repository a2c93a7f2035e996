"""`sparsifiner-edge profile`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from msgspec.structs import replace

from sparsifiner_edge.bounds import MOST_SECONDS
from sparsifiner_edge.cli import common
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.execution import COMPUTE_PRECISIONS
from sparsifiner_edge.records import Unavailable
from sparsifiner_edge.results import Quantity
from sparsifiner_edge.text import printable

if TYPE_CHECKING:
    from sparsifiner_edge.camera.pace import PaceResult
    from sparsifiner_edge.profiles.figures import ProfileResult


@click.command()
@common.bundle_argument
@common.execution_options
@click.option(
    "--against", type=common.PATH, help="Bundle to compare with: both are measured in turns, and the ratio is reported."
)
@click.option("--against-backend", help="Backend of the bundle to compare with, on the CPU.")
@click.option(
    "--against-compute-precision",
    type=click.Choice(COMPUTE_PRECISIONS),
    help="Compute precision of the bundle to compare with.",
)
@common.threads_option
@click.option(
    "--seconds",
    type=common.FiniteRange(0, MOST_SECONDS, min_open=True),
    help="Minimum measuring time per bundle in seconds.  [default: 10]",
)
@click.option(
    "--video",
    metavar="FILE|FOLDER",
    help="Measure how well the bundle keeps up with a camera that delivers these frames.",
)
@click.option(
    "--rate", type=common.FiniteRange(0, 1000, min_open=True), help="Frames per second of --video.  [default: 25]"
)
@click.option(
    "--deadline",
    metavar="MS",
    help="Time until a frame of --video must be answered, such as 40ms.  [default: one frame period]",
)
@click.option(
    "--no-stream",
    "stream",
    is_flag=True,
    flag_value=False,
    default=True,
    help="Run the ordinary model on every frame of --video, even if the bundle was exported with --stream.",
)
@common.stabilise_option
@common.fit_option
@common.region_option
@common.json_option
@common.result_option
def command(*, bundle: Path, as_json: bool, output: Path | None, **options: Any) -> None:
    """Measure latency, throughput, energy, memory and layers of BUNDLE, each bundle in its own process.

    With --video, measure how many frames of a camera are answered too late or dropped.
    """
    import sparsifiner_edge as se

    of_video = {
        name: options.pop(name) for name in ("video", "rate", "deadline", "stream", "stabilise", "fit", "region")
    }
    if of_video["video"] is not None:
        _camera(bundle, of_video, options, as_json, output)
        return
    for name, value in of_video.items():
        if value not in (None, True):
            raise ConfigError(f"--{name if name != 'stream' else 'no-stream'} requires --video.", "Give --video too.")
    other = {name: value for name in ("backend", "compute_precision") if (value := options.pop(f"against_{name}"))}
    groups = common.group(options, execution=se.Execution, options=se.ProfileOptions)
    if other:
        defaults = {"compute_precision": "auto", "provider": "cpu"} if "backend" in other else {}
        groups["against_execution"] = replace(groups["execution"], **defaults | other)
    with common.progress_bar("starting") as progress:
        result = se.profile_bundle(bundle, progress=progress, **groups)
    common.print_result(result, as_json, _print, output)


def _camera(bundle: Path, video: dict[str, Any], options: dict[str, Any], as_json: bool, output: Path | None) -> None:
    import sparsifiner_edge as se

    for name in ("against", "against_backend", "against_compute_precision"):
        if options.pop(name) is not None:
            raise ConfigError(
                f"--{name.replace('_', '-')} cannot be combined with --video.", "Measure one bundle after the other."
            )
    written = video.pop("deadline")
    try:
        video["deadline_ms"] = None if written is None else float(written.removesuffix("ms"))
    except ValueError:
        raise ConfigError(f"--deadline is {written!r}.", "Give milliseconds, such as 40ms.") from None
    run = {name: video.pop(name) for name in ("stream", "fit", "region")}
    if (stabilise := video.pop("stabilise")) is not None:
        run["stabilise"] = stabilise
    timed = {name: value for name in ("seconds",) if (value := options.pop(name)) is not None}
    timed |= {name: value for name, value in video.items() if value is not None}
    with common.progress_bar("decoding") as progress:
        settings = se.RunOptions(**common.group(options | run, execution=se.Execution))
        result = se.profile_camera(bundle, options=settings, progress=progress, **timed)
    common.print_result(result, as_json, _print_camera, output)


def _print_camera(result: PaceResult) -> None:
    """Print late and dropped frames, ages of answers, and energy."""
    method, figures = result.method, result.statistics
    rows = [
        [name, *(f"{value:.1f}" for value in marks.values())]
        for name, marks in (("age of an answer, ms", figures.age_ms), ("of which inference, ms", figures.infer_ms))
    ]
    title = f"{printable(method.video)}, {figures.frames} frames at {method.rate:g} per second"
    common.print_table(title, ["", *figures.age_ms], rows)
    click.echo(f"Missed: {figures.missed:.1%}, not answered within {method.deadline_ms:g} ms.")
    click.echo(f"Dropped for a newer frame: {figures.dropped}.")
    energy = figures.energy
    if isinstance(energy, Unavailable):
        click.echo(f"Energy: not measured: {printable(energy.why, 300)}")
    elif isinstance(joules := energy.gross_j_per_inference, Quantity):
        click.echo(f"Energy: {joules.value * 1e3:.1f} mJ per arriving frame, idle time included ({energy.sensor}).")
    runtime, how = (
        method.runtime,
        "as a stream" if method.stream else method.why_whole or "the ordinary model on every frame",
    )
    ran = f"{runtime.backend}, {runtime.precision}, kernels: {runtime.kernels}"
    click.echo(f"Ran on {printable(ran, 2000)}, {how}.")


def _print(result: ProfileResult) -> None:
    """Print warnings first, then the same tables as the report."""
    for subject, figures in zip(result.subjects, result.statistics.sides(), strict=True):
        chosen = result.method.runtime[str(subject.role)].chosen
        remarks = [f"{flag.flag}: {flag.what}. {flag.do}" for flag in figures.flags]
        for remark in remarks if chosen is None else (chosen, *remarks):
            click.echo(f"{printable(Path(str(subject.path)).name)}: {printable(remark, 2000)}")
    for problem in result.method.problems:
        click.echo(f"Sensor: {printable(problem, 2000)}.")
    common.print_page(result)
