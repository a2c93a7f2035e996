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
    "--lang", "language", type=click.Choice(["en", "ja"]), default="en", show_default=True, help="English or Japanese."
)
@common.json_option
@common.output_option("HTML page to write.")
def command(*, results: tuple[Path, ...], output: Path, language: str, as_json: bool) -> None:
    """Write one self-contained page from the result files of profile, evaluate, estimate and optimize."""
    from sparsifiner_edge.report import write_report

    common.print_result(write_report(results, output, language=language), as_json, _print)


def _print(written: Report) -> None:
    """The verdict, and what was written."""
    for sentence in written.verdict:
        click.echo(sentence)
    if written.warnings:
        click.echo(f"{written.warnings} warning(s) about the measurements: see the page.")
    click.echo(f"{printable(written.page)}: page written")
