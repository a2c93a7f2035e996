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
@click.option("--data", type=common.PATH, required=True, help="Image or folder of images.")
@click.option(
    "--images",
    "most",
    type=click.IntRange(1, MOST_COUNT),
    default=4,
    show_default=True,
    help="Maximum number of images, evenly spaced.",
)
@click.option(
    "--lang", "language", type=click.Choice(["en", "ja"]), default="en", show_default=True, help="Language of the page."
)
@common.trust_option
@common.json_option
@common.output_option("HTML page to write.")
def command(
    *, student: Path, data: Path, most: int, language: str, trust: tuple[str, ...], as_json: bool, output: Path
) -> None:
    """Show which tokens STUDENT read and merged, and which patches its features depend on.

    The page also reports how reliable the explanation is.
    """
    import sparsifiner_edge
    from sparsifiner_edge.report.explain_page import write_explanation
    from sparsifiner_edge.report.texts import templates

    templates()  # Fail before minutes of work if no page can be written.
    require_file_path(output)
    with common.progress_bar("images") as progress:
        result, explained = sparsifiner_edge.explain_student(student, data, most=most, trust=trust, progress=progress)
    write_explanation(explained, result.method, output, language)
    common.print_result(result, as_json, lambda explanation: _print(explanation, output))


def _print(result: ExplainResult, output: Path) -> None:
    images = result.statistics.values()
    rows = [[printable(image.image), *(f"{figure:.3f}" for figure in image.saco.values())] for image in images]
    head = ["image", "explanation", "random order of patches", "explanation shifted"]
    common.print_table("SaCo test of the explanations (docs/measure.md)", head, rows)
    for image in images:
        if not image.better:
            click.echo(f"{printable(image.image)}: this explanation is no better than chance.")
    click.echo(f"{output}: the tokens that each layer read and merged, and the attribution of the features.")
