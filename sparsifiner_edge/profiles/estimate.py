"""What a bundle would cost on a board you do not have: latency, memory and energy, as an estimate with bounds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from sparsifiner_edge.bounds import MOST_BATCH
from sparsifiner_edge.bundle.kernels import read_table, table_file
from sparsifiner_edge.bundle.manifest import MODEL_FILE, Manifest
from sparsifiner_edge.bundle.store import Bundle, open_bundle
from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.costs import ModelShape, layers, summary
from sparsifiner_edge.errors import ArtifactError, SparsifinerError
from sparsifiner_edge.execution import Execution
from sparsifiner_edge.plan import plan_of
from sparsifiner_edge.profiles import roofline
from sparsifiner_edge.profiles.boards.board import Board, load_board
from sparsifiner_edge.profiles.roofline import (
    CPU_FIT,
    GPU_FIT,
    IDEAL,
    SIZES,
    SPARSE_KINDS,
    Cost,
    OperatorWork,
    RooflineFit,
    Workload,
)
from sparsifiner_edge.records import Unavailable
from sparsifiner_edge.results import Declared
from sparsifiner_edge.runtime.open import check_choices

UNFITTED = 1.5
"""Widens the bounds for a GPU precision that no measurement was fitted for."""
FITTED = ("fp16", "int8")
SPARSE_BOUNDS = {"native": (0.5, 2.5), "portable": (0.3, 4.0)}
"""Least and most that sparse layers' own operators, and merging, may take on a GPU, as factors: judged, for no one
published it."""
MERGE_KERNELS = {"pairs", "merge"}
"""In a bundle's table where MatchTokens and MergeTokens were compiled."""
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
    """A value and its bounds, in the unit of the field that holds it."""

    value: float
    low: float
    high: float
    method: str


class EnergyJ(Bounded, frozen=True, kw_only=True):
    """Of one query; utilisation: share of the time that the board computes."""

    power_w: float
    utilisation: float


class OperatorCost(msgspec.Struct, frozen=True, kw_only=True):
    """Of all operators of a kind; bound: what most of the time is spent on."""

    kind: str
    macs: int
    bytes: int
    ms: float
    bound: str


class EstimateStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """What a bundle would cost; fits_memory: "yes" by the upper bound, "no" by the lower one, else "perhaps"."""

    latency_ms: Bounded
    memory_bytes: Bounded
    energy_j: EnergyJ
    fits_memory: str
    operators: list[OperatorCost]


class Assumed(msgspec.Struct, frozen=True):
    """The kernels that are assumed to run sparse operators, and why."""

    assumed: str
    because: str


class EstimateMethod(msgspec.Struct, frozen=True, kw_only=True):
    """How it was computed; board: in its power mode. precision: of linear layers and of the rest."""

    estimate: str
    board: dict[str, Any]
    power_mode: str | Unavailable
    precision: dict[str, str]
    kernels: Assumed
    batch: int
    calibration: RooflineFit


class EstimateResult(Declared, frozen=True):
    """Of kind "estimate"; it has no samples."""

    method: EstimateMethod
    samples: dict[str, Any]
    statistics: EstimateStatistics


