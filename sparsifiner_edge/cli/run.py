"""`sparsifiner-edge run`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparsifiner_edge.bounds import MOST_COUNT, MOST_SECONDS
from sparsifiner_edge.cli import common

if TYPE_CHECKING:
    from sparsifiner_edge.camera.answers import Summary


@click.command()
@common.bundle_argument
@click.option(
    "--source",
    metavar="URI",
    required=True,
    help="Input: an image, a folder of images, a video file, 0 or /dev/video0, rtsp://..., "
    "gst:PIPELINE, or test. @FILE reads the source from a file, which keeps passwords out of "
    "the process list.",
)
@common.execution_options
@common.threads_option
@click.option(
    "--output",
    metavar="FILE",
    type=common.PATH,
    help="Write the JSON lines to this file. A live source appends to it; any other source overwrites it.",
)
@click.option(
    "--overlay", type=common.PATH, help="Also write a video (.mp4, .mkv) with the answers drawn on the frames."
)
@click.option(
    "--top",
    type=click.IntRange(1, MOST_COUNT),
    default=5,
    show_default=True,
    help="Maximum number of classes per answer.",
)
@click.option(
    "--threshold",
    type=common.FiniteRange(0, 1),
    help="Minimum probability of a class, or minimum value of a map.  [default: 0; for maps 0.5]",
)
@common.fit_option
@common.region_option
@click.option("--frames", type=click.IntRange(1, MOST_COUNT), help="Stop after this many frames.")
@click.option(
    "--metrics", metavar="[HOST:]PORT", help="Serve /metrics and /healthz on this port, by default on localhost only."
)
@click.option(
    "--stall",
    "stall_s",
    type=common.FiniteRange(0.1, MOST_SECONDS),
    default=3.0,
    show_default=True,
    help="Seconds without a frame after which a live source is reopened, or a file ends with an error.",
)
@click.option(
    "--no-stream",
    "stream",
    is_flag=True,
    flag_value=False,
    default=True,
    help="Run the ordinary model on every frame, even if the bundle was exported with --stream.",
)
@click.option(
    "--at-least",
    type=common.FiniteRange(0, 1, min_open=True, max_open=True),
    help="Target fidelity of a stream: estimated mean cosine to the dense model.  [default: 0.98]",
)
@click.option(
    "--share",
    type=common.FiniteRange(0, 1, min_open=True),
    help="Recompute a fixed share of the patches in every frame (replaces --at-least).",
)
@common.stabilise_option
@click.option(
    "--require-signature",
    "public_key",
    metavar="KEY.pub",
    type=common.PATH,
    help="Refuse a bundle that was not signed with this public key or was changed afterwards.",
)
def command(*, bundle: Path, source: str, metrics: str | None, **options: Any) -> None:
    """Run BUNDLE on images, a video or a camera, and print one JSON line per image or frame.

    A live source that is missing or disconnects is opened again. Events go to standard error, one JSON line each.
    SIGTERM and Ctrl-C end the run after the current frame, with exit code 0.
    """
    import sparsifiner_edge as se
    from sparsifiner_edge.camera.health import parse_host_port

    if options["stabilise"] is None:
        del options["stabilise"]
    address = None if metrics is None else parse_host_port(metrics)
    options = common.group(options, execution=se.Execution)
    summary = se.run_bundle(bundle, source, se.RunOptions(metrics=address, **options))
    # For frames, the last event says the same, and programs expect only JSON.
    if common.err_console.is_terminal or (summary.processed and "queued" not in summary.median_ms):
        click.echo(_closing(summary), err=True)


def _closing(summary: Summary) -> str:
    """Summarise the run in one line, with the time names of the JSON lines."""
    pace = "" if summary.per_s is None else f", {summary.per_s:.1f} per second"
    times = (
        f"; {name.replace('_', ' ')} {ms:.1f} ms (95 % within {summary.p95_ms[name]:.1f})"
        for name, ms in summary.median_ms.items()
    )
    return f"{summary.processed} answered{pace}{''.join(times)}; {summary.dropped} dropped"
