"""`sparsifiner-edge sparsify`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sparsifiner_edge.artifacts import export_line
from sparsifiner_edge.bounds import whole_number
from sparsifiner_edge.cli import common
from sparsifiner_edge.config import PRESETS, SparsityConfig, keep_text, merge_text

_SIZES = ("tile", "query_pool", "channels", "background_tokens", "merge_window")


def _settings(values: tuple[str, ...]) -> dict[str, Any]:
    """Parse `--set NAME=NUMBER` options."""
    pairs = [value.partition("=")[::2] for value in values]
    for name, _number in pairs:
        if name not in _SIZES:
            raise click.BadParameter(f"{name!r:.80} is not one of {', '.join(_SIZES)}: give one as tile=8.")
    return {name: whole_number(number, name) for name, number in pairs}


@click.command()
@click.argument("model")
@common.weights_option
@common.img_size_option
@click.option(
    "--preset",
    type=click.Choice(list(PRESETS)),
    default="edge",
    show_default=True,
    help="Kind of sparsity. edge: fast key lists per query tile; paper: the published method, one list per query.",
)
@common.keep_option
@common.token_keep_option
@common.merge_option
@click.option(
    "--set",
    "settings",
    multiple=True,
    callback=common.read_by(_settings),
    metavar="NAME=NUMBER",
    help="Override a rarely used size: tile, query_pool, channels, background_tokens or "
    "merge_window (docs/how.md). Repeatable.",
)
@click.option(
    "--calibrate",
    type=common.PATH,
    help="Folder of images to fit the predictor on. Without it, the predictor is computed from the weights.",
)
@common.normalise_options
@common.output_option("Student folder to write.")
def command(*, model: str, output: Path, settings: dict[str, Any], **options: Any) -> None:
    """Make MODEL sparse, without training, and write it to a folder.

    MODEL is a timm name, a Hugging Face folder or hub name, or package.module:factory (your function that returns a
    torch module).
    """
    import sparsifiner_edge

    with common.progress_bar("sparsify") as progress:
        folder = sparsifiner_edge.sparsify(model, output, progress=progress, **settings, **options)
    from sparsifiner_edge.sparse.student_file import read_config  # once the extra `train` is known to be there

    config = read_config(folder)
    sparsity = SparsityConfig.from_dict(config.sparsity)
    click.echo(common.normalisation_text(config.normalisation))
    merging = f", merge {merge_text(sparsity.merge)}" if any(sparsity.merge) else ""
    click.echo(
        f"{folder}: sparse model written, keep {keep_text(sparsity.keep)}, "
        f"{sparsity.background_tokens} background tokens{merging}. "
        f"Next: {export_line(folder)}"
    )
