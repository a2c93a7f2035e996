"""Options, consoles and printing functions that the commands share."""

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
from sparsifiner_edge.execution import COMPUTE_PRECISIONS, KERNEL_CHOICES, PROVIDERS
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
"""Console for progress and remarks. Standard output carries only results."""
EVERY_S = 10.0
"""Seconds between progress lines if standard error is not a terminal."""
PATH = click.Path(path_type=Path)


class FiniteRange(click.FloatRange):
    """Number in a range. NaN is rejected too."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse and check one value."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


def output_option(what: str) -> Callable[[Command], Command]:
    """Return the required option `-o/--output FOLDER` with this help text."""
    return click.option("-o", "--output", type=PATH, required=True, help=what)


def read_by(read: Callable[[Any], Any]) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """Return an option callback that applies `read` to the value, and keeps None."""
    return lambda _context, _option, value: None if value is None else read(value)


def _file_path(path: Path) -> Path:
    require_file_path(path)
    return path


def parse_size(text: str) -> ImageSize:
    """Parse an image size: "518" -> 518, "294x518" -> (294, 518).

    Raises:
        ConfigError: The text is neither the side of a square nor HEIGHTxWIDTH in pixels.
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
    help="Also write the result, including raw samples, to this JSON file.",
)


def execution_options(command: Command) -> Command:
    """Add the options of `Execution`: backend, compute precision, provider and kernels."""
    for option in reversed(
        (
            click.option(
                "--backend",
                default="auto",
                show_default=True,
                help="Runtime: onnxruntime, openvino, tensorrt or tensorrt-rtx. auto: the backend that the "
                "bundle was optimized for, else the first that works here (an engine in the bundle, "
                "onnxruntime, openvino).",
            ),
            click.option(
                "--compute-precision",
                type=click.Choice(COMPUTE_PRECISIONS),
                default="auto",
                show_default=True,
                help="Arithmetic of everything that is not int8. auto: the precision that the bundle was "
                "optimized for, else the weight precision.",
            ),
            click.option(
                "--provider",
                type=click.Choice(PROVIDERS),
                default="cpu",
                show_default=True,
                help="Execution provider of onnxruntime.",
            ),
            click.option(
                "--kernels",
                type=click.Choice(KERNEL_CHOICES),
                default="auto",
                show_default=True,
                help="Implementation of the custom operators. auto: the native library if it loads; native: "
                "only the native library; portable: ONNX function bodies.",
            ),
        )
    ):
        command = option(command)
    return command


def img_size_option(command: Command) -> Command:
    """Add `--img-size` and `--like`, which both set the argument `img_size`."""

    @functools.wraps(command)
    def with_size(*, img_size: ImageSize | None, like: str | None, **options: Any) -> Any:
        if like is not None:
            if img_size is not None:
                raise click.UsageError("--img-size and --like cannot be combined. Give one of them.")
            img_size = _size_like(options.get("model") or options["source"], like, options.get("trust", ()))
        return command(img_size=img_size, **options)

    for option in (
        click.option(
            "--like",
            metavar="VIDEO|IMAGE",
            help="Choose --img-size from the aspect ratio of this video or image, with about as many "
            "patches as the model has by default.",
        ),
        click.option(
            "--img-size",
            callback=read_by(parse_size),
            metavar="SIDE|HEIGHTxWIDTH",
            help="Image size in pixels: the side of a square, or HEIGHTxWIDTH.  [default: the model's own]",
        ),
    ):
        with_size = option(with_size)
    return cast(Command, with_size)


def _size_like(source: str, like: str, trust: Sequence[str]) -> ImageSize:
    """Choose an image size from the frames of a video or image, and report it on standard error."""
    import sparsifiner_edge as se
    from sparsifiner_edge.camera.capture import frame_size
    from sparsifiner_edge.camera.sources import parse_source

    frames = parse_source(like)
    width, height = frame_size(frames)
    size = se.size_like(source, (width, height), trust)
    click.echo(
        f"{printable(frames.shown)}: frames are {width} pixels wide and {height} high. "
        f"Using --img-size {size_text(size)} (height x width).",
        err=True,
    )
    return size


def _labels(path: Path | None) -> list[str]:
    """Read one class name per line. Invalid UTF-8 is kept as surrogates, which later checks refuse."""
    text = b"" if path is None else read_bytes(path, MAX_JSON)
    return text.decode("utf-8", "surrogateescape").removeprefix("\ufeff").splitlines()


