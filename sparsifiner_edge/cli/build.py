"""`sparsifiner-edge build`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparsifiner_edge.artifacts import SIGNATURE_FILE
from sparsifiner_edge.bounds import MOST_BATCH, MOST_SECONDS, whole_number
from sparsifiner_edge.cli import common
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.execution import KERNEL_CHOICES
from sparsifiner_edge.records import write_record
from sparsifiner_edge.text import printable

if TYPE_CHECKING:
    from sparsifiner_edge.bundle.engines import Engine
    from sparsifiner_edge.runtime.build import BuildResult


def _batch(text: str) -> tuple[int, int, int]:
    """Parse `--batch`: "4" -> (4, 4, 4), "1,2,8" -> (1, 2, 8)."""
    sizes = [whole_number(part, "--batch", most=MOST_BATCH) for part in text.split(",")]
    if len(sizes) not in (1, 3):
        raise ConfigError(f"--batch is {text:.40}.", "Give a size, or three: LEAST,BEST,MOST.")
    return sizes[0], sizes[len(sizes) // 2], sizes[-1]


@click.command()
@common.bundle_argument
@click.option(
    "--compute-capability",
    metavar="X.Y,...",
    help="Compute capabilities to build for, such as 8.6,8.9.  [default: this machine's GPU]",
)
@click.option(
    "--batch",
    metavar="SIZE|LEAST,BEST,MOST",
    callback=common.read_by(_batch),
    help="Batch sizes of an engine with a dynamic batch; BEST is the size it is tuned for.  [default: 1,1,8]",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=common.FiniteRange(0, MOST_SECONDS, min_open=True),
    help="Time limit for building one engine variant, in seconds.  [default: 600; 1800 on a Jetson]",
)
@click.option("--backend", required=True, help="Backend to build for: tensorrt or tensorrt-rtx.")
@click.option(
    "--kernels",
    type=click.Choice(KERNEL_CHOICES),
    default="auto",
    show_default=True,
    help="Implementation of sparse attention and merging. auto: the fastest; native: the CUDA "
    "kernels; portable: ONNX function bodies.",
)
@click.option(
    "--bisect",
    is_flag=True,
    help="Report the first layer at which an engine built from function bodies exceeds the golden "
    "tolerance, instead of adding engines to the bundle.",
)
@common.json_option
def command(*, bundle: Path, compute_capability: str | None, bisect: bool, as_json: bool, **options: Any) -> None:
    """Build engines for BUNDLE and add them to it.

    If the target GPU is present, each engine is checked with the golden pair.
    """
    import sparsifiner_edge as se

    if bisect:
        others = {
            "kernels": options["kernels"] != "auto",
            "batch": options["batch"],
            "compute-capability": compute_capability,
        }
        for name in (name for name, value in others.items() if value):
            raise ConfigError(
                f"--bisect builds function bodies for this machine and cannot be combined with --{name}.",
                "Leave it out.",
            )
        _bisect(bundle, options["backend"], options["timeout_s"] or 1800.0, as_json)
        return
    with common.progress_bar("starting") as progress:
        result = se.build_engine(
            bundle,
            compute_capabilities=compute_capability.split(",") if compute_capability is not None else (),
            progress=progress,
            **options,
        )
    common.print_result(result, as_json, _print)
    if (bundle / SIGNATURE_FILE).is_file():
        click.echo(
            f"warning: {bundle} has changed, and its signature is no longer valid. Sign it again: "
            f"sparsifiner-edge bundle sign {bundle} --key KEY",
            err=True,
        )


def _bisect(bundle: Path, backend: str, timeout_s: float, as_json: bool) -> None:
    from sparsifiner_edge.runtime.bisect import bisect_layers

    layers = bisect_layers(bundle, backend, timeout_s=timeout_s)
    beyond = next((layer for layer in layers if layer.beyond), None)
    rows = [[x.layer, f"{x.error:.3g}", f"{x.tolerance:.3g}", f"{x.cosine:.6f}"] for x in layers]

    def show(_: object) -> None:
        heads = ["layer", "largest difference / range", "tolerance", "mean cosine"]
        common.print_table(f"{backend} compared with ONNX Runtime", heads, rows)
        click.echo(f"First layer beyond its tolerance: {printable(beyond.layer) if beyond else 'none'}")

    common.print_result({"layers": write_record(layers)}, as_json, show)
    if beyond is not None:
        raise click.exceptions.Exit(1)


def _print(result: BuildResult) -> None:
    from sparsifiner_edge.runtime.build import verdict

    heads = ["compute capability", "precision", "batch", "MB", "seconds", "golden pair"]
    common.print_table(f"{result.backend} {result.version}", heads, [_row(engine) for engine in result.engines])
    for engine in result.engines:
        click.echo(printable(f"{result.bundle}/{engine.file}", 5000))
        for line in verdict(engine.details):
            click.echo(f"  {printable(line, 2000)}")
        if engine.details.chosen.failed:
            click.echo(f"  not run here: {printable(engine.details.chosen.failed, 2000)}")


def _row(engine: Engine) -> list[str]:
    batch, details = engine.batch, engine.details
    sizes = "-".join(map(str, dict.fromkeys((batch.least, batch.best, batch.most))))
    megabytes, seconds = f"{(details.bytes or 0) / 1e6:.1f}", f"{details.build_seconds or 0:.1f}"
    return [engine.compute_capability, engine.precision, sizes, megabytes, seconds, _check(engine)]


def _check(engine: Engine) -> str:
    from sparsifiner_edge.runtime.golden import beyond_text

    golden = engine.details.chosen.golden
    if not isinstance(golden, dict):
        return "not run"
    worst = max(golden.values(), key=lambda errors: errors["range_relative_error"])
    return f"within {worst['range_relative_error']:.1e}{beyond_text(worst)}"
