"""`sparsifiner-edge export`."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparsifiner_edge.bundle.entries import Check
from sparsifiner_edge.cli import common
from sparsifiner_edge.config import merge_text
from sparsifiner_edge.execution import INT8_TARGETS, WEIGHT_PRECISIONS
from sparsifiner_edge.fitting import FITS
from sparsifiner_edge.text import printable

if TYPE_CHECKING:  # Keep `--help` fast: a manifest's types import numpy.
    from sparsifiner_edge.bundle.manifest import Manifest
    from sparsifiner_edge.bundle.store import Bundle


@click.command()
@click.argument("source", metavar="STUDENT|MODEL")
@common.weights_option
@common.img_size_option
@common.keep_option
@common.merge_option
@common.trust_option
@click.option(
    "--precision",
    type=click.Choice(WEIGHT_PRECISIONS),
    default="fp32",
    show_default=True,
    help="Weight precision of the file. fp16: softmax, norms and key selection stay in fp32. int8: linear layers only.",
)
@click.option(
    "--calibrate",
    type=common.PATH,
    help="Folder of images to calibrate int8 with, and to check the tile size for a board.",
)
@click.option(
    "--check",
    metavar="package.module:function",
    help="Function of yours that the exported file must agree with on --data (docs/models.md).",
)
@click.option("--data", type=common.PATH, help="Image or folder of images for --check.")
@click.option(
    "--int8-target",
    "int8_target",
    type=click.Choice(INT8_TARGETS),
    default="cpu",
    show_default=True,
    help="Runtime family that will run the int8 file.",
)
@click.option(
    "--board",
    "boards",
    multiple=True,
    metavar="NAME|FILE",
    help="Also compile float16 CUDA kernels for this board (list: `estimate --list`). Repeatable.",
)
@common.labels_option
@click.option("--batch", default="1", show_default=True, help='Batch size: a number, or "dynamic".')
@click.option(
    "--fit",
    type=click.Choice(FITS),
    default="crop",
    show_default=True,
    help="Default way in which `run` and `evaluate` fit images to the model's input.",
)
@click.option(
    "--stream",
    is_flag=True,
    help="Also export the stream files: `run` then recomputes only the patches that changed.",
)
@click.option(
    "--tokens", is_flag=True, help="Also output the final tokens of a classifier or of a model with a decoder."
)
@common.normalise_options
@common.json_option
@common.output_option("Bundle folder to write.")
def command(*, source: str, output: Path, as_json: bool, **options: Any) -> None:
    """Export STUDENT, or MODEL as the dense baseline, to an ONNX bundle that was checked against PyTorch.

    MODEL is a timm name, a Hugging Face folder or package.module:factory, as for `sparsify`.
    """
    import sparsifiner_edge as se
    from sparsifiner_edge.bundle.manifest import manifest_content
    from sparsifiner_edge.bundle.store import open_bundle

    groups = common.group(options, model=se.ModelOptions, budget=se.Budget, options=se.ExportOptions)
    with common.progress_bar("exporting and checking") as progress:
        folder = se.export_bundle(source, output, progress=progress, **groups)
    bundle = open_bundle(folder)
    if as_json:
        common.print_json(manifest_content(bundle.manifest))
    else:
        _print(bundle)


def _print(bundle: Bundle) -> None:
    folder, manifest = bundle.folder, bundle.manifest
    if manifest.preprocessing is not None:
        click.echo(common.normalisation_text(manifest.preprocessing.folded))
    if manifest.user_call is not None:
        click.echo(f"compared with {printable(manifest.user_call, 2000)}")
    for line in (*_check(manifest), *_merge_lines(manifest), *_changes(manifest)):
        click.echo(line)
    for board in manifest.boards:
        counts = f"{board.launches} kernels for {board.nodes} nodes"
        bodies = f"; {len(board.refused)} nodes keep their function bodies" if board.refused else ""
        click.echo(f"{board.board}: {counts}, compute capability {board.compute_capability}{bodies}")
    none = "none: plain dense attention in standard operators"
    click.echo(f"custom operators (with ONNX function bodies): {', '.join(manifest.ops) or none}")
    if "logits" in {output.name for output in manifest.outputs} and not bundle.labels():
        click.echo("no class names: the model has none, or not one per logit (give them with --labels FILE)")
    quoted = shlex.quote(str(folder))
    others = f"(or run {quoted} --source IMAGES/)"
    click.echo(f"{folder}: bundle written. Next: sparsifiner-edge profile {quoted}     {others}")


def _merge_lines(manifest: Manifest) -> Iterator[str]:
    """Yield a line with the tokens that each layer merges."""
    if manifest.plan and manifest.sparsity and manifest.sparsity.merge:
        merged, requested = ", ".join(map(str, manifest.plan.merge)), merge_text(manifest.sparsity.merge)
        yield f"tokens merged per layer: {merged} (--merge {requested}; a quarter of a layer's patches at most)"


def _check(manifest: Manifest) -> Iterator[str]:
    """Yield lines that compare the file with PyTorch."""
    check = manifest.check or Check()
    for name, error in check.errors.items():
        same, cosine = check.errors_with_equal_selection[name], check.least_row_cosines[name]
        yield (
            f"{name}: differs from torch by {error:.1e} of its range ({same:.1e} with the same keys), "
            f"least cosine {cosine:.7f}"
        )
    if check.selected_indices:
        yield f"selected keys: {check.differing_indices} of {check.selected_indices} differ from torch"
    if check.differing_tokens:
        yield f"kept tokens: {check.differing_tokens} differ from torch"


def _changes(manifest: Manifest) -> Iterator[str]:
    """Yield lines on the cost of another tile size, int8 and float16."""
    retiled = manifest.retiled
    if retiled and retiled.refused:
        yield f"the layout that suits GPUs (tile 64, fewer background tokens) was not fully applied: {retiled.refused}"
    if retiled and retiled.cosine is not None and manifest.sparsity:
        pairs = (
            ("tile", retiled.tile, manifest.sparsity.tile),
            ("background_tokens", retiled.background_tokens, manifest.sparsity.background_tokens),
        )
        sizes = ", ".join(f"{name} {before} -> {after}" for name, before, after in pairs if before != after)
        yield f"{sizes}: cosine to the original layout {retiled.cosine:.4f}, {retiled.images} images"
    if quantised := manifest.quantisation:
        least = min(quantised.cosines.values())
        cosines = quantised.own_matches_cosines.values()
        others = f" with the same merges, {min(cosines):.4f} with its own" if cosines else ""
        counts = f"{quantised.quantised} linear layers, {len(quantised.kept)} left out"
        yield f"int8: {counts}, cosine {least:.4f}{others}"
    if half := manifest.float16:
        least = min(half.least_row_cosines.values())
        counts = f"{half.nodes_float16} nodes, {half.nodes_float32} left in fp32"
        yield f"fp16: {counts}, least cosine to float32 {least:.5f}"
