"""`sparsifiner-edge package`."""

from __future__ import annotations

from pathlib import Path

import click

from sparsifiner_edge.bounds import MOST_BATCH
from sparsifiner_edge.cli import common
from sparsifiner_edge.records import write_record
from sparsifiner_edge.text import shown


@click.command()
@common.bundle_argument
@click.option("--for", "target", required=True, type=click.Choice(["deepstream", "triton", "gstreamer"]),
              help="Target system.")  # fmt: skip
@common.output_option("Folder to write; an earlier package there is replaced.")
@click.option("--batch", type=click.IntRange(1, MOST_BATCH),
              help="Greatest batch, for a bundle of dynamic batch; by default what suits the system.")  # fmt: skip
@click.option("--kernels", type=click.Choice(["auto", "portable"]), default="auto", show_default=True,
              help="For Triton: auto brings this machine's native library, portable does not.")  # fmt: skip
@common.json_option
def command(*, bundle: Path, target: str, output: Path, batch: int | None, kernels: str, as_json: bool) -> None:
    """Write BUNDLE for another system: configuration, model and a README with the commands."""
    from sparsifiner_edge.package import package_bundle

    result = package_bundle(bundle, target, output, batch=batch, kernels=kernels)
    if as_json:
        common.print_json(write_record(result))
        return
    click.echo(f"{output}: {len(result.files)} files for {target}; {output}/README.md says how to run it.")
    for remark in result.remarks:
        click.echo(f"- {shown(remark, 2000)}")
