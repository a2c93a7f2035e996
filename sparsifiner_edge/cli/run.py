"""`sparsifiner-edge run`."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparsifiner_edge.bounds import MOST_COUNT, MOST_SECONDS
from sparsifiner_edge.cli import common
from sparsifiner_edge.errors import ConfigError, ImageError
from sparsifiner_edge.files import require_file_path

if TYPE_CHECKING:
    from sparsifiner_edge.camera.answers import ImageRecord
    from sparsifiner_edge.camera.sources import Source


@click.command()
@common.bundle_argument
@click.option(
    "--source",
    metavar="URI",
    required=True,
    help="An image, a folder of images, a video file, 0 or /dev/video0, rtsp://..., gst:PIPELINE, or test.",
)
@common.execution_options
@common.threads_option
@click.option(
    "--output",
    metavar="FILE",
    type=common.PATH,
    help="Write the JSON lines to this file instead: a live source appends to it; for images it appears when all are "
    "done, and an interrupted run leaves its lines in FILE.part.",
)
@click.option("--overlay", type=common.PATH, help="Also draw the answers into this video (.mp4, .mkv).")
@click.option(
    "--top", type=click.IntRange(1, MOST_COUNT), default=5, show_default=True, help="Most classes per answer."
)
@click.option("--threshold", type=common.FiniteRange(0, 1), default=0.0, help="Leave out less probable classes.")
@click.option(
    "--fps",
    type=common.FiniteRange(0.1, 1000),
    default=25.0,
    show_default=True,
    help="Frames per second of the source test.",
)
@click.option(
    "--duration",
    "duration_s",
    type=common.FiniteRange(0, MOST_SECONDS, min_open=True),
    help="Stop after so many seconds.",
)
@click.option("--frames", type=click.IntRange(1, MOST_COUNT), help="Stop after so many frames.")
@click.option("--metrics", metavar="[HOST:]PORT", help="Serve /metrics and /healthz; on this machine alone by default.")
@click.option(
    "--stall",
    "stall_s",
    type=common.FiniteRange(0.1, MOST_SECONDS),
    default=3.0,
    show_default=True,
    help="Seconds without a frame after which a live source is reopened.",
)
@click.option(
    "--require-signature",
    "public_key",
    metavar="KEY.pub",
    type=common.PATH,
    help="Refuse a bundle that the holder of this key did not sign, or that was altered since.",
)
@click.option(
    "--allow-redirect",
    is_flag=True,
    help="Follow an RTSP camera's redirect to another host, without user and password.",
)
def command(
    *, bundle: Path, source: str, output: Path | None, overlay: Path | None, metrics: str | None, **options: Any
) -> None:
    """Run BUNDLE on images, a video or a camera; one JSON line per image or frame.

    A live source is waited for, and opened again when it is lost; events of it go to standard error, one JSON line
    each. SIGTERM and Ctrl-C end the run after the current frame, with exit code 0.
    """
    from sparsifiner_edge.camera import still_images
    from sparsifiner_edge.camera.health import parse_host_port
    from sparsifiner_edge.camera.model import Model
    from sparsifiner_edge.camera.service import RunOptions, run_service
    from sparsifiner_edge.camera.sources import parse_source

    parsed = parse_source(source)
    still = parsed.kind == "images"
    if still:
        duration, frames = options["duration_s"], options["frames"]
        _require_usable(bundle, parsed, output, overlay=overlay, metrics=metrics, duration=duration, frames=frames)
    address = None if metrics is None else parse_host_port(metrics)
    chosen = RunOptions(output=output, overlay=overlay, metrics=address, **options)
    if still:
        with Model(bundle, *chosen.model()) as model:
            _write(still_images.run_images(model, Path(parsed.location)), output)
    else:
        run_service(bundle, parsed, chosen)


def _write(records: Iterator[ImageRecord], output: Path | None) -> None:
    from sparsifiner_edge.camera.json_lines import new_lines

    # The first before the file: a bad bundle is an error before anything is written.
    records = itertools.chain([next(records)], records)
    sink: contextlib.AbstractContextManager[Callable[[object], None]]
    sink = contextlib.nullcontext(_print) if output is None else new_lines(output)
    count, failed = 0, 0
    with sink as write:
        for record in records:
            write(record)
            count += 1
            failed += record.error is not None
    if failed:
        click.echo(f"error: {failed} of {count} images could not be read; their lines say why.", err=True)
        sys.exit(2)


def _require_usable(bundle: Path, source: Source, output: Path | None, **for_video: object) -> None:
    from sparsifiner_edge.camera.sources import KNOWN, require_other_file

    if not os.path.exists(source.location):  # noqa: PTH110  (of a name that is too long, too)
        raise ImageError(f"{source.shown} does not exist.", f"Give {KNOWN}.")
    for name, value in for_video.items():
        if value is not None:
            raise ConfigError(f"--{name} cannot be combined with images.", "Give a video or a camera, or leave it out.")
    if output is not None:
        require_file_path(output)
        require_other_file(output, source, bundle)


def _print(record: object) -> None:
    from sparsifiner_edge.camera.json_lines import line_of

    click.echo(line_of(record)[0].decode(), nl=False)
