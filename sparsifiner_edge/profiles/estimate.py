"""What a bundle would cost on a board you do not have: latency, memory and energy, as an estimate with bounds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from sparsifiner_edge.bounds import MOST_BATCH
from sparsifiner_edge.bundle.kernels import table_file
from sparsifiner_edge.bundle.manifest import Manifest
from sparsifiner_edge.bundle.store import Bundle, open_bundle
from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.costs import ModelShape, summary
from sparsifiner_edge.errors import ArtifactError, ConfigError, SparsifinerError
from sparsifiner_edge.profiles import roofline
from sparsifiner_edge.profiles.boards.board import Board, load_board
from sparsifiner_edge.profiles.roofline import CPU, GPU, IDEAL, SIZES, SPARSE, Calibration, Cost, Workload
from sparsifiner_edge.records import Unavailable
from sparsifiner_edge.results import Declared

KERNELS = ("auto", "native", "portable")
UNFITTED = 1.5
"""Widens the bounds for a GPU precision that no measurement was fitted for."""
FITTED = ("fp16", "int8")
SPARSE_BOUNDS = {"native": (0.5, 2.5), "portable": (0.3, 4.0)}
"""Least and most that sparse layers' own operators may take on a GPU, as factors: judged, for no one published it."""
IDLE_SHARE = (0.1, 0.25, 0.4)
"""Power at rest as a share of the most, where a board does not state it: least, taken, most."""
RUNTIME_BYTES = {"gpu": (150e6, 400e6, 1200e6), "cpu": (60e6, 90e6, 130e6)}
"""Memory of the runtime itself, without a model: least, taken, most. CPU: recorded; GPU: judged."""
WEIGHT_COPIES = {"gpu": (1.0, 1.1, 2.0), "cpu": (1.0, 1.45, 2.1)}
"""How often weights lie in memory at the peak, packed beside what was read. CPU: recorded; GPU: judged."""
LAYER_COPIES = {"gpu": (1.0, 2.0, 4.0), "cpu": (3.0, 5.5, 8.0)}
"""How many layers' tensors are alive at the peak. CPU: recorded; GPU: judged."""
SCORE_COPIES = (1.0, 1.0, 2.0)
"""The same for scores and gathered keys, where they are kept in memory."""
_AGAIN = "Export the bundle again."


class Bounded(msgspec.Struct, frozen=True, kw_only=True):
    """A value, and what it lies between; in the unit of the field that holds it."""

    value: float
    low: float
    high: float
    method: str


class MemoryBytes(msgspec.Struct, frozen=True, kw_only=True):
    """Of the process at its peak; weights, one layer's tensors and scores once each."""

    value: int
    low: int
    high: int
    weights: int
    layer: int
    scores: int
    method: str


class EnergyJ(Bounded, frozen=True, kw_only=True):
    """Of one query; utilisation: share of the time that the board works."""

    power_w: float
    utilisation: float


class OperatorCost(msgspec.Struct, frozen=True, kw_only=True):
    """Of all operators of a kind, or of one layer's; bound: what most of the time is spent on."""

    layer: int | None = None
    kind: str
    macs: int
    bytes: int
    ms: float
    bound: str


class EstimateStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """What a bundle would cost; fits_memory: "yes", "no" or "perhaps"."""

    latency_ms: Bounded
    memory_bytes: MemoryBytes
    energy_j: EnergyJ
    fits_memory: str
    operators: list[OperatorCost]


class EstimateSamples(msgspec.Struct, frozen=True):
    """Every operator."""

    layers: list[OperatorCost]


class Assumed(msgspec.Struct, frozen=True):
    """Kernels that sparse operators are taken to run by, and why these."""

    assumed: str
    because: str


class EstimateMethod(msgspec.Struct, frozen=True, kw_only=True):
    """How it was computed; board: as it is set. precision: of linear layers and of the rest."""

    estimate: str
    board: dict[str, Any]
    power_mode: str | Unavailable
    precision: dict[str, str]
    kernels: Assumed
    batch: int
    calibration: Calibration


class EstimateResult(Declared, frozen=True):
    """Of kind "estimate"."""

    method: EstimateMethod
    samples: EstimateSamples
    statistics: EstimateStatistics


class _Plan(NamedTuple):
    """What is estimated: the board as it is set, the work, and how the operators are taken to run."""

    board: Board
    work: Workload
    precision: str
    kernels: str
    because: str
    model_bytes: float


