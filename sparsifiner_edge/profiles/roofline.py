"""The time of a transformer's operators on a device: the slower of arithmetic and memory, plus the cost of a launch.

After Williams, Waterman and Patterson, "Roofline" (CACM 2009), with a share of each peak that real kernels reach. The
shares are fitted to published and recorded measurements by `benchmarks/estimate.py`. How sparse attention in our CUDA
kernels compares with dense attention on a GPU is read from a table (`profiles/boards/gpu_attention.json`), which
`benchmarks/gpu_bound.py --table` makes from the kernels' machine code, six heads of 64 at tile 64: nothing of it was
measured; `build` measures instead.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.costs import FLOAT, LayerCosts, ModelShape, layer_costs, layers
from sparsifiner_edge.profiles.boards.board import Board

_HEADS = 6
"""Of the table's layers."""
SIZES = {"fp32": 4, "tf32": 4, "fp16": 2, "int8": 1}
"""Bytes of an element in memory."""
SPARSE_KINDS = ("predictor", "cells", "attention")
"""Kinds of operator whose cost in a sparse layer depends on the kernels."""
SCORE_PASSES = 6
"""Times that plain attention writes or reads its scores: product, scale, softmax, product."""
MERGE_LAUNCHES = {"native": 8, "kernels": 10, "bodies": 25}
"""Kernels of a layer that merges, sizes and places of its tokens included: as bodies so many are in an engine of
TensorRT-RTX (`benchmarks/engines_rtx.py`). 5 are left there without MatchTokens and MergeTokens
(`tests/tensorrt/test_real.py`), and CUDA kernels are four and one. native: a CPU's library."""


@dataclasses.dataclass(frozen=True)
class RooflineFit:
    """What real kernels reach, fitted.

    Attributes:
        linear, attention, predictor: share of peak arithmetic of matrix products with weights, of attention, of the
            choice of keys.
        int8: share of the speed-up from int8 that linear layers keep.
        bandwidth: share of peak memory bandwidth.
        launch_us: microseconds from one operator to the next.
        body_passes: times that function bodies write or read the scores of a sparse layer, its choice of keys included.
        spread: factor within which nine of ten left-out measurements fell.
        points: measurements behind it.
    """

    linear: float
    attention: float
    predictor: float
    int8: float
    bandwidth: float
    launch_us: float
    body_passes: float
    spread: float
    points: int


GPU_FIT = RooflineFit(
    linear=0.341, attention=0.341, predictor=0.341, int8=0.824, bandwidth=0.825, launch_us=13.9, body_passes=16.0,
    spread=1.44, points=26,
)  # fmt: skip
"""Published latencies of dense models; one share for all arithmetic. `body_passes` is judged: compilers fuse them."""
CPU_FIT = RooflineFit(
    linear=0.991, attention=1.0, predictor=0.153, int8=0.738, bandwidth=1.0, launch_us=56.1, body_passes=63.9,
    spread=1.35, points=24,
)  # fmt: skip
"""Recorded models, dense and sparse; left-out ones fell within 1.1, six on another processor within 1.2; `spread` is
judged, since peaks are seldom known as well."""


@dataclasses.dataclass(frozen=True)
class OperatorWork:
    """Work of one kind in one layer, for one inference of a whole batch.

    Attributes:
        layer: from 0; -1: before the layers.
        kind: as in `sparsifiner_edge.costs.MAC_KINDS`, or "embedding".
        engine: which share of `RooflineFit` holds: "linear", "attention" or "predictor".
        macs: multiply-accumulates.
        weights, activations: elements moved, at the operator's precision.
        scores: elements moved at four bytes, whatever the precision. body: the same, once for each of `body_passes`.
        launches: kernels.
    """

    layer: int
    kind: str
    engine: str
    macs: float
    weights: float
    activations: float
    launches: float
    scores: float = 0.0
    body: float = 0.0


