"""`sparsifiner-edge package`."""

from __future__ import annotations

from pathlib import Path

import click

from sparsifiner_edge.cli import common


@click.command()
@common.bundle_argument
@click.option(
    "--for", "target", required=True, type=click.Choice(["deepstream", "triton", "gstreamer"]), help="Target system."
)
@common.output_option("Folder to write; it must be missing or empty.")
@common.json_option
def command(*, bundle: Path, target: str, output: Path, as_json: bool) -> None:
    """Package BUNDLE for another system: model, configuration and a README with the commands."""
    from sparsifiner_edge.package import Package, package_bundle

    def show(written: Package) -> None:
        click.echo(f"{output}: {len(written.files)} files for {target}; {output}/README.md explains how to run it.")

    common.print_result(package_bundle(bundle, target, output), as_json, show)
