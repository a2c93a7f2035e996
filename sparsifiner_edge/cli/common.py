"""Options, consoles and prints that commands share."""

from __future__ import annotations

import contextlib
import datetime
import functools
import inspect
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click
from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sparsifiner_edge.artifacts import MAX_JSON
from sparsifiner_edge.artifacts import trust_text as trust_text  # noqa: PLC0414
from sparsifiner_edge.bounds import MOST_SIDE, MOST_THREADS, ImageSize, size_of, size_text, whole_number
from sparsifiner_edge.config import parse_keep, parse_merge, parse_token_keep
from sparsifiner_edge.execution import KERNEL_CHOICES, PRECISIONS, PROVIDERS
from sparsifiner_edge.files import read_bytes, require_file_path
from sparsifiner_edge.fitting import FITS, parse_region
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.records import write_record
from sparsifiner_edge.text import dump_json, finite, printable

if TYPE_CHECKING:
    from sparsifiner_edge.images import Normalisation
    from sparsifiner_edge.results import Result

Command = TypeVar("Command", bound=Callable[..., Any])

err_console = Console(stderr=True)
"""For progress and remarks: standard output carries results alone."""
EVERY_S = 10.0
"""Seconds between the lines of progress where there is no terminal."""
PATH = click.Path(path_type=Path)


