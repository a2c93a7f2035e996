"""The time of a transformer's operators on a device: the slower of arithmetic and memory, plus the cost of a launch.

After Williams, Waterman and Patterson, "Roofline" (CACM 2009), with a share of each peak that real kernels reach. The
shares are fitted to published and recorded measurements by `benchmarks/estimate.py`. Of our CUDA kernels nothing was
measured: what they reach is judged from their machine code, and `build` measures instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.costs import FLOAT, LayerCosts, ModelShape, layer_costs, layers
from sparsifiner_edge.profiles.boards.board import Board

SIZES = {"fp32": 4, "tf32": 4, "fp16": 2, "int8": 1}
"""Bytes of an element in memory."""
SPARSE_KINDS = ("predictor", "cells", "attention")
"""Kinds of operator whose cost in a sparse layer depends on the kernels."""
SCORE_PASSES = 6
"""Times that plain attention writes or reads its scores: product, scale, softmax, product."""
MERGE_LAUNCHES = {"native": 8, "kernels": 5, "bodies": 25}
"""Kernels of a layer that merges, sizes and places of its tokens included: of bodies as counted in an engine of
TensorRT-RTX (`benchmarks/engines_rtx.py`), of which 5 are left without MatchTokens and MergeTokens
(`tests/tensorrt/test_rtx.py`); of CUDA kernels as in a bundle's table (`tests/test_board.py`). native: a CPU's
library."""


PRUNING_LAUNCHES = 6
"""Kernels of a layer after which tokens are pruned: scores, TopK, and gathers."""


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
    linear=0.341,
    attention=0.341,
    predictor=0.341,
    int8=0.824,
    bandwidth=0.825,
    launch_us=13.9,
    body_passes=16.0,
    spread=1.44,
    points=26,
)
"""Published latencies of dense models; one share for all arithmetic. `body_passes` is judged: compilers fuse them."""
GRAPH_FIT = dataclasses.replace(GPU_FIT, launch_us=2.0, attention=0.55)
"""As sessions run, judged: launched together as a CUDA graph, where a launch is an empty kernel and the gap before the
next one; and dense attention fused, which published figures of short sequences say little of.
"""
CPU_FIT = RooflineFit(
    linear=0.991,
    attention=1.0,
    predictor=0.153,
    int8=0.738,
    bandwidth=1.0,
    launch_us=56.1,
    body_passes=63.9,
    spread=1.35,
    points=24,
)
"""Recorded models, dense and sparse; left-out ones fell within 1.1, six on another processor within 1.2; `spread` is
set by judgement, since peaks are rarely known as well."""


KERNEL_SHARE = {80: 0.25, 86: 0.7, 87: 0.4, 89: 0.5, 90: 0.15, 100: 0.15, 110: 0.14, 120: 0.4}
"""How fast our CUDA kernels' arithmetic is beside dense attention's, by SM: judged, for some thousand tokens and a
tenth of the keys. They gather, and matrix units that outrun all else (90, 110) wait for it."""
SHARED_READS = {90: 1, 100: 1}
"""How often `attend` reads what it copied to shared memory, by SM: else once for each of its four warps."""
SHARED_CLOCK_BYTES, CORES_OF_SM = 128, {75: 64, 80: 64}
"""Bytes of shared memory that a multiprocessor moves in a clock; its CUDA cores, else 128."""


@dataclasses.dataclass(frozen=True)
class OperatorWork:
    """Work of one kind in one layer, for one inference of a whole batch.

    Attributes:
        layer: from 0; -1: before the layers.
        kind: as in `sparsifiner_edge.costs.MAC_KINDS`, or "embedding".
        engine: which share of `RooflineFit` holds: "linear", "attention" or "predictor"; "kernels": attention's, times
            `KERNEL_SHARE`.
        macs: multiply-accumulates.
        weights, activations: elements moved, at the operator's precision.
        scores: elements moved at four bytes, whatever the precision. body: the same, once for each of `body_passes`.
        launches: kernels. gathered: elements that kernels copy to shared memory.
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
    gathered: float = 0.0


