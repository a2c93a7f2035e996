"""`sparsifiner-edge run`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from sparsifiner_edge.artifacts import require_file_path, write_text


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--source", type=click.Path(path_type=Path), required=True, help="A picture or a folder of pictures.")
@click.option("--backend", default="onnxruntime", show_default=True, help="What runs the bundle.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads; by default the cores this process may use.")
@click.option("--output", type=click.Path(path_type=Path), help="Write the JSON lines to this file instead.")
def command(*, bundle: Path, source: Path, backend: str, threads: int | None, output: Path | None) -> None:
    """Run BUNDLE on a picture or on every picture of a folder; one JSON line each."""
    from sparsifiner_edge.camera.stills import run_pictures

    if output is not None:
        require_file_path(output)
    lines, failed = [], 0
    for record in run_pictures(bundle, source, backend, threads):
        failed += "error" in record
        lines.append(json.dumps(record, ensure_ascii=False))
        if output is None:
            click.echo(lines[-1])
    if output is not None:
        write_text(output, "".join(f"{line}\n" for line in lines))
    if failed:
        click.echo(f"error: {failed} of {len(lines)} pictures could not be read; their lines say why.", err=True)
        sys.exit(2)