def estimate_bundle(
    bundle: str | Path,
    board: str | Path | Board,
    *,
    precision: str | None = None,
    power_mode: str | None = None,
    kernels: str = "auto",
) -> EstimateResult:
    """Estimate a bundle on a board.

    Args:
        bundle: its manifest says what there is to compute.
        board: a name, a TOML file, or one that was loaded.
        precision: "fp32", "tf32", "fp16" or "int8"; None takes the bundle's.
        power_mode: name or number; None takes full clocks.
        kernels: "native", "portable" (function bodies), or "auto": on a CPU native; on a GPU native where the bundle
            carries kernels compiled for its SM.

    Raises:
        ArtifactError: not a bundle, altered, of a newer schema, or its costs are missing or do not fit its model.
        ConfigError: unknown board, mode, precision or kernels.
    """
    checked = open_bundle(Path(bundle))
    device = board if isinstance(board, Board) else load_board(board)
    device = device if power_mode is None else device.in_mode(power_mode)
    plan = _plan(checked, device, precision, kernels)
    share = CPU if device.kind == "cpu" else GPU
    spent = roofline.costs(plan.work, device, plan.precision, share)
    latency = _latency(plan, spent, share)
    memory = _memory(plan)
    statistics = EstimateStatistics(
        latency_ms=latency,
        memory_bytes=memory,
        energy_j=_energy(device, spent, latency),
        fits_memory=_fits(memory, device),
        operators=_by_kind(spent),
    )
    layers = [_row(c.operator.kind, [c], c.operator.layer) for c in spent if c.operator.launches]
    method = _method(plan, power_mode, share)
    return EstimateResult("estimate", [checked.subject()], method, EstimateSamples(layers), statistics)


def _plan(bundle: Bundle, board: Board, precision: str | None, kernels: str) -> _Plan:
    manifest = bundle.manifest
    shape, sparsity = model_of(bundle)
    own = bundle.required(manifest.precision, "precision")
    chosen = own if precision is None else precision
    board.peak(chosen)  # Refuses what the board cannot do before anything is computed.
    size = (bundle.folder / "model.onnx").stat().st_size * SIZES[chosen] / SIZES.get(own, 4)
    taken, because = _kernels(kernels, manifest, board)
    if taken == "none" and sparsity.sparse_layers(shape.depth):
        raise ArtifactError(f"{bundle.folder}: the manifest names no operators for its sparse layers.", _AGAIN)
    portable, plain = taken == "portable", not manifest.ops
    work = Workload(shape, sparsity, _batch(bundle), portable, board.kind == "cpu" and (portable or plain))
    return _Plan(board, work, chosen, taken, because, size)


def _kernels(asked: str, manifest: Manifest, board: Board) -> tuple[str, str]:
    """Which kernels run the sparse operators, and why."""
    if asked not in KERNELS:
        raise ConfigError(f"kernels is {asked!r}.", f"Choose one of: {', '.join(KERNELS)}.")
    if not manifest.ops:
        return "none", "the bundle has standard operators alone"
    if asked != "auto":
        return asked, "asked for"
    if board.kind == "cpu":
        return "native", "the native library is taken to be installed there"
    if table_file(board.sm) in manifest.files:
        return "native", f"the bundle carries kernels compiled for SM {board.sm}"
    return "portable", f"the bundle carries no kernels compiled for SM {board.sm}"


def model_of(bundle: Bundle) -> tuple[ModelShape, SparsityConfig]:
    """Sizes and sparsity of a bundle's model, as its manifest says.

    Raises:
        ArtifactError: it does not say, or its costs are not those of such a model.
    """
    manifest = bundle.manifest
    shape, sparsity = bundle.required(manifest.shape, "shape"), manifest.sparsity or SparsityConfig(keep=1)
    try:
        costs, dense = summary(shape, sparsity), summary(shape, SparsityConfig(keep=1))
    except SparsifinerError as error:
        raise ArtifactError(f"{bundle.folder}: {error.what}", _AGAIN) from error
    if (costs, dense) != (manifest.costs, manifest.dense_costs):
        raise ArtifactError(f"{bundle.folder}: the manifest's costs are not those of its model.", _AGAIN)
    return shape, sparsity


def _batch(bundle: Bundle) -> int:
    """Of the file, where it is fixed; else one image at a time.

    Raises:
        ArtifactError: the manifest describes no input, or a batch that no file has.
    """
    manifest = bundle.manifest
    if not manifest.inputs:
        raise ArtifactError(f"{bundle.folder}: inputs is missing.", _AGAIN)
    batch = manifest.batch
    if batch is not None and not 0 < batch <= MOST_BATCH:
        raise ArtifactError(f"{bundle.folder}: an input's shape is {list(manifest.inputs[0].shape)!r}.", _AGAIN)
    return batch or 1


def _latency(plan: _Plan, found: Sequence[Cost], share: Calibration) -> Bounded:
    board = plan.board
    spread = share.spread * (UNFITTED if board.kind == "gpu" and plan.precision not in FITTED else 1.0)
    fast = msgspec.structs.replace(board, fp16_tflops=max(board.fp16_tflops, board.fp16_fast_tflops))
    ideal = roofline.seconds(roofline.costs(plan.work, fast, plan.precision, IDEAL))
    least = most = 0.0
    for cost in found:
        few, many = _sparse_bounds(plan, cost)
        least += cost.seconds * few / spread
        most += cost.seconds * many * spread
    value = roofline.seconds(found)
    return Bounded(
        value=value * 1e3,
        low=min(value, max(least, ideal)) * 1e3,
        high=most * 1e3,
        method=f"roofline; factor {spread:.3g} either way, and at least the time at every peak",
    )


