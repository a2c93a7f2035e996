"""Roofline model of a transformer's operators: the longer of arithmetic and memory time, plus the cost of a launch.

After Williams, Waterman and Patterson, "Roofline" (CACM 2009), with the shares of the peaks that real kernels reach.
`benchmarks/estimate.py` fits these shares to published and recorded measurements. There are no measurements of our CUDA
kernels on the boards: their shares are judgements from the machine code, and `build` measures the engines.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.costs import FLOAT, LayerCosts, ModelShape, layer_costs, layers
from sparsifiner_edge.profiles.boards.board import Board

SIZES = {"fp32": 4, "tf32": 4, "fp16": 2, "int8": 1}
"""Bytes per element in memory, by precision."""
SPARSE_KINDS = ("predictor", "background", "attention")
"""Kinds of operator whose cost in a sparse layer depends on the kernels."""
SCORE_PASSES = 6
"""Times that dense attention without fusion writes or reads its scores: product, scale, softmax, product."""
MERGE_LAUNCHES = {"native": 8, "kernels": 5, "bodies": 25}
"""Number of kernel launches for merging in one layer, including those for the sizes and positions of tokens.

Keys: "bodies" are ONNX function bodies, counted in a TensorRT-RTX engine (`benchmarks/engines_rtx.py`), where 5
launches remain without MatchTokens and MergeTokens (`tests/tensorrt/test_rtx.py`). "kernels" are the CUDA kernels,
counted in a bundle's kernel table (`tests/test_board.py`). "native" is the CPU library.
"""


PRUNING_LAUNCHES = 6
"""Number of kernel launches for pruning tokens after a layer: scores, TopK and gathers."""


@dataclasses.dataclass(frozen=True)
class RooflineFit:
    """Shares of the peaks that real kernels reach, fitted to measurements.

    Attributes:
        linear: Share of the peak arithmetic in matrix products with weights.
        attention: Share of the peak arithmetic in attention.
        predictor: Share of the peak arithmetic in the selection of keys.
        int8: Share of the speed-up of int8 that linear layers reach.
        bandwidth: Share of the peak memory bandwidth.
        launch_us: Time from one operator to the next in microseconds.
        body_passes: Times that function bodies write or read the scores of a sparse layer, including key selection.
        spread: Factor within which nine of ten left-out measurements fell.
        points: Number of measurements.
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
"""Fit to published latencies of dense models on GPUs, with one share for all arithmetic.

`body_passes` is a judgement, because compilers fuse these passes.
"""
GRAPH_FIT = dataclasses.replace(GPU_FIT, launch_us=2.0, attention=0.55)
"""`GPU_FIT` adapted to our sessions, which launch all kernels as one CUDA graph and fuse dense attention.

Both values are judgements. In a graph, a launch costs an empty kernel and the gap before the next one. Published
latencies of short sequences reveal little about attention.
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
"""Fit to recorded latencies of dense and sparse models on CPUs.

Left-out models fell within a factor of 1.1, and six models on another processor within 1.2. `spread` is a judgement and
larger, because the peaks of a CPU are rarely known that well.
"""


KERNEL_SHARE = {80: 0.25, 86: 0.7, 87: 0.4, 89: 0.5, 90: 0.15, 100: 0.15, 110: 0.14, 120: 0.4}
"""Arithmetic throughput of our CUDA kernels relative to dense attention, by compute capability (87: 8.7).

These are judgements for about a thousand tokens and a tenth of the keys. The kernels gather keys, and the fastest
tensor cores (SM 90 and 110) wait for that.
"""
SHARED_READS = {90: 1, 100: 1}
"""Times that the kernel `attend` reads the data that it copied to shared memory, by compute capability.

