"""`sparsifiner-edge explain`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from sparsifiner_edge.bounds import MOST_COUNT
from sparsifiner_edge.cli import common
from sparsifiner_edge.files import require_file_path
from sparsifiner_edge.text import printable

if TYPE_CHECKING:
    from sparsifiner_edge.outcomes import ExplainResult


@click.command()
@click.argument("student", type=common.PATH)
@click.option("--data", type=common.PATH, required=True, help="An image or a folder.")
@click.option(
    "--images",
    "most",
    type=click.IntRange(1, MOST_COUNT),
    default=4,
    show_default=True,
    help="Images at most, evenly taken.",
)
@click.option(
    "--lang", "language", type=click.Choice(["en", "ja"]), default="en", show_default=True, help="Of the page."
)
@common.trust_option
@common.json_option
@common.output_option("Page to write.")
def command(
    *, student: Path, data: Path, most: int, language: str, trust: tuple[str, ...], as_json: bool, output: Path
) -> None:
    """Show what STUDENT read and merged on images, what its features hang on, and whether it is so."""
    import sparsifiner_edge
    from sparsifiner_edge.report.explain_page import write_explanation
    from sparsifiner_edge.report.texts import templates

    templates()  # Before minutes of work that no page could show.
    require_file_path(output)
    with common.progress_bar("images") as progress:
        result, explained = sparsifiner_edge.explain_student(student, data, most=most, trust=trust, progress=progress)
    write_explanation(explained, result.method, output, language)
    common.print_result(result, as_json, lambda explanation: _print(explanation, output))


def _print(result: ExplainResult, output: Path) -> None:
    images = result.statistics.values()
    rows = [[printable(image.image), *(f"{figure:.3f}" for figure in image.saco.values())] for image in images]
    head = ["image", "this explanation", "any order", "itself, elsewhere"]
    common.print_table("SaCo of what the features hang on", head, rows)
    for image in images:
        if not image.better:
            click.echo(f"{printable(image.image)}: this explanation is no better than chance.")
    click.echo(f"{output}: what was read and merged, layer by layer, and what the features hang on.")