class _Plan(NamedTuple):
    """What is estimated: the board in its power mode, the work, and how the operators are assumed to run."""

    board: Board
    work: Workload
    precision: str
    kernels: Assumed
    fit: RooflineFit
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
        ArtifactError: not a bundle, altered, of another version, or its costs are missing or do not fit its model.
        BackendError: unknown kernels.
        ConfigError: unknown board, mode or precision.
    """
    checked = open_bundle(Path(bundle))
    device = board if isinstance(board, Board) else load_board(board)
    device = device if power_mode is None else device.in_mode(power_mode)
    plan = _plan(checked, device, precision, kernels)
    return EstimateResult("estimate", [checked.subject()], _method(plan, power_mode), {}, _statistics(plan))


def estimate_model(
    shape: ModelShape, sparsity: SparsityConfig, board: Board, precision: str, *, batch: int = 1, kernels: str
) -> EstimateStatistics:
    """Estimate a model that was not exported: its file is taken to hold its weights alone, at the precision.

    Args:
        kernels: "native" or "portable", as of `estimate_bundle`; of no effect where nothing is sparse or merges.

    Raises:
        BackendError, ConfigError: see `estimate_bundle`.
    """
    check_choices(Execution(kernels=kernels))
    board.peak(precision)
    assumed = Assumed("none", "the model is dense") if sparsity.is_dense else Assumed(kernels, "asked for")
    work = _workload(shape, sparsity, batch, board, assumed)
    fit = CPU_FIT if board.kind == "cpu" else GPU_FIT
    linear = shape.depth * (4 * shape.width + 2 * shape.hidden) * shape.width
    rest = (3 * shape.patch**2 + shape.patches + shape.prefix) * shape.width
    return _statistics(_Plan(board, work, precision, assumed, fit, SIZES[precision] * float(linear + rest)))


def _statistics(plan: _Plan) -> EstimateStatistics:
    spent = roofline.costs(plan.work, plan.board, plan.precision, plan.fit)
    latency, memory, room = _latency(plan, spent), _memory(plan), plan.board.memory_gb * 1e9
    return EstimateStatistics(
        latency_ms=latency,
        memory_bytes=memory,
        energy_j=_energy(plan, spent, latency),
        fits_memory="yes" if memory.high <= room else "no" if memory.low > room else "perhaps",
        operators=_by_kind(spent),
    )


def _plan(bundle: Bundle, board: Board, precision: str | None, kernels: str) -> _Plan:
    manifest = bundle.manifest
    shape, sparsity = model_of(bundle)
    own = bundle.required(manifest.precision, "precision")
    chosen = own if precision is None else precision
    board.peak(chosen)  # Rejects what the board cannot do before anything is computed.
    assumed = _kernels(kernels, manifest, board)
    if assumed.assumed == "none" and plan_of(sparsity, shape.depth, shape.patches).sparse_layers:
        raise ArtifactError(f"{bundle.folder}: the manifest names no operators for its sparse layers.", _AGAIN)
    if not manifest.inputs:
        raise ArtifactError(f"{bundle.folder}: inputs is missing.", _AGAIN)
    batch = 1 if manifest.batch is None else manifest.batch
    if not 0 < batch <= MOST_BATCH:
        raise ArtifactError(f"{bundle.folder}: an input's shape is {list(manifest.inputs[0].shape)!r}.", _AGAIN)
    work = _workload(shape, sparsity, batch, board, assumed)
    if kernels == "auto" and _lacks_merging(bundle, board):
        assumed = Assumed(assumed.assumed, f"{assumed.because}, but none that merge tokens")
        work = dataclasses.replace(work, merging="bodies")
    size = (bundle.folder / MODEL_FILE).stat().st_size * SIZES[chosen] / SIZES.get(own, 4)
    return _Plan(board, work, chosen, assumed, CPU_FIT if board.kind == "cpu" else GPU_FIT, size)


def _workload(shape: ModelShape, sparsity: SparsityConfig, batch: int, board: Board, assumed: Assumed) -> Workload:
    kernels = "native" if board.kind == "cpu" else "kernels"
    merging = kernels if assumed.assumed == "native" else "bodies"
    materialised = board.kind == "cpu" and assumed.assumed != "native"
    return Workload(shape, sparsity, batch, assumed.assumed == "portable", materialised, merging)


def _kernels(asked: str, manifest: Manifest, board: Board) -> Assumed:
    check_choices(Execution(kernels=asked))
    if not manifest.ops:
        return Assumed("none", "the bundle has standard operators alone")
    if asked != "auto":
        return Assumed(asked, "asked for")
    if board.kind == "cpu":
        return Assumed("native", "the native library is assumed to be installed there")
    if table_file(board.sm) in manifest.files:
        return Assumed("native", f"the bundle carries kernels compiled for SM {board.sm}")
    return Assumed("portable", f"the bundle carries no kernels compiled for SM {board.sm}")


def _lacks_merging(bundle: Bundle, board: Board) -> bool:
    """Whether tokens merge, and the bundle carries kernels for the board's GPU, but none for that."""
    table = read_table(bundle, board.sm) if bundle.manifest.sparsity and bundle.manifest.sparsity.merge else None
    return table is not None and not {x.kernel for x in table.launches.values()} >= MERGE_KERNELS


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


def _latency(plan: _Plan, found: Sequence[Cost]) -> Bounded:
    board, work = plan.board, plan.work
    spread = plan.fit.spread * (UNFITTED if board.kind == "gpu" and plan.precision not in FITTED else 1.0)
    fast = msgspec.structs.replace(board, fp16_tflops=max(board.fp16_tflops, board.fp16_fast_tflops))
    ideal = roofline.seconds(roofline.costs(work, fast, plan.precision, IDEAL))
    # On a CPU sparse operators were measured and fitted; on a GPU they were not.
    sparse_layers = plan_of(work.sparsity, work.shape.depth, work.shape.patches).sparse_layers
    judged = sparse_layers if board.kind == "gpu" else ()
    least = most = 0.0
    for cost in found:
        sparse = cost.operator.layer in judged and cost.operator.kind in SPARSE_KINDS
        few, many = SPARSE_BOUNDS[plan.kernels.assumed] if sparse else _merge_bounds(plan, cost.operator)
        least += cost.seconds * few / spread
        most += cost.seconds * many * spread
    value = roofline.seconds(found)
    return Bounded(
        value=value * 1e3,
        low=min(value, max(least, ideal)) * 1e3,
        high=most * 1e3,
        method=f"roofline; factor {spread:.3g} either way, and at least the time at every peak",
    )


