"""What export changes in a student, each measured: another tile, fewer cells, dense layers where those are faster.

A CPU core is busy with lists shared by 16 queries, tensor cores want 64, and the CUDA kernels have room for 32 cells.
The predictor's parameters depend on neither, so both are chosen at export; what they lose is measured on images.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import nn

from sparsifiner_edge.bundle.entries import LayerChoice, Measured, Retiled, Tiling
from sparsifiner_edge.errors import ConfigError, GateError
from sparsifiner_edge.execution import Execution
from sparsifiner_edge.export.graph import to_onnx
from sparsifiner_edge.export.piece_times import Piece, piece_times
from sparsifiner_edge.images import load_image
from sparsifiner_edge.ops.triton.plan import MOST_CELLS
from sparsifiner_edge.plan import plan_of
from sparsifiner_edge.sparse.attention import SparseAttention, make_dense, restore_attention
from sparsifiner_edge.sparse.calibrate import sparse_layers
from sparsifiner_edge.sparse.hosts import backbone_of
from sparsifiner_edge.sparse.patch import set_budget
from sparsifiner_edge.sparse.student import Student
from sparsifiner_edge.sparse.weights import normalise

GPU_TILE = 64
"""A quarter of the keys that tile 16 gathers, and whole tiles of the matrix units."""
LEAST_TOKENS_COSINE = 0.97
"""Gate: mean cosine of the final tokens to those of the student with its own layout, over the images."""


def changed(
    student: Student, tile: int | None, probe: int | None, measured_in: Execution | None, images: Sequence[Path],
    gpu: bool,
) -> tuple[Student, dict[str, Any]]:  # fmt: skip
    """The student with another tile, for a GPU with what suits it; layers kept dense where that is faster here, run as
    said (None: not asked for); what of it the manifest says.
    """
    changes: dict[str, Any] = {}
    own = student.sparsity
    most = MOST_CELLS - student.backbone.prefix if gpu else own.cells
    if tile is not None or probe is not None:
        sizes = (own.tile if tile is None else tile, own.probe if probe is None else probe)
        layout = Tiling(*sizes, min(own.cells, most))
        student, changes["retiled"] = with_layout(student, layout, images)
    elif gpu and not own.is_dense and own.preset == "edge":
        student, changes["retiled"] = with_gpu_layout(student, images)
    if measured_in is not None and sparse_layers(student.model):
        measured = changes["measured"] = keep_dense_where_slower(student.model, measured_in)
        kept = {number for choice in measured.choices if choice.kept_dense for number in choice.layers}
        plan = plan_of(student.sparsity, len(student.backbone.layers), student.backbone.patches)
        shares = (1.0 if layer in kept else share for layer, share in enumerate(plan.keep))
        student = dataclasses.replace(student, sparsity=dataclasses.replace(student.sparsity, keep=tuple(shares)))
    return student, changes


def with_gpu_layout(student: Student, images: Sequence[Path]) -> tuple[Student, Retiled | None]:
    """The student with `GPU_TILE` and no more cells than the kernels have room for (`MOST_CELLS`), or with those cells
    alone, or as it is, where that fails the gate or cannot be judged; and the manifest's entry, which says why. None
    where nothing is to change.
    """
    own = Tiling(student.sparsity.tile, student.sparsity.probe, student.sparsity.cells)
    cells = min(student.sparsity.cells, MOST_CELLS - student.backbone.prefix)
    tiles = max(student.sparsity.tile, GPU_TILE), student.sparsity.tile
    refused = None
    for layout in dict.fromkeys(Tiling(tile, own.probe, cells) for tile in tiles):
        if layout == own:
            continue
        try:
            made, entry = with_layout(student, layout, images)
        except (ConfigError, GateError) as error:
            refused = refused or f"{error.what} {error.fix}"
        else:
            return made, msgspec.structs.replace(entry, refused=refused)
    return student, Retiled(own, own, images=len(images), refused=refused) if refused else None


def with_layout(student: Student, layout: Tiling, images: Sequence[Path]) -> tuple[Student, Retiled]:
    """A student with another tile, probe or number of cells, and what that changed, for the manifest.

    Args:
        student: of the preset "edge"; left as it is.
        images: what the gate judges by.

    Raises:
        ConfigError: a dense student, the preset "paper", no images, or sizes that do not fit.
        GateError: the final tokens change by more than `LEAST_TOKENS_COSINE` allows.
    """
    own = student.sparsity
    if own.is_dense or own.preset != "edge":
        raise ConfigError("--tile and --probe require a sparse student of the preset 'edge'.", "Leave them out.")
    if own.token_keep:
        raise ConfigError(
            "A student that prunes tokens keeps different tokens with another tile, so the two cannot be compared.",
            "Choose the tile with `sparsify --set tile=64`.",
        )
    if not images:
        raise ConfigError("Another tile, or fewer cells, require images to judge by.", "Give some: --calibrate DIR.")
    sparsity = dataclasses.replace(own, **msgspec.structs.asdict(layout))
    made = dataclasses.replace(student, model=copy.deepcopy(student.model), sparsity=sparsity)
    set_budget(made.model, sparsity)
    found = _cosine(student, made, images)
    if found < LEAST_TOKENS_COSINE:
        raise GateError(
            f"With tile {sparsity.tile}, probe {sparsity.probe}, {sparsity.cells} cells the final tokens have cosine "
            f"{found:.4f} to those with tile {own.tile}, probe {own.probe}, {own.cells} cells, allowed "
            f"{LEAST_TOKENS_COSINE}.",
            "Choose a smaller tile, or read more keys: --keep.",
        )
    return made, Retiled(Tiling(own.tile, own.probe, own.cells), layout, found, len(images))


@torch.no_grad()
def _cosine(own: Student, changed: Student, images: Sequence[Path]) -> float:
    """Mean over images and final tokens."""
    pre, means = own.normalisation, []
    for path in images:
        image = normalise(torch.from_numpy(load_image(path, own.img_size))[None], pre)
        before, after = (student.backbone.tokens(image) for student in (own, changed))
        means.append(float(torch.cosine_similarity(before, after, dim=-1).mean()))
    return statistics.fmean(means)


def keep_dense_where_slower(model: Any, execution: Execution | None = None) -> Measured:
    """Turn sparse layers of a model, in place, into dense ones where sparse attention is slower on this machine.

    Both run on the kernels that a session of the backend would use here, with the layer's own sizes, selection and
    cells included, one image at a time, in turn; medians decide. Layers of equal sizes are measured once, and what this
    machine has measured before is not measured again (see `piece_times`).
    """
    groups: dict[tuple[Any, ...], list[tuple[int, SparseAttention]]] = {}
    merged, backbone = False, backbone_of(model)
    for number, (layer, attention) in enumerate(zip(backbone.layers, backbone.attentions, strict=True)):
        if isinstance(attention, SparseAttention):
            key = (merged, attention.geometry, attention.num_prefix, attention.layout, attention.sparsity)
            groups.setdefault(key, []).append((number, attention))
        merged = merged or layer.merging is not None  # The first of them attends to single tokens yet.
    pieces = {
        (number, densely): _piece(members[0][1], key[0], densely)
        for number, (key, members) in enumerate(groups.items())
        for densely in (False, True)
    }
    execution = execution or Execution()
    found, choices = piece_times(pieces, execution), []
    for number, members in enumerate(groups.values()):
        sparse, dense = found.ms[number, False], found.ms[number, True]
        slower = sparse > dense
        for _, attention in members if slower else ():
            restore_attention(attention)
            make_dense(attention)
        choices.append(LayerChoice(tuple(layer for layer, _ in members), sparse, dense, slower))
    left = len(sparse_layers(model))
    return Measured(found.kernels, tuple(choices), left, execution.backend, execution.precision)


class _Attend(nn.Module):
    """A layer's attention alone: qkv [1,N,3C], and sizes [1,N] where tokens are merged -> [1,N,C]; of pruned tokens the
    first are left.
    """

    def __init__(self, layer: SparseAttention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, qkv: torch.Tensor, sizes: torch.Tensor | None = None) -> torch.Tensor:
        return self.layer.attend(qkv, sizes)


def _piece(layer: SparseAttention, merged: bool, densely: bool) -> Piece:
    """Selection and sparse attention, or dense attention, over merged tokens or not."""
    tokens = layer.layout.patches + layer.num_prefix
    channels = layer.geometry.heads * layer.geometry.dim
    qkv = np.random.default_rng(0).normal(size=(1, tokens, 3 * channels)).astype(np.float32)
    feed = {"qkv": qkv} | ({"sizes": np.ones((1, tokens), np.float32)} if merged else {})
    layer.densely = densely
    try:
        graph = to_onnx(_Attend(layer).eval(), {name: torch.from_numpy(x) for name, x in feed.items()}, ["output"])
    finally:
        del layer.densely
    return Piece(graph, feed)