@dataclasses.dataclass(frozen=True)
class Cost:
    """Seconds of an operator, and those of its launches alone."""

    operator: OperatorWork
    seconds: float
    launch_s: float


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is to be done.

    Attributes:
        shape, sparsity: of the model.
        batch: images at once.
        kernels: what runs sparse layers and merges, a key of `MERGE_LAUNCHES`; "bodies" keep scores and gathered keys
            in memory.
        materialised: dense attention does so too, as in ONNX Runtime on a CPU.
    """

    shape: ModelShape
    sparsity: SparsityConfig
    batch: int = 1
    kernels: str = "native"
    materialised: bool = False

    @property
    def portable(self) -> bool:
        """Whether sparse layers run as function bodies."""
        return self.kernels == "bodies"


def operators(work: Workload) -> list[OperatorWork]:
    """Every operator of an inference, in order."""
    shape, parts = work.shape, [_embedding(work)]
    costs = layer_costs(shape, work.sparsity)
    for number, (here, share, after) in enumerate(layers(shape, work.sparsity)):
        parts += _layer(number, costs[number], here, work, share)
        if here.patches > after and work.sparsity.merge:
            parts.append(_merging(number, here, here.patches - after, work))
    return parts


def _merging(number: int, shape: ModelShape, merged: int, work: Workload) -> OperatorWork:
    """What `merged` pairs cost beside the arithmetic and keys that `_layer` counts as "pruning": old tokens read, new
    ones written, launches; as bodies the keys of all partners in a seeker's window, float32, written and read.
    """
    moved = work.batch * shape.width * (2 * (shape.prefix + shape.patches) - merged)
    partners = 2 * work.batch * partner_elements(shape, work.sparsity) if work.portable else 0
    return OperatorWork(number, "pruning", "attention", 0, 0, moved, MERGE_LAUNCHES[work.kernels], scores=partners)


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
        moved = costs[kind].bytes / FLOAT - weights  # The bytes of `costs` hold the weights once.
        return OperatorWork(number, kind, engine, work.batch * costs[kind].macs, weights, work.batch * moved, launches)

    parts = [
        operator("projections", "linear", 3, 4 * shape.width**2),
        operator("mlp", "linear", 3, 2 * shape.width * shape.hidden),
    ]
    if costs["pruning"].macs:
        parts.append(operator("pruning", "attention", 0 if work.sparsity.merge else PRUNING_LAUNCHES))
    if share < 1:
        ours = work.kernels == "kernels"
        cells = operator("cells", "kernels" if ours else "attention", int(not ours and costs["cells"].macs > 0))
        chosen = operator("predictor", "kernels" if ours else "predictor", 2)
        read = operator("attention", "kernels" if ours else "attention", 1)
        if ours:  # `summarise` makes the cells too; `select` writes scores and reads them again.
            layout = work.sparsity.of_share(share).layout(shape.patches, shape.prefix)
            lists = 2.0 * work.batch * layout.tiles
            chosen = dataclasses.replace(chosen, scores=lists * shape.heads * shape.patches)
            read = dataclasses.replace(read, gathered=lists * layout.keys * shape.width)
        parts += [chosen, read, cells]
        return [*parts, *_bodies(number, shape, work, share)] if work.portable else parts
    parts.append(operator("attention", "attention", 1))
    if work.materialised:
        scores = work.batch * shape.heads * (shape.prefix + shape.patches) ** 2 * SCORE_PASSES
        parts.append(OperatorWork(number, "attention", "attention", 0, 0, 0, 4, scores=scores))
    return parts


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
    """Time of one operator.

    Raises:
        ConfigError: the board has no arithmetic for the precision.
    """
    chosen = precision if operator.engine == "linear" else other_precision(precision, board)
    kernels = operator.engine == "kernels"
    share = fit.attention * KERNEL_SHARE.get(board.sm, 1.0) if kernels else getattr(fit, operator.engine)
    peak = board.peak(chosen) * share * (fit.int8 if chosen == "int8" else 1.0)
    moved = (operator.weights + operator.activations) * SIZES[chosen]
    moved += 4 * (operator.scores + operator.body * fit.body_passes)
    memory_s = moved / (board.bandwidth_gb_s * 1e9 * fit.bandwidth)
    launch_s = operator.launches * fit.launch_us * 1e-6
    work_s = max(2 * operator.macs / peak, memory_s, _shared_s(operator, board, chosen))
    return Cost(operator, work_s + launch_s, launch_s)


def _shared_s(operator: OperatorWork, board: Board, precision: str) -> float:
    """Seconds in which shared memory takes what is gathered, and gives it to the matrix units."""
    if not operator.gathered:
        return 0.0
    multiprocessors = board.cuda_cores / CORES_OF_SM.get(board.sm, 128)
    moved = operator.gathered * SIZES[precision] * (1 + SHARED_READS.get(board.sm, 4))
    return moved / (multiprocessors * SHARED_CLOCK_BYTES * board.clock_ghz * 1e9)


def costs(work: Workload, board: Board, precision: str, fit: RooflineFit) -> list[Cost]:
    """Times of all operators of an inference.

    Raises:
        ConfigError: see `cost`.
    """
    return [cost(operator, board, precision, fit) for operator in operators(work)]


def faster_dense(work: Workload, board: Board, precision: str = "fp16") -> list[int]:
    """Of the sparse layers of a model, counted from 0, those whose attention would take less on a GPU if it were dense;
    none where that is not known.
    """
    if board.kind != "gpu" or precision not in board.peaks:
        return []
    shares = [(here, share) for here, share, _ in layers(work.shape, work.sparsity) if share < 1]

    def attention_s(here: ModelShape, share: float) -> float:
        sparsity = dataclasses.replace(work.sparsity, keep=share, merge=(), token_keep=())
        alone = dataclasses.replace(work, shape=dataclasses.replace(here, depth=1), sparsity=sparsity)
        return seconds([c for c in costs(alone, board, precision, GRAPH_FIT) if c.operator.kind in SPARSE_KINDS])

    return [n for n, (here, share) in enumerate(shares) if attention_s(here, 1.0) < attention_s(here, share)]


def seconds(spent: Sequence[Cost]) -> float:
    """Their sum."""
    return sum(c.seconds for c in spent)