def _merge_bounds(plan: _Plan, operator: OperatorWork) -> tuple[float, float]:
    """Least and most, as factors, that what merges may take on a GPU; of other operators, and on a CPU, none."""
    if plan.board.kind == "cpu" or not plan.work.sparsity.merge or operator.kind != "pruning":
        return 1.0, 1.0
    return SPARSE_BOUNDS["portable" if plan.work.merging == "bodies" else "native"]


def _memory(plan: _Plan) -> Bounded:
    layer, scores = peak_activations(plan.work, SIZES[plan.precision])
    low, value, high = map(round, memory_bytes(plan.board.kind, plan.model_bytes, layer, scores))
    method = "runtime, weights as often as they are held, tensors of some layers, and scores kept in memory"
    return Bounded(value=value, low=low, high=high, method=method)


def memory_bytes(kind: str, weights: float, layer: float, scores: float) -> tuple[float, float, float]:
    """Least, likely and most memory of a process on a board of `kind` with this many bytes of each."""
    parts = zip(RUNTIME_BYTES[kind], WEIGHT_COPIES[kind], LAYER_COPIES[kind], SCORE_COPIES, strict=True)
    low, value, high = (own + a * weights + b * layer + c * scores for own, a, b, c in parts)
    return low, value, high


def peak_activations(work: Workload, size: int) -> tuple[float, float]:
    """Bytes of the largest layer's tensors at `size` bytes an element, and of its scores and gathered keys, if kept."""
    shape, sparsity = work.shape, work.sparsity
    tokens = shape.patches + shape.prefix
    layer = size * tokens * (2 * shape.width + max(4 * shape.width, shape.hidden))
    scores = 0.0
    for here, share, _ in layers(shape, sparsity):
        if share == 1 and work.materialised:
            scores = max(scores, 4.0 * shape.heads * (here.patches + here.prefix) ** 2)
        elif share < 1 and work.portable:
            scores = max(scores, _body_bytes(here, sparsity.of_share(share), size))
        if sparsity.merge and work.merging == "bodies":
            scores = max(scores, 4.0 * roofline.partner_elements(here, sparsity))
    return work.batch * float(layer), work.batch * scores


def _body_bytes(shape: ModelShape, sparsity: SparsityConfig, size: int) -> float:
    """Gathered keys and values, and scores, of a sparse layer's bodies."""
    layout = sparsity.layout(shape.patches, shape.prefix)
    read = layout.keys + shape.prefix
    gathered = 2.0 * size * layout.tiles * read * shape.width
    return gathered + 4.0 * shape.heads * shape.patches * (read + layout.cells)


def _energy(plan: _Plan, found: Sequence[Cost], latency: Bounded) -> EnergyJ:
    """(idle + utilisation x (cap - idle)) x time; the cap is the power mode's, else the most that the board takes."""
    board = plan.board
    launching = sum(c.operator.launches * plan.fit.launch_us for c in found) * 1e-6
    busy = 1 - launching / roofline.seconds(found) if board.kind == "gpu" else 1.0
    shares = (board.idle_w / board.tdp_w,) * 3 if board.idle_w else IDLE_SHARE
    low_w, idle_w, _ = (share * board.tdp_w for share in shares)
    power = idle_w + busy * (board.tdp_w - idle_w)
    return EnergyJ(
        value=power * latency.value / 1e3,
        low=low_w * latency.low / 1e3,
        high=board.tdp_w * latency.high / 1e3,
        power_w=power,
        utilisation=busy,
        method=f"{idle_w:.3g} W at rest, up to {board.tdp_w:.3g} W, by the share of time that it computes",
    )


def _by_kind(found: Sequence[Cost]) -> list[OperatorCost]:
    rows = []
    for kind in dict.fromkeys(cost.operator.kind for cost in found):
        group = [cost for cost in found if cost.operator.kind == kind]
        times: dict[str, float] = {}
        for cost in group:
            times[cost.bound] = times.get(cost.bound, 0.0) + cost.seconds
        if any(times.values()):
            macs, moved = sum(c.operator.macs for c in group), sum(c.moved_bytes for c in group)
            ms, bound = roofline.seconds(group) * 1e3, max(times, key=lambda name: times[name])
            rows.append(OperatorCost(kind=kind, macs=round(macs), bytes=round(moved), ms=ms, bound=bound))
    return rows


def _method(plan: _Plan, power_mode: str | None) -> EstimateMethod:
    left_out = ("sources", "power_modes", "jetpack", "rails")
    described = {name: value for name, value in msgspec.structs.asdict(plan.board).items() if name not in left_out}
    others = roofline.other_precision(plan.precision, plan.board)
    return EstimateMethod(
        estimate="computed, not measured; `machine` is where it was computed, not the board",
        board=described,
        power_mode=power_mode or Unavailable("none chosen: full clocks"),
        precision={"linear": plan.precision, "other": others},
        kernels=plan.kernels,
        batch=plan.work.batch,
        calibration=plan.fit,
    )