labels_option = click.option(
    "--labels",
    type=PATH,
    callback=lambda _context, _option, path: _labels(path),
    metavar="FILE",
    help="File with one class name per line.  [default: the model's own names]",
)
fit_option = click.option(
    "--fit",
    type=click.Choice(FITS),
    help="Way to fit an image to the model's input. crop: the centre; letterbox: the full image "
    "between bars; stretch: the full image, distorted.  [default: the bundle's setting, else "
    "crop]",
)
region_option = click.option(
    "--region",
    callback=read_by(parse_region),
    metavar="X,Y,WIDTH,HEIGHT",
    help="Read only this part of the image, in pixels from the upper left corner.",
)
stabilise_option = click.option(
    "--stabilise",
    metavar="on|off",
    type=click.BOOL,
    help="Align the frames of a stream when the camera shakes, pans or turns, so that less is computed anew. "
    "off: always read the same part of the frame.  [default: on]",
)
threads_option = click.option(
    "--threads",
    type=click.IntRange(1, MOST_THREADS),
    help="Number of threads.  [default: the cores that this process may use]",
)
weights_option = click.option(
    "--weights",
    type=PATH,
    help="Weights file for a timm model (.safetensors or .pth). Without it, timm downloads the weights.",
)
keep_option = click.option(
    "--keep",
    callback=read_by(parse_keep),
    metavar="SHARE|SHARE,...",
    help="Share of the keys that each query tile reads (1: dense attention), or one share per "
    "layer from the first, such as .1,.1,.25,1; the last share applies to all remaining "
    "layers.  [default: the sparse model's own; for a new one 0.25, with --merge a value that"
    " suits the size]",
)
merge_option = click.option(
    "--merge",
    callback=read_by(parse_merge),
    metavar="N|FIRST..LAST",
    help="Tokens that each layer merges: one number, FIRST..LAST (linear from the first to the "
    "last layer), or a list with one number per layer.  [default: the sparse model's own; for"
    " a new one none]",
)
token_keep_option = click.option(
    "--token-keep",
    callback=read_by(parse_token_keep),
    metavar="LAYER:SHARE,...",
    help='Layers that prune tokens and the share that they keep, such as 3:.7,6:.7,9:.7; "" prunes'
    " nothing.  [default: the sparse model's own]",
)
trust_option = click.option(
    "--trust",
    multiple=True,
    metavar="MODULE",
    help="Module whose code may run, for a sparse model that was made from your own factory. Repeatable.",
)


def normalise_options(command: Command) -> Command:
    """Add `--mean`, `--std` and `--no-normalise`, which set the argument `normalise` (see `images.Normalise`)."""

    @functools.wraps(command)
    def with_normalise(*, mean: str | None, std: str | None, no_normalise: bool, **options: Any) -> Any:
        if (mean is None) != (std is None) or (no_normalise and mean is not None):
            raise click.UsageError("Give --mean and --std, or --no-normalise alone.")
        statistics = None if mean is None or std is None else (mean.split(","), std.split(","))
        return command(normalise=False if no_normalise else statistics, **options)

    for option in (
        click.option(
            "--no-normalise", is_flag=True, help="The model normalises its input itself and expects pixels from 0 to 1."
        ),
        click.option("--std", metavar="R,G,B", help="Standard deviation per channel, for pixels from 0 to 1."),
        click.option(
            "--mean",
            metavar="R,G,B",
            help="Mean per channel that the model expects, for pixels from 0 to 1.  [default: what the "
            "model or its library declares]",
        ),
    ):
        with_normalise = option(with_normalise)
    return cast(Command, with_normalise)


def group(arguments: Mapping[str, Any], /, **kinds: type) -> dict[str, Any]:
    """Group a command's options by type: the fields of each type become one value, all others stay.

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
    """Progress callback that renders as text: stage, share done, time so far and time left.

    The time left is extrapolated from the pace since the total last changed. Nothing is predicted while the total grows
    or after it was reached.
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
    """Show progress on standard error, and yield the callback that updates it.

    A terminal gets a bar, anything else a line every `EVERY_S` seconds.
    """
    text, finished = _ProgressText(stage), threading.Event()

    def print_progress() -> None:
        with contextlib.suppress(OSError, ValueError):  # The reader of standard error went away.
            while not finished.wait(EVERY_S):
                click.echo(str(text), err=True)

    if not visible:
        yield text
    elif err_console.is_terminal:
        with Live(text, console=err_console, transient=True):
            yield text
    else:
        threading.Thread(target=print_progress, name="progress", daemon=True).start()
        try:
            yield text
        finally:
            finished.set()


def print_json(content: Any) -> None:
    """Print one JSON document on standard output, with null for NaN and infinity."""
    click.echo(dump_json(finite(content)[0]), nl=False)


def normalisation_text(normalisation: Normalisation | None) -> str:
    """Describe the pixel normalisation that is part of the file."""
    from sparsifiner_edge.images import AS_IS

    none = "no normalisation: the module normalises pixels from 0 to 1 itself"
    return none if normalisation == AS_IS else f"normalisation in the file: {normalisation or 'unknown'}"


Shown = TypeVar("Shown")


def print_result(result: Shown, as_json: bool, show: Callable[[Shown], None], output: Path | None = None) -> None:
    """Print a record as JSON or with `show`, and write a `Result` to the file `output`."""
    if as_json:
        print_json(write_record(result))
    else:
        show(result)
    if output is not None:  # Last, so that a full disk does not hide the figures.
        from sparsifiner_edge.results import Result, write_result

        assert isinstance(result, Result)
        write_result(output, result)


def print_page(result: Result) -> None:
    """Print the tables and lines that the HTML report shows for a result, with the verdict last."""
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
    """Print a table on standard output: first column left-aligned, all others right-aligned."""
    table = Table(title=Text(printable(title), style="bold"), title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if number == 0 else "right", no_wrap=number == 0)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    Console(width=None if Console().is_terminal else 120).print(table)
