"""`sparsifiner-edge report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from sparsifiner_edge.cli import common
from sparsifiner_edge.text import printable

if TYPE_CHECKING:
    from sparsifiner_edge.report.page import Report


@click.command()
@click.argument("results", nargs=-1, metavar="RESULT.json...", type=common.PATH)
@click.option(
    "--lang", "language", type=click.Choice(["en", "ja"]), default="en", show_default=True, help="Language of the page."
)
@common.json_option
@common.output_option("HTML page to write.")
def command(*, results: tuple[Path, ...], output: Path, language: str, as_json: bool) -> None:
    """Write one self-contained HTML page from result files of profile, evaluate, estimate and optimize."""
    from sparsifiner_edge.report import write_report

    common.print_result(write_report(results, output, language=language), as_json, _print)


def _print(written: Report) -> None:
    """Print the verdict and the path of the page."""
    for sentence in written.verdict:
        click.echo(sentence)
    if written.warnings:
        click.echo(f"{written.warnings} warning(s) about the measurements: see the page.")
    click.echo(f"{printable(written.page)}: page written")