def _sparse_bounds(plan: _Plan, cost: Cost) -> tuple[float, float]:
    """On a CPU sparse operators were measured and fitted; on a GPU they were not."""
    layer = cost.operator.layer
    inside = cost.operator.kind in (*SPARSE, "attention") and layer in plan.work.sparsity.sparse_layers(
        plan.work.shape.depth
    )
    return SPARSE_BOUNDS[plan.kernels] if inside and plan.board.kind == "gpu" else (1.0, 1.0)


def _memory(plan: _Plan) -> MemoryBytes:
    layer, scores = peak_activations(plan.work, SIZES[plan.precision])
    low, value, high = memory_bytes(plan.board.kind, plan.model_bytes, layer, scores)
    return MemoryBytes(
        value=round(value),
        low=round(low),
        high=round(high),
        weights=round(plan.model_bytes),
        layer=round(layer),
        scores=round(scores),
        method="runtime, weights as often as they are held, tensors of some layers, and scores kept in memory",
    )


def memory_bytes(kind: str, weights: float, layer: float, scores: float) -> tuple[float, float, float]:
    """Least, likely and most memory of a process on a board of `kind` with so many bytes of each."""
    parts = zip(RUNTIME_BYTES[kind], WEIGHT_COPIES[kind], LAYER_COPIES[kind], SCORE_COPIES, strict=True)
    low, value, high = (own + a * weights + b * layer + c * scores for own, a, b, c in parts)
    return low, value, high


def peak_activations(work: Workload, size: int) -> tuple[float, float]:
    """Bytes of the largest layer's tensors at `size` bytes an element, and of its scores and gathered keys, if kept."""
    shape, sparsity = work.shape, work.sparsity
    tokens = shape.patches + shape.prefix + sparsity.fuse_tokens * len(sparsity.token_keep)
    layer = size * tokens * (2 * shape.width + max(4 * shape.width, shape.hidden))
    scores, sparse = 0.0, sparsity.sparse_layers(shape.depth)
    if work.portable and sparse:
        layout = sparsity.layout(shape.patches, shape.prefix)
        read = layout.keys + shape.prefix
        scores = 2.0 * size * layout.tiles * read * shape.width + 4.0 * shape.heads * shape.patches * (
            read + layout.cells
        )
    if work.materialised and len(sparse) < shape.depth:
        scores = max(scores, 4.0 * shape.heads * tokens * tokens)
    return work.batch * float(layer), work.batch * scores


def _fits(memory: MemoryBytes, board: Board) -> str:
    """ "yes", "no" or "perhaps": even the upper bound fits, not even the lower one does, or between."""
    room = board.memory_gb * 1e9
    return "yes" if memory.high <= room else "no" if memory.low > room else "perhaps"


def _energy(board: Board, found: Sequence[Cost], latency: Bounded) -> EnergyJ:
    """(idle + utilisation x (cap - idle)) x time; the cap is the power mode's, else the most that the board takes."""
    total = roofline.seconds(found)
    launching = sum(c.operator.launches * (CPU if board.kind == "cpu" else GPU).launch_us for c in found) * 1e-6
    busy = 1 - launching / total if board.kind == "gpu" else 1.0
    shares = (board.idle_w / board.tdp_w,) * 3 if board.idle_w else IDLE_SHARE
    low_w, idle_w, _ = (share * board.tdp_w for share in shares)
    power = idle_w + busy * (board.tdp_w - idle_w)
    return EnergyJ(
        value=power * latency.value / 1e3,
        low=low_w * latency.low / 1e3,
        high=board.tdp_w * latency.high / 1e3,
        power_w=power,
        utilisation=busy,
        method=f"{idle_w:.3g} W at rest, up to {board.tdp_w:.3g} W, by the share of time that it works",
    )


def _by_kind(found: Sequence[Cost]) -> list[OperatorCost]:
    groups: dict[str, list[Cost]] = {}
    for cost in found:
        groups.setdefault(cost.operator.kind, []).append(cost)
    return [_row(kind, group) for kind, group in groups.items() if any(c.seconds for c in group)]


def _row(kind: str, group: Sequence[Cost], layer: int | None = None) -> OperatorCost:
    times: dict[str, float] = {}
    for cost in group:
        times[cost.bound] = times.get(cost.bound, 0.0) + cost.seconds
    return OperatorCost(
        layer=layer,
        kind=kind,
        macs=round(sum(c.operator.macs for c in group)),
        bytes=round(sum(c.moved_bytes for c in group)),
        ms=roofline.seconds(group) * 1e3,
        bound=max(times, key=lambda name: times[name]),
    )


def _method(plan: _Plan, power_mode: str | None, share: Calibration) -> EstimateMethod:
    board = plan.board
    left_out = ("sources", "power_modes", "jetpack", "rails")
    described = {name: value for name, value in msgspec.structs.asdict(board).items() if name not in left_out}
    others = roofline.precisions(plan.precision, board)["attention"]
    return EstimateMethod(
        estimate="computed, not measured; `machine` is where it was computed, not the board",
        board=described,
        power_mode=power_mode or Unavailable("none chosen: full clocks"),
        precision={"linear": plan.precision, "other": others},
        kernels=Assumed(plan.kernels, plan.because),
        batch=plan.work.batch,
        calibration=share,
    )