On all others, each of its four warps reads them once.
"""
SHARED_CLOCK_BYTES = 128
"""Bytes of shared memory that a multiprocessor moves per clock."""
CORES_OF_SM = {75: 64, 80: 64}
"""Number of CUDA cores per multiprocessor, by compute capability; 128 for all others."""


@dataclasses.dataclass(frozen=True)
class OperatorWork:
    """Work of one kind in one layer, for one inference of a batch.

    Attributes:
        layer: Index of the layer, from 0; -1 before the layers.
        kind: One of `sparsifiner_edge.costs.MAC_KINDS`, or "embedding".
        engine: Share of `RooflineFit` that applies: "linear", "attention" or "predictor". "kernels" is the share of
            "attention" times `KERNEL_SHARE`.
        macs: Multiply-accumulates.
        weights: Weights moved, in elements at the operator's precision.
        activations: Activations moved, in elements at the operator's precision.
        launches: Number of kernel launches.
        scores: Elements of four bytes moved, at any precision.
        body: Elements of four bytes that are moved `body_passes` times, at any precision.
        gathered: Elements that kernels copy to shared memory.
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
    """Estimated time of an operator.

    Attributes:
        operator: The operator.
        seconds: Total time in seconds.
        launch_s: Time of the launches alone in seconds.
    """

    operator: OperatorWork
    seconds: float
    launch_s: float


@dataclasses.dataclass(frozen=True)
class Workload:
    """Model, batch size and implementation to estimate.

    Attributes:
        shape: Sizes of the model.
        sparsity: Settings of sparsity.
        batch: Batch size.
        kernels: Implementation of sparse layers and merging, a key of `MERGE_LAUNCHES`. "bodies" keep scores and
            gathered keys in memory.
        materialised: True if dense attention keeps its scores in memory too, as in ONNX Runtime on a CPU.
    """

    shape: ModelShape
    sparsity: SparsityConfig
    batch: int = 1
    kernels: str = "native"
    materialised: bool = False

    @property
    def portable(self) -> bool:
        """True if sparse layers run as ONNX function bodies."""
        return self.kernels == "bodies"


def operators(work: Workload) -> list[OperatorWork]:
    """Return all operators of an inference, in order."""
    shape, parts = work.shape, [_embedding(work)]
    costs = layer_costs(shape, work.sparsity)
    for number, (here, share, after) in enumerate(layers(shape, work.sparsity)):
        parts += _layer(number, costs[number], here, work, share)
        if here.patches > after and work.sparsity.merge:
            parts.append(_merging(number, here, here.patches - after, work))
    return parts


def _merging(number: int, shape: ModelShape, merged: int, work: Workload) -> OperatorWork:
    """Return the cost of merging pairs that `_layer` does not count as "pruning".

    It consists of reading the old tokens, writing the new ones, and launches. Function bodies also write and read the
    keys of all candidates in the window of each token, in float32.

    Args:
        number: Index of the layer.
        shape: Shape with the patches that the layer sees.
        merged: Number of pairs.
        work: Model and batch size.
    """
    moved = work.batch * shape.width * (2 * (shape.prefix + shape.patches) - merged)
    partners = 2 * work.batch * partner_elements(shape, work.sparsity) if work.portable else 0
    return OperatorWork(number, "pruning", "attention", 0, 0, moved, MERGE_LAUNCHES[work.kernels], scores=partners)


def partner_elements(shape: ModelShape, sparsity: SparsityConfig) -> int:
    """Return the elements of all keys that are searched for partners: tokens x window x head dimension.

    Half of the patches of a layer search for a partner.
    """
    return shape.patches // 2 * sparsity.merge_window * (shape.width // shape.heads)


def _embedding(work: Workload) -> OperatorWork:
    """Return the cost of the patch embedding."""
    shape, pixels = work.shape, 3 * work.shape.patch**2
    macs = work.batch * shape.patches * pixels * shape.width
    moved = work.batch * shape.patches * (pixels + 3 * shape.width)
    return OperatorWork(-1, "embedding", "linear", macs, pixels * shape.width, moved, 4)