class FiniteRange(click.FloatRange):
    """A number in a range; NaN, which compares with nothing, is rejected too."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read and check one value."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


def output_option(what: str) -> Callable[[Command], Command]:
    """`-o/--output FOLDER`."""
    return click.option("-o", "--output", type=PATH, required=True, help=what)


def read_by(read: Callable[[Any], Any]) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """A callback for an option: what `read` makes of its value; None where it is not given."""
    return lambda _context, _option, value: None if value is None else read(value)


def _file_path(path: Path) -> Path:
    require_file_path(path)
    return path


def parse_size(text: str) -> ImageSize:
    """ "518" -> 518; "294x518" -> (294, 518).

    Raises:
        ConfigError: neither a square's side nor HEIGHTxWIDTH, in pixels.
    """
    sides = [whole_number(side, f"A side of --img-size {text:.40}", 1, MOST_SIDE) for side in text.split("x", 1)]
    return size_of(sides[0], sides[-1])


bundle_argument = click.argument("bundle", type=PATH)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
result_option = click.option(
    "-o",
    "--output",
    type=PATH,
    callback=read_by(_file_path),
    help="Also write the result, raw samples included, to this JSON file.",
)


def execution_options(command: Command) -> Command:
    """How a bundle is run: backend, precision, provider and kernels, each an argument of the command."""
    for option in reversed(
        (
            click.option(
                "--backend",
                default="auto",
                show_default=True,
                help="onnxruntime, openvino, tensorrt or tensorrt-rtx; auto: what BUNDLE is intended for, else "
                "the first that runs here: an engine in it, onnxruntime, openvino.",
            ),
            click.option(
                "--precision",
                type=click.Choice(PRECISIONS),
                default="auto",
                show_default=True,
                help="What all that is not int8 in the file is computed in; auto: intended with it, else as "
                "it is stored.",
            ),
            click.option(
                "--provider",
                type=click.Choice(PROVIDERS),
                default="cpu",
                show_default=True,
                help="Of onnxruntime: what it runs on.",
            ),
            click.option(
                "--kernels",
                type=click.Choice(KERNEL_CHOICES),
                default="auto",
                show_default=True,
                help="Operators of sparse attention: auto, the native library where it can be loaded; native, "
                "only it; portable, function bodies.",
            ),
        )
    ):
        command = option(command)
    return command


def img_size_option(command: Command) -> Command:
    """`--img-size`, or `--like` that finds one, as the one argument `img_size`."""

    @functools.wraps(command)
    def with_size(*, img_size: ImageSize | None, like: str | None, **options: Any) -> Any:
        if like is not None:
            if img_size is not None:
                raise click.UsageError("Give --img-size or --like.")
            img_size = _size_like(options.get("model") or options["source"], like, options.get("trust", ()))
        return command(img_size=img_size, **options)

    for option in (
        click.option(
            "--like",
            metavar="VIDEO|IMAGE",
            help="In place of --img-size: the shape of its frames, about as many patches as the model has by itself.",
        ),
        click.option(
            "--img-size",
            callback=read_by(parse_size),
            metavar="SIDE|HEIGHTxWIDTH",
            help="Pixels: a square's side, or height and width; by default the model's own.",
        ),
    ):
        with_size = option(with_size)
    return cast(Command, with_size)


def _size_like(source: str, like: str, trust: Sequence[str]) -> ImageSize:
    """As said on standard error."""
    import sparsifiner_edge as se
    from sparsifiner_edge.camera.capture import frame_size
    from sparsifiner_edge.camera.sources import parse_source

    frames = parse_source(like)
    width, height = frame_size(frames)
    size = se.size_like(source, (width, height), trust)
    click.echo(f"like {printable(frames.shown)}, frames of {width}x{height}: --img-size {size_text(size)}", err=True)
    return size


def _labels(path: Path | None) -> list[str]:
    """A name from each line; of what is no UTF-8, such as no name may have."""
    text = b"" if path is None else read_bytes(path, MAX_JSON)
    return text.decode("utf-8", "surrogateescape").removeprefix("\ufeff").splitlines()


labels_option = click.option(
    "--labels",
    type=PATH,
    callback=lambda _context, _option, path: _labels(path),
    metavar="FILE",
    help="Names of the classes, one a line; by default those that the model has.",
)
fit_option = click.option(
    "--fit",
    type=click.Choice(FITS),
    help="How an image gets the model's shape: crop, its centre; letterbox, all of it between bars; stretch, all of it "
    "distorted. By default as the bundle says, else crop.",
)
region_option = click.option(
    "--region",
    callback=read_by(parse_region),
    metavar="X,Y,WIDTH,HEIGHT",
    help="Read this part of an image alone, in its pixels; X and Y from the upper left corner.",
)
threads_option = click.option(
    "--threads", type=click.IntRange(1, MOST_THREADS), help="Threads; by default the cores this process may use."
)
weights_option = click.option(
    "--weights", type=PATH, help="For timm's names: weights (.safetensors or .pth); without it, timm downloads them."
)
keep_option = click.option(
    "--keep",
    callback=read_by(parse_keep),
    metavar="SHARE|SHARE,...",
    help="Share of keys that each tile reads, 1 is dense; or shares of the layers from the first, such as .1,.1,.25,1: "
    "the last goes on. By default the student's own; of a new one 0.25, with --merge what suits the size.",
)
merge_option = click.option(
    "--merge",
    callback=read_by(parse_merge),
    metavar="N|FIRST..LAST",
    help="Tokens that each layer merges with their like: one rate, FIRST..LAST layer's, or a list; by default the "
    "student's own, of a new one none.",
)
token_keep_option = click.option(
    "--token-keep",
    callback=read_by(parse_token_keep),
    metavar="LAYER:SHARE,...",
    help='Where tokens are pruned, such as 3:.7,6:.7,9:.7, or ""; by default as the student does.',
)
trust_option = click.option(
    "--trust",
    multiple=True,
    metavar="MODULE",
    help="A student of a factory of your own: the module whose code may run; repeatable.",
)


def normalise_options(command: Command) -> Command:
    """`--mean`, `--std` and `--no-normalise` as the one argument `normalise`; see `images.Normalise`."""

    @functools.wraps(command)
    def with_normalise(*, mean: str | None, std: str | None, no_normalise: bool, **options: Any) -> Any:
        if (mean is None) != (std is None) or (no_normalise and mean is not None):
            raise click.UsageError("Give --mean and --std, or --no-normalise alone.")
        statistics = None if mean is None or std is None else (mean.split(","), std.split(","))
        return command(normalise=False if no_normalise else statistics, **options)

    for option in (
        click.option("--no-normalise", is_flag=True, help="The model normalises inside, of pixels from 0 to 1."),
        click.option("--std", metavar="R,G,B", help="Their standard deviation, likewise."),
        click.option(
            "--mean",
            metavar="R,G,B",
            help="Mean of pixels / 255 that the model expects; by default what it declares or its library records.",
        ),
    ):
        with_normalise = option(with_normalise)
    return cast(Command, with_normalise)


def group(arguments: Mapping[str, Any], /, **kinds: type) -> dict[str, Any]:
    """A command's options as its function takes them: the fields of each type as one value, the others as they are.

    Example:
        >>> from sparsifiner_edge import Budget
        >>> group({"keep": 0.5, "against": "dense"}, budget=Budget)
        {'against': 'dense', 'budget': Budget(keep=0.5, token_keep=None, merge=None)}
    """
    rest, groups = dict(arguments), {}
    for name, kind in kinds.items():
        fields = [field for field in inspect.signature(kind).parameters if field in rest]
        groups[name] = kind(**{field: rest.pop(field) for field in fields})
    assert not rest.keys() & groups.keys(), "an option has the name of a group"
    return rest | groups


class _ProgressText:
    """A `Progress` that says in words where the work is: share, time so far, time left, each where it is known.

    What is left takes as long as it does at the pace since the total last changed. A total that grows, or that was
    reached while the work goes on, foretells nothing, and nothing is said then.
    """

    def __init__(self, stage: str) -> None:
        self._stage, self._done, self._total = stage, 0.0, 0.0
        self._began = self._at = time.monotonic()
        self._since = self._began, 0.0

    def __call__(self, stage: str, done: float, total: float) -> None:
        now = time.monotonic()
        if total != self._total or done < self._done:
            self._since = now, done
        self._stage, self._done, self._total, self._at = printable(stage), done, total, now

    def __str__(self) -> str:
        now, (since, before) = time.monotonic(), self._since
        known = [str(datetime.timedelta(seconds=round(now - self._began)))]
        if self._done < self._total:
            known.insert(0, f"{self._done / self._total:.0%}")
            pace = (self._at - since) / (self._done - before) if self._done > before else 0.0
            rest_s = round((self._total - self._done) * pace - (now - self._at))
            known += [f"{datetime.timedelta(seconds=rest_s)} left"] if rest_s > 0 else []
        return f"{self._stage}: {', '.join(known)}"

    def __rich__(self) -> Columns:
        return Columns([ProgressBar(self._total or None, self._done, width=40), Text(str(self))])


@contextlib.contextmanager
def progress_bar(stage: str, visible: bool = True) -> Iterator[Progress]:
    """Progress on standard error: a bar where that is a terminal, else a line every `EVERY_S`; gives what moves it."""
    text, over = _ProgressText(stage), threading.Event()

    def tell() -> None:
        with contextlib.suppress(OSError, ValueError):  # Who read it has gone.
            while not over.wait(EVERY_S):
                click.echo(str(text), err=True)

    if not visible:
        yield text
    elif err_console.is_terminal:
        with Live(text, console=err_console, transient=True):
            yield text
    else:
        threading.Thread(target=tell, name="progress", daemon=True).start()
        try:
            yield text
        finally:
            over.set()


def print_json(content: Any) -> None:
    """One JSON document on standard output; null where a figure is NaN or infinite."""
    click.echo(dump_json(finite(content)[0]), nl=False)


def normalisation_text(normalisation: Normalisation | None) -> str:
    """What the file does to pixels."""
    from sparsifiner_edge.images import AS_IS

    none = "no normalisation: the module does it itself, of pixels from 0 to 1"
    return none if normalisation == AS_IS else f"folded in: {normalisation or 'unknown'}"


Shown = TypeVar("Shown")


def print_result(result: Shown, as_json: bool, show: Callable[[Shown], None], output: Path | None = None) -> None:
    """A record as one JSON document, or as `show` prints it for people; a `Result` also into the file `output`."""
    if as_json:
        print_json(write_record(result))
    else:
        show(result)
    if output is not None:  # Last: a full disk should not cost the reader the figures.
        from sparsifiner_edge.results import Result, write_result

        assert isinstance(result, Result)
        write_result(output, result)


def print_page(result: Result) -> None:
    """What the report's page says of a result of one kind, as tables and lines; of two subjects the verdict last."""
    from sparsifiner_edge.report import blocks
    from sparsifiner_edge.report.page import page_of

    tables, verdict = page_of(result)
    for title, block in tables:
        if isinstance(block, blocks.Table):
            rows = [[cell if isinstance(cell, str) else cell[0] for cell in row] for row in block.rows]
            print_table(title, block.head, rows)
        else:
            click.echo(block.text)
    for sentence in verdict if len(result.subjects) > 1 else ():
        click.echo(sentence)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table on standard output: first column left, the others right; names in brackets are no markup."""
    table = Table(title=Text(printable(title), style="bold"), title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if number == 0 else "right", no_wrap=number == 0)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    Console(width=None if Console().is_terminal else 120).print(table)
