"""`sparsifiner-edge export`."""

from __future__ import annotations

from pathlib import Path

import click

from sparsifiner_edge.artifacts import open_bundle
from sparsifiner_edge.cli.common import err_console, json_option, output_option, print_json, weights_option


@click.command()
@click.argument("source", metavar="STUDENT|MODEL")
@weights_option
@click.option("--img-size", type=click.IntRange(min=1), help="Pixels along a side; by default the source's own.")
@click.option("--precision", type=click.Choice(["fp32"]), default="fp32", show_default=True, help="Of the weights.")
@click.option("--batch", default="1", show_default=True, help='A fixed batch size, or "dynamic".')
@click.option("--tokens", is_flag=True, help="Also give a classifier's tokens (others always give them).")
@json_option
@output_option("Bundle folder to write.")
def command(
    *,
    source: str,
    weights: Path | None,
    img_size: int | None,
    precision: str,
    batch: str,
    tokens: bool,
    as_json: bool,
    output: Path,
) -> None:
    """Export a student folder, or timm's MODEL as the dense baseline, to ONNX; the file is run and held to torch."""
    import sparsifiner_edge

    with err_console.status("exporting and checking"):
        folder = sparsifiner_edge.export_bundle(
            source, output, weights=weights, img_size=img_size, precision=precision, batch=batch, tokens=tokens
        )
    manifest = open_bundle(folder)
    if as_json:
        print_json(manifest)
        return
    check = manifest["check"]
    for name, found in check["outputs"].items():
        error, least = found["error_relative_to_range"], found["least_row_cosine"]
        equal = found["error_with_equal_selection"]
        click.echo(
            f"{name}: differs from torch by {error:.1e} of its range ({equal:.1e} with the same keys), "
            f"least cosine {least:.7f}"
        )
    if check["selected_indices"]:
        click.echo(f"selected keys: {check['differing_indices']} of {check['selected_indices']} differ from torch")
    ops = ", ".join(manifest["ops"]) or "none: plain dense attention in standard operators"
    click.echo(f"custom operators (with bodies in standard operators): {ops}")
    click.echo(f"{folder}: bundle written. Next: sparsifiner-edge profile {folder}")
