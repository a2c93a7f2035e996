"""`sparsifiner-edge export`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from msgspec.structs import astuple

from sparsifiner_edge.bounds import MOST_COUNT
from sparsifiner_edge.bundle.entries import Check
from sparsifiner_edge.cli import common
from sparsifiner_edge.config import merge_text
from sparsifiner_edge.execution import ON_PROCESSOR, PRECISIONS, Execution

if TYPE_CHECKING:  # Help is light: a manifest's types bring numpy.
    from sparsifiner_edge.bundle.manifest import Manifest
    from sparsifiner_edge.bundle.store import Bundle


def _execution(text: str) -> Execution:
    """ "openvino:bf16" -> in that backend and precision; "openvino" -> as the file stores it."""
    backend, _, precision = text.partition(":")
    if backend not in ON_PROCESSOR or precision not in ("", *PRECISIONS):
        choices = f"{' or '.join(ON_PROCESSOR)}, then {', '.join(PRECISIONS)}"
        raise click.BadParameter(f"{text!r:.60} is not BACKEND or BACKEND:PRECISION ({choices}).")
    return Execution(backend=backend, precision=precision or "auto")


@click.command()
@click.argument("source", metavar="STUDENT|MODEL")
@common.weights_option
@common.img_size_option
@common.keep_option
@common.merge_option
@common.trust_option
@click.option("--tile", type=click.IntRange(1, MOST_COUNT), help="Queries that share one list; with --board 64.")
@click.option("--probe", type=click.IntRange(1, MOST_COUNT), help="Queries that ask as one; divides the tile.")
@click.option("--precision", type=click.Choice(["fp32", "fp16", "int8"]), default="fp32", show_default=True,
              help="fp16: softmax, norms and selection stay in fp32. int8: the linear layers alone.")  # fmt: skip
@click.option("--calibrate", type=common.PATH,
              help="A folder of images: int8 is calibrated with them, another tile is judged by them.")  # fmt: skip
@click.option("--int8-target", "int8_target", type=click.Choice(["cpu", "tensorrt"]), default="cpu",
              show_default=True, help="For int8: what will run it.")  # fmt: skip
@click.option("--measure", metavar="BACKEND[:PRECISION]", callback=common.read_by(_execution),
              help="Keep layers dense where that is faster on this machine, such as in openvino:bf16.")  # fmt: skip
@click.option("--board", "boards", multiple=True, metavar="NAME|FILE",
              help="Also compile float16 kernels for this board (see `estimate --list`); repeatable.")  # fmt: skip
@click.option("--inline", is_flag=True,
              help="Standard operators alone, for runtimes that know no local functions; no kernels.")  # fmt: skip
@click.option("--batch", default="1", show_default=True, help='A fixed batch size, or "dynamic".')
@click.option("--tokens", is_flag=True, help="Also give the tokens of a classifier, or of a model with a decoder.")
@common.normalise_options
@common.json_option
@common.output_option("Bundle folder to write.")
def command(*, source: str, output: Path, as_json: bool, **options: Any) -> None:
    """Export a student folder, or MODEL (see sparsify) as the dense baseline, to ONNX, checked against PyTorch."""
    import sparsifiner_edge
    from sparsifiner_edge.bundle.manifest import manifest_content
    from sparsifiner_edge.bundle.store import open_bundle

    with common.progress_bar("exporting and checking") as progress:
        folder = sparsifiner_edge.export_bundle(source, output, progress=progress, **options)
    bundle = open_bundle(folder)
    if as_json:
        common.print_json(manifest_content(bundle.manifest))
    else:
        _print(bundle)


def _print(bundle: Bundle) -> None:
    folder, manifest = bundle.folder, bundle.manifest
    if manifest.preprocessing is not None:
        click.echo(common.normalisation_text(manifest.preprocessing.folded))
    for line in (*_check(manifest), *_merged(manifest), *_changes(manifest), *_measured(manifest)):
        click.echo(line)
    for board in manifest.boards:
        counts = f"{board.launches} kernels for {board.nodes} nodes"
        left = f"; {len(board.refused)} nodes keep their bodies" if board.refused else ""
        click.echo(f"{board.board}: {counts}, compute capability {board.compute_capability}{left}")
    none = "none: plain dense attention in standard operators"
    if manifest.sparsity is not None:
        none = "none: inlined, so that kernels have nothing to take; slow, wherever it runs"
    click.echo(f"custom operators (with bodies in standard operators): {', '.join(manifest.ops) or none}")
    click.echo(f"{folder}: bundle written. Next: sparsifiner-edge profile {folder}")


def _merged(manifest: Manifest) -> Iterator[str]:
    """What each layer merges."""
    if manifest.plan and manifest.sparsity and manifest.sparsity.merge:
        merged, asked = ", ".join(map(str, manifest.plan.merge)), merge_text(manifest.sparsity.merge)
        yield f"tokens merged per layer: {merged} (--merge {asked}; a quarter of a layer's patches at most)"


def _check(manifest: Manifest) -> Iterator[str]:
    """How close the file is to torch."""
    check = manifest.check or Check()
    for name, found in check.outputs.items():
        yield (
            f"{name}: differs from torch by {found.error_relative_to_range:.1e} of its range "
            f"({found.error_with_equal_selection:.1e} with the same keys), "
            f"least cosine {found.least_row_cosine:.7f}"
        )
    if check.selected_indices:
        yield f"selected keys: {check.differing_indices} of {check.selected_indices} differ from torch"
    if check.differing_tokens:
        yield f"kept tokens: {check.differing_tokens} differ from torch"


def _changes(manifest: Manifest) -> Iterator[str]:
    """What another tile, int8 and float16 cost."""
    found = manifest.retiled
    if found and found.refused:
        yield f"the layout that suits GPUs (tile 64, fewer cells) is not taken whole: {found.refused}"
    if found and found.before != found.after:
        pairs = zip(("tile", "probe", "cells"), astuple(found.before), astuple(found.after), strict=True)
        sizes = ", ".join(f"{name} {before} -> {after}" for name, before, after in pairs if before != after)
        yield f"{sizes}: cosine to before {found.cosine:.4f}, {found.images} images"
    if quantised := manifest.quantisation:
        least = min(quantised.cosines.values())
        own = quantised.own_matches_cosines.values()
        others = f" with the same merges, {min(own):.4f} with its own" if own else ""
        counts = f"{quantised.quantised} linear layers, {len(quantised.kept)} left out"
        yield f"int8: {counts}, cosine {least:.4f}{others}"
    if half := manifest.float16:
        least = min(half.least_row_cosines.values())
        counts = f"{half.nodes_float16} nodes, {half.nodes_float32} left in fp32"
        yield f"fp16: {counts}, least cosine to before {least:.5f}; kernels: {half.kernels}"


def _measured(manifest: Manifest) -> Iterator[str]:
    """Which layers are kept dense on this machine."""
    if manifest.measured is None:
        return
    measured = manifest.measured
    precision = "" if measured.precision == "auto" else f", {measured.precision}"
    yield f"measured in {measured.backend}{precision}, {measured.kernels}:"
    for choice in measured.choices:
        yield (
            f"layers {choice.layers[0]} to {choice.layers[-1]}: sparse attention {choice.sparse_ms:.2f} ms, "
            f"dense {choice.dense_ms:.2f} ms: {'kept dense' if choice.kept_dense else 'sparse'}"
        )