def _layer(number: int, costs: LayerCosts, shape: ModelShape, work: Workload, share: float) -> list[OperatorWork]:
    """Return the operators of a layer: projections and MLP with normalisation and residual, pruning, and attention."""

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
        cuda_kernels = work.kernels == "kernels"
        background = operator(
            "background",
            "kernels" if cuda_kernels else "attention",
            int(not cuda_kernels and costs["background"].macs > 0),
        )
        predictor = operator("predictor", "kernels" if cuda_kernels else "predictor", 2)
        attention = operator("attention", "kernels" if cuda_kernels else "attention", 1)
        if cuda_kernels:  # `summarise` also makes the background tokens; `select` writes its scores and reads them.
            layout = work.sparsity.of_share(share).layout(shape.patches, shape.prefix)
            lists = 2.0 * work.batch * layout.tiles
            predictor = dataclasses.replace(predictor, scores=lists * shape.heads * shape.patches)
            attention = dataclasses.replace(attention, gathered=lists * layout.keys * shape.width)
        parts += [predictor, attention, background]
        return [*parts, *_bodies(number, shape, work, share)] if work.portable else parts
    parts.append(operator("attention", "attention", 1))
    if work.materialised:
        scores = work.batch * shape.heads * (shape.prefix + shape.patches) ** 2 * SCORE_PASSES
        parts.append(OperatorWork(number, "attention", "attention", 0, 0, 0, 4, scores=scores))
    return parts


def _bodies(number: int, shape: ModelShape, work: Workload, share: float) -> list[OperatorWork]:
    """Return the memory traffic of function bodies beyond that of a kernel: scores, and gathered keys."""
    sparsity, patches = work.sparsity.of_share(share), shape.patches
    layout = sparsity.layout(patches, shape.prefix)
    read = layout.keys if sparsity.preset == "paper" else layout.keys + shape.prefix
    ranked = work.batch * shape.heads * (-(-patches // sparsity.query_pool) + layout.tiles) * patches
    gathered = work.batch * 4 * layout.tiles * read * shape.width
    scores = work.batch * shape.heads * patches * (read + layout.background_tokens)
    return [
        OperatorWork(number, "predictor", "predictor", 0, 0, 0, 12, body=ranked),
        OperatorWork(number, "attention", "attention", 0, 0, gathered, 20, body=scores),
    ]


def other_precision(precision: str, board: Board) -> str:
    """Return the compute precision of operators other than linear layers.

    int8 applies to linear layers only; the rest then runs in fp16 if the board supports it.
    """
    return ("fp16" if board.fp16_tflops else "fp32") if precision == "int8" else precision


def cost(operator: OperatorWork, board: Board, precision: str, fit: RooflineFit) -> Cost:
    """Return the time of one operator.

    Raises:
        ConfigError: The board does not support the precision.
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
    """Return the seconds that shared memory needs to receive gathered keys and feed them to the tensor cores."""
    if not operator.gathered:
        return 0.0
    multiprocessors = board.cuda_cores / CORES_OF_SM.get(board.sm, 128)
    moved = operator.gathered * SIZES[precision] * (1 + SHARED_READS.get(board.sm, 4))
    return moved / (multiprocessors * SHARED_CLOCK_BYTES * board.clock_ghz * 1e9)


def costs(work: Workload, board: Board, precision: str, fit: RooflineFit) -> list[Cost]:
    """Return the times of all operators of an inference.

    Raises:
        ConfigError: See `cost`.
    """
    return [cost(operator, board, precision, fit) for operator in operators(work)]


def faster_dense(work: Workload, board: Board, precision: str = "fp16") -> list[int]:
    """Return the sparse layers whose attention is estimated to be faster on a GPU if it is dense.

    Returns:
        Indices into the sparse layers, from 0; empty if the board is not a GPU or states no peak for the precision.
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
    """Return the total time in seconds."""
    return sum(c.seconds for c in spent)
