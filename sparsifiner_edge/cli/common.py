"""Options, consoles and prints that commands share."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
import rich.progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from sparsifiner_edge.progress import Progress
from sparsifiner_edge.text import dump_json, finite, shown

Command = TypeVar("Command", bound=Callable[..., Any])

err_console = Console(stderr=True)
"""For progress and remarks: standard output carries results alone."""


def json_option(command: Command) -> Command:
    """`--json`: print one JSON document on standard output instead of a table."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")(command)


def output_option(what: str, required: bool = True) -> Callable[[Command], Command]:
    """`-o/--output FOLDER`."""
    return click.option("-o", "--output", type=click.Path(path_type=Path), required=required, help=what)


def weights_option(command: Command) -> Command:
    """`--weights FILE`."""
    return click.option(
        "--weights",
        type=click.Path(path_type=Path),
        help="Weights with timm's key names (.safetensors or .pth); without it, timm downloads them.",
    )(command)


def keep_option(command: Command) -> Command:
    """`--keep SHARE`, where a student's own is the default."""
    return click.option("--keep", type=float, help="Share of keys that each tile reads; by default the student's own.")(
        command
    )


def token_keep_option(command: Command) -> Command:
    """`--token-keep LAYER:SHARE,...`, where a student's own is the default."""
    return click.option(
        "--token-keep",
        metavar="LAYER:SHARE,...",
        help='Where tokens are pruned, such as 3:.7,6:.7,9:.7, or ""; by default as the student does.',
    )(command)


class FiniteRange(click.FloatRange):
    """A number in a range; NaN, which compares with nothing, is refused too."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read and check one value."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


def kernels_option(command: Command) -> Command:
    """`--kernels CHOICE`."""
    return click.option(
        "--kernels",
        type=click.Choice(("auto", "native", "portable")),
        default="auto",
        show_default=True,
        help="Operators of sparse attention: the native library where it can be loaded, only it, or function bodies.",
    )(command)


@contextlib.contextmanager
def progress_bar(stage: str, visible: bool = True) -> Iterator[Progress]:
    """A progress bar with the time left, on standard error; gives what moves it."""
    bar = rich.progress.Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=err_console,
        transient=True,
        disable=not err_console.is_terminal,
    )
    with bar:
        task = bar.add_task(stage, total=None, visible=visible)
        yield lambda stage, done, total: bar.update(
            task, description=shown(stage), completed=int(done), total=max(1, int(total))
        )


def print_json(content: Any) -> None:
    """One JSON document on standard output; null where a figure is NaN or infinite."""
    click.echo(dump_json(finite(content)[0]), nl=False)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table on standard output: first column left, the others right; names in brackets are no markup."""
    table = Table(title=Text(shown(title), style="bold"), title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if number == 0 else "right", no_wrap=number == 0)
    for row in rows:
        table.add_row(*(Text(shown(cell)) for cell in row))
    Console(width=None if Console().is_terminal else 120).print(table)
