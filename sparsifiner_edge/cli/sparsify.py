"""`sparsifiner-edge sparsify`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sparsifiner_edge.cli import common
from sparsifiner_edge.config import PRESETS, SparsityConfig, keep_text, merge_text


@click.command(cls=common.SizedCommand)
@click.argument("model")
@common.weights_option
@common.img_size_option("model")
@click.option("--preset", type=click.Choice(list(PRESETS)), default="edge", show_default=True, help="Kind of sparsity.")
@click.option("--keep", callback=common.parse_keeping, metavar="SHARE|SHARE,...",
              help="Share of keys each tile reads, 1 is dense; or shares of the layers from the first, such as "
                   ".1,.1,.25,1: the last goes on. By default 0.25, with --merge what suits the size.")  # fmt: skip
@click.option("--tile", type=int, help="Consecutive queries that share one key list (edge: 16).")
@click.option("--probe", type=int, help="Queries averaged to ask the predictor (edge: 8).")
@click.option("--channels", type=int, help="Low-rank width of the predictor (edge: 24).")
@click.option("--cells", type=int, help="Background cells; by default 1.5 times the root of the patches, at most 49.")
@click.option("--dense-layers", default="", help="Layers that stay dense, such as 0,1.")
@click.option("--token-keep", default="", callback=common.parse_pruning, metavar="LAYER:SHARE,...",
              help="Prune tokens, such as 3:.7,6:.7,9:.7.")  # fmt: skip
@click.option(
    "--merge",
    default="0",
    show_default=True,
    callback=common.parse_merging,
    metavar="N|FIRST..LAST",
    help="Tokens that each layer merges with their like: one rate, the first and the last layer's, or a list.",
)
@click.option("--merge-window", type=int, help="Partners along the curve that a token is compared with (16).")
@click.option("--calibrate", type=common.PATH, help="Folder of images to learn the predictor from.")
@common.normalise_options
@common.output_option("Student folder to write.")
def command(*, model: str, output: Path, dense_layers: str, **options: Any) -> None:
    """Make MODEL sparse, without training, and write a student folder.

    MODEL is timm's name of a vision transformer, a folder or hub name of Hugging Face's, or package.module:factory, a
    function of yours that makes a torch module.
    """
    import sparsifiner_edge

    layers = common.parse_layers(dense_layers)
    with common.progress_bar("sparsify") as progress:
        folder = sparsifiner_edge.sparsify(model, output, dense_layers=layers, progress=progress, **options)
    from sparsifiner_edge.sparse.student_file import read_config  # once the extra `train` is known to be there

    config = read_config(folder)
    made = SparsityConfig.from_dict(config.sparsity)
    click.echo(common.normalisation_text(config.normalisation))
    if options["calibrate"] is not None:
        common.print_novelty(folder)
    merging = f", merge {merge_text(made.merge)}" if any(made.merge) else ""
    trust = f" --trust {config.model.partition(':')[0]}" if config.host == "factory" else ""
    click.echo(
        f"{folder}: student written, keep {keep_text(made.keep)}, {made.cells} cells{merging}. "
        f"Next: sparsifiner-edge export {folder}{trust} -o BUNDLE/"
    )
