"""`sparsifiner-edge report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparsifiner_edge.cli import common
from sparsifiner_edge.records import Unavailable
from sparsifiner_edge.text import shown

if TYPE_CHECKING:
    from sparsifiner_edge.report.page import Report


@click.command()
@click.argument("results", nargs=-1, metavar="RESULT.json...", type=common.PATH)
@click.option("--bundle", "bundles", multiple=True, type=common.PATH,
              help="A bundle in the results, for what was sparse; may be given again.")  # fmt: skip
@click.option("--lang", "language", type=click.Choice(["en", "ja"]), default="en", show_default=True,
              help="English or Japanese.")  # fmt: skip
@click.option("--price-kwh", type=float, help="Price of a kilowatt-hour, for the cost of a million inferences.")
@click.option("--price-device-hour", type=float, help="Price of an hour of the device, for the same.")
@click.option("--currency", default="", help="Code or sign that is printed with costs, such as EUR.")
@click.option("--strict", is_flag=True, help="Exit with 1, and write nothing, when the results cannot be compared.")
@click.option("--no-images", "no_images", is_flag=True, help="Write the page alone, without PNGs beside it.")
@click.option("--picture", "pictures", multiple=True, type=common.PATH,
              help="A PNG or JPEG that the page shows; may be given again.")  # fmt: skip
@common.json_option
@common.output_option("HTML page to write.")
def command(
    *,
    results: tuple[Path, ...],
    output: Path,
    price_kwh: float | None,
    price_device_hour: float | None,
    currency: str,
    no_images: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Write one self-contained page from the result files of profile, evaluate and estimate."""
    from sparsifiner_edge.report import Prices, write_report

    prices = Prices(price_kwh, price_device_hour, currency)
    written = write_report(results, output, prices=prices, images=not no_images, **options)
    common.print_result(written, as_json, _print)


def _print(written: Report) -> None:
    """The verdict, what cannot be compared, and what was written."""
    if written.differences:
        click.echo("These results must not be compared with one another: they differ in")
        for field, values in written.differences.items():
            click.echo(f"  {field}: {' against '.join(values)}")
    for sentence in written.verdict:
        click.echo(sentence)
    if written.flags:
        click.echo(f"{len(written.flags)} warning(s) about the measurements: see the page.")
    images = written.images
    count = f"no PNGs: {images.why}" if isinstance(images, Unavailable) else f"{len(images)} PNGs beside it"
    click.echo(f"{shown(written.page)}: page written; {count}")
