"""`sparsifiner-edge explain`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sparsifiner_edge.bounds import MOST_COUNT
from sparsifiner_edge.cli import common
from sparsifiner_edge.errors import ArtifactError, ConfigError
from sparsifiner_edge.files import io_errors, replaced
from sparsifiner_edge.results import write_result
from sparsifiner_edge.text import file_name, shown

if TYPE_CHECKING:
    from sparsifiner_edge.explained import ExplainResult

RESULT, PAGE = "explain.json", "index.html"
_PICTURE = re.compile(r"\d+-.*\.png", re.DOTALL)


@click.command()
@click.argument("student", type=common.PATH)
@click.option("--data", type=common.PATH, required=True, help="An image or a folder.")
@click.option("--at", metavar="X,Y", help="Explain the patch at this pixel of the image that the model sees.  "
                                          "[default: the features]")  # fmt: skip
@click.option("--images", "most", type=click.IntRange(1, MOST_COUNT), default=4, show_default=True,
              help="Images at most, evenly taken.")  # fmt: skip
@click.option("--lang", "language", type=click.Choice(["en", "ja"]), default="en", show_default=True,
              help="Of the page.")  # fmt: skip
@common.trust_option
@common.json_option
@common.output_option("Folder to write: index.html, explain.json and a picture per image.")
def command(
    *, student: Path, data: Path, at: str | None, most: int, language: str, trust: tuple[str, ...],
    as_json: bool, output: Path,
) -> None:  # fmt: skip
    """Show what STUDENT read, merged and averaged on images, what of that reached the output, and whether it is so."""
    import sparsifiner_edge
    from sparsifiner_edge.report.explain_page import write_explanation, write_overview
    from sparsifiner_edge.report.texts import templates

    place = None if at is None else _place(at)
    templates()  # Before minutes of work that no page could show.
    _require_ours(output)
    with common.progress_bar("images") as progress:
        result, explained = sparsifiner_edge.explain_student(
            student, data, at=place, most=most, trust=trust, progress=progress
        )
    with replaced(output) as folder:
        write_explanation(explained, result.method, folder / PAGE, language)
        for number, image in enumerate(explained):
            write_overview(image, folder / f"{number}-{file_name(image.path.stem)}.png")
        write_result(folder / RESULT, result)
    common.print_result(result, as_json, lambda found: _print(found, output))


def _require_ours(output: Path) -> None:
    """Refuse to replace a folder that holds anything but an explanation."""
    with io_errors(output):
        present = {path.name for path in output.iterdir()} if output.exists() else set()
        others = {name for name in present - {PAGE, RESULT} if not _PICTURE.fullmatch(name)}
        if others or (present and RESULT not in present):
            raise ArtifactError(f"{output} holds something else than an explanation.", "Choose another output.")


def _place(text: str) -> tuple[int, int]:
    x, comma, y = text.partition(",")
    if not comma or not (x.strip().isdecimal() and y.strip().isdecimal()):
        raise ConfigError(f"--at is {text!r:.60}.", "Give pixels from the left and from the top: 112,80.")
    return int(x), int(y)


def _print(result: ExplainResult, output: Path) -> None:
    rows = []
    for found in result.statistics.images:
        for name, values in found.faithful.items():
            figures = (values.saco, values.deletion, values.insertion)
            rows.append([shown(found.image), name, *(f"{figure:.3f}" for figure in figures)])
    head = ["image", "order of", "SaCo", "deletion", "insertion"]
    common.print_table(f"explained: {result.method.explained}", head, rows)
    for found in result.statistics.images:
        if not found.better:
            click.echo(f"{shown(found.image)}: this explanation is no better than chance.")
    click.echo(f"{output / 'index.html'}: what was read, merged and averaged, layer by layer.")