@dataclasses.dataclass(frozen=True)
class Cost:
    """Seconds of an operator, and what takes them: "compute", "memory" or "launch"."""

    operator: OperatorWork
    moved_bytes: float
    seconds: float
    bound: str


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is to be done.

    Attributes:
        shape, sparsity: of the model.
        batch: images at once.
        portable: sparse layers run as function bodies, which keep scores and gathered keys in memory.
        materialised: dense attention does so too, as in ONNX Runtime on a CPU.
        merging: what runs MatchTokens and MergeTokens, a key of `MERGE_LAUNCHES`.
    """

    shape: ModelShape
    sparsity: SparsityConfig
    batch: int = 1
    portable: bool = False
    materialised: bool = False
    merging: str = "native"


def operators(work: Workload) -> list[OperatorWork]:
    """Every operator of an inference, in order."""
    shape, found = work.shape, [_embedding(work)]
    costs = layer_costs(shape, work.sparsity)
    for number, (here, share, left) in enumerate(layers(shape, work.sparsity)):
        found += _layer(number, costs[number], here, work, share)
        found += _merging(number, here, here.patches - left, work)
    return found


def _merging(number: int, shape: ModelShape, merged: int, work: Workload) -> list[OperatorWork]:
    """What `merged` pairs cost beside the arithmetic and keys that `_layer` counts as "pruning": old tokens read, new
    ones written, launches; as bodies the keys of all partners in a seeker's window, float32, written and read.
    """
    if not merged or not work.sparsity.merge:
        return []
    old = shape.prefix + shape.patches
    moved = work.batch * shape.width * (2 * old - merged)
    partners = 2 * work.batch * partner_elements(shape, work.sparsity) if work.merging == "bodies" else 0
    launches = MERGE_LAUNCHES[work.merging]
    return [OperatorWork(number, "pruning", "attention", 0, 0, moved, launches, scores=partners)]


def partner_elements(shape: ModelShape, sparsity: SparsityConfig) -> int:
    """Elements of the keys that all seekers of a layer of `shape` look at, gathered: seekers x window x head."""
    return shape.patches // 2 * sparsity.merge_window * (shape.width // shape.heads)


def _embedding(work: Workload) -> OperatorWork:
    shape, pixels = work.shape, 3 * work.shape.patch**2
    macs = work.batch * shape.patches * pixels * shape.width
    moved = work.batch * shape.patches * (pixels + 3 * shape.width)
    return OperatorWork(-1, "embedding", "linear", macs, pixels * shape.width, moved, 4)


def _layer(number: int, costs: LayerCosts, shape: ModelShape, work: Workload, share: float) -> list[OperatorWork]:
    """Projections and MLP, each with its normalisation and residual; pruning; attention."""

    def operator(kind: str, engine: str, launches: int, weights: int = 0) -> OperatorWork:
        moved = getattr(costs, f"{kind}_bytes") / FLOAT - weights  # The bytes of `costs` hold the weights once.
        return OperatorWork(
            number, kind, engine, work.batch * getattr(costs, kind), weights, work.batch * moved, launches
        )

    found = [
        operator("projections", "linear", 3, 4 * shape.width**2),
        operator("mlp", "linear", 3, 2 * shape.width * shape.hidden),
    ]
    if costs.pruning:
        found.append(dataclasses.replace(operator("pruning", "attention", 0), scores=6))
    if share < 1:
        found += [operator("predictor", "predictor", 2), operator("attention", "attention", 1)]
        found.append(operator("cells", "attention", 1 if costs.cells else 0))
        return [*found, *_bodies(number, shape, work, share)] if work.portable else found
    found.append(operator("attention", "attention", 1))
    if work.materialised:
        scores = work.batch * shape.heads * (shape.prefix + shape.patches) ** 2 * SCORE_PASSES
        found.append(OperatorWork(number, "attention", "attention", 0, 0, 0, 4, scores=scores))
    return found


def _bodies(number: int, shape: ModelShape, work: Workload, share: float) -> list[OperatorWork]:
    """What function bodies move beyond a kernel's own traffic: scores, and gathered keys written and read back."""
    sparsity, patches = work.sparsity.of_share(share), shape.patches
    layout = sparsity.layout(patches, shape.prefix)
    read = layout.keys if sparsity.preset == "paper" else layout.keys + shape.prefix
    ranked = work.batch * shape.heads * (-(-patches // sparsity.probe) + layout.tiles) * patches
    gathered = work.batch * 4 * layout.tiles * read * shape.width
    scores = work.batch * shape.heads * patches * (read + layout.cells)
    return [
        OperatorWork(number, "predictor", "predictor", 0, 0, 0, 12, body=ranked),
        OperatorWork(number, "attention", "attention", 0, 0, gathered, 20, body=scores),
    ]


def other_precision(precision: str, board: Board) -> str:
    """Of what is no linear layer: int8 is for those alone; the rest runs in fp16 where the board has it."""
    return ("fp16" if board.fp16_tflops else "fp32") if precision == "int8" else precision


def cost(operator: OperatorWork, board: Board, precision: str, fit: RooflineFit) -> Cost:
    """Time of one operator; with `IDEAL` as `fit`, what no program can beat at these peaks.

    Raises:
        ConfigError: the board has no arithmetic for the precision.
    """
    chosen = precision if operator.engine == "linear" else other_precision(precision, board)
    peak = board.peak(chosen) * getattr(fit, operator.engine) * (fit.int8 if chosen == "int8" else 1.0)
    moved = (operator.weights + operator.activations) * SIZES[chosen]
    moved += 4 * (operator.scores + operator.body * fit.body_passes)
    parts = {
        "compute": 2 * operator.macs / peak,
        "memory": moved / (board.bandwidth_gb_s * 1e9 * fit.bandwidth),
        "launch": operator.launches * fit.launch_us * 1e-6,
    }
    seconds = max(parts["compute"], parts["memory"]) + parts["launch"]
    return Cost(operator, moved, seconds, max(parts, key=lambda name: parts[name]))


IDEAL = RooflineFit(1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0)
"""Every peak reached, and no launch costs anything."""


def costs(work: Workload, board: Board, precision: str, fit: RooflineFit) -> list[Cost]:
    """Times of all operators of an inference; where kernels run sparse layers on a GPU, theirs by `times_faster`.

    Raises:
        ConfigError: see `cost`.
    """
    found = [cost(operator, board, precision, fit) for operator in operators(work)]
    if work.portable or fit is IDEAL or work.sparsity.preset == "paper":
        return found
    return _by_kernels(work, board, precision, fit, found)


def _by_kernels(work: Workload, board: Board, precision: str, fit: RooflineFit, found: Sequence[Cost]) -> list[Cost]:
    """Sparse operators as long as kernels take, shared out by arithmetic; the rest as it is."""
    shape, taken = work.shape, dict[int, float]()
    for number, (seen, keep, _) in enumerate(layers(shape, work.sparsity)):
        if keep == 1:
            continue
        here = dataclasses.replace(seen, depth=1)
        faster = times_faster(board, here.prefix + here.patches, keep, work.batch * shape.heads, launches=False)
        if faster is not None:
            dense = operators(dataclasses.replace(work, shape=here, sparsity=SparsityConfig(keep=1)))
            whole = [cost(o, board, precision, fit) for o in dense if o.kind == "attention"]
            macs = sum(c.operator.macs for c in found if c.operator.layer == number and c.operator.kind in SPARSE_KINDS)
            taken[number] = sum(c.seconds - _launch_seconds(c.operator, fit) for c in whole) / faster / macs
    return [
        dataclasses.replace(c, seconds=c.operator.macs * taken[c.operator.layer] + _launch_seconds(c.operator, fit))
        if c.operator.layer in taken and c.operator.kind in SPARSE_KINDS else c
        for c in found
    ]  # fmt: skip


def _launch_seconds(operator: OperatorWork, fit: RooflineFit) -> float:
    return operator.launches * fit.launch_us * 1e-6


def seconds(found: Sequence[Cost]) -> float:
    """Their sum."""
    return sum(c.seconds for c in found)


@functools.cache
def _table() -> dict[str, Any]:
    file = importlib.resources.files("sparsifiner_edge.boards").joinpath("gpu_attention.json")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def times_faster(board: Board, tokens: int, keep: float, lanes: int, *, launches: bool = True) -> float | None:
    """How often a layer's sparse attention, its choice of keys included, fits into the time of dense attention.

    Between the table's sizes, rates and batches it is interpolated, beyond them it is the nearest's.

    Args:
        lanes: batch x heads.
        launches: what launches cost by themselves, of three against one, counts too.

    Returns:
        None for a board that the table has no row of.
    """
    rows = _table()["whole" if launches else "busy"].get(board.name)
    if rows is None:
        return None
    grid = _table()["grid"]
    by_batch = [
        _between(grid["keep"], keep, [_between(grid["tokens"], tokens, row) for row in rates]) for rates in rows
    ]
    return _between(grid["batch"], lanes / _HEADS, by_batch)


def crossing(board: Board, keep: float, lanes: int) -> int | None:
    """The least number of tokens, of the table's, from which on sparse attention is faster; None if there is none."""
    sizes = _table()["grid"]["tokens"]
    slower = [n for n in sizes if (times_faster(board, n, keep, lanes) or 0) < 1]
    return min((n for n in sizes if n > max(slower, default=0)), default=None)


def _between(axis: Sequence[float], at: float, values: Sequence[float]) -> float:
    """By powers of the axis."""
    place = bisect_right(axis, at)
    if place in (0, len(axis)):
        return values[min(place, len(axis) - 1)]
    low, high = axis[place - 1], axis[place]
    share = math.log(at / low) / math.log(high / low)
    return float(values[place - 1] ** (1 - share) * values[place] ** share)
