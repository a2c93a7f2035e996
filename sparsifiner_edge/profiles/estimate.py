"""What a bundle would cost on a board you do not have: latency, memory and energy, as an estimate with bounds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from sparsifiner_edge.bounds import MOST_BATCH
from sparsifiner_edge.bundle.kernels import table_file
from sparsifiner_edge.bundle.manifest import MODEL_FILE, Manifest
from sparsifiner_edge.bundle.store import Bundle, open_bundle
from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.costs import ModelShape, layers, summary
from sparsifiner_edge.errors import ArtifactError, SparsifinerError
from sparsifiner_edge.plan import plan_of
from sparsifiner_edge.profiles import roofline
from sparsifiner_edge.profiles.boards.board import Board, load_board
from sparsifiner_edge.profiles.roofline import (
    CPU_FIT,
    GPU_FIT,
    SIZES,
    SPARSE_KINDS,
    Cost,
    RooflineFit,
    Workload,
)
from sparsifiner_edge.records import Unavailable
from sparsifiner_edge.results import Quantity, Result

ESTIMATED = 0.9
"""Of bounds: what the fit was widened to."""
UNFITTED = 1.5
"""Widens the bounds for a GPU precision that no measurement was fitted for."""
FITTED = ("fp16", "int8")
UNMEASURED = {"kernels": (0.5, 2.5), "bodies": (0.3, 4.0)}
"""Least and most that sparse layers' own operators, and merging, may take on a GPU, as factors: no one published it."""
IDLE_SHARE = (0.1, 0.25)
"""Power at rest as a share of the most, where a board does not state it: least, taken."""
MEMORY = {
    "gpu": ((150e6, 400e6, 1200e6), (1.0, 1.1, 2.0), (1.0, 2.0, 4.0)),
    "cpu": ((60e6, 90e6, 130e6), (1.0, 1.45, 2.1), (3.0, 5.5, 8.0)),
}
"""Least, taken and most: bytes of the runtime itself; how often weights lie in memory at the peak, packed beside what
was read; how many layers' tensors are alive then. CPU: recorded; GPU: judged.
"""
SCORE_COPIES = (1.0, 1.0, 2.0)
"""The same for scores and gathered keys, where they are kept in memory."""
_AGAIN = "Export the bundle again."
_OMITTED = ("sources", "power_modes", "jetpack")
"""Of a board, in a result."""


class EstimateStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """What a bundle would cost; energy_j: of one query.

    Attributes:
        fits_memory: "yes" by the upper bound, "no" by the lower one, else "perhaps".
    """

    latency_ms: Quantity
    memory_bytes: Quantity
    energy_j: Quantity
    fits_memory: str


class EstimateMethod(msgspec.Struct, frozen=True, kw_only=True):
    """How it was computed; board: in its power mode. precision: of linear layers and of the rest.

    kernels: what is assumed to run sparse operators, "native", "portable" or "none", and why.
    """

    estimate: str
    board: dict[str, Any]
    power_mode: str | Unavailable
    precision: dict[str, str]
    kernels: dict[str, str]
    batch: int
    calibration: RooflineFit


class EstimateResult(Result, frozen=True):
    """Of kind "estimate"; it has no samples."""

    method: EstimateMethod
    samples: dict[str, Any]
    statistics: EstimateStatistics


_Bounds: TypeAlias = tuple[float, float, float]
"""Least, likely and most."""


def estimate_bundle(
    bundle: str | Path, board: str | Path | Board, *, precision: str | None = None, power_mode: str | None = None
) -> EstimateResult:
    """Estimate a bundle on a board. Sparse operators are taken to run natively on a CPU, and on a GPU where the bundle
    carries kernels compiled for its SM; else as function bodies.

    Args:
        bundle: its manifest says what there is to compute.
        board: a name, a TOML file, or one that was loaded.
        precision: "fp32", "tf32", "fp16" or "int8"; None takes the bundle's.
        power_mode: name or number; None takes full clocks.

    Raises:
        ArtifactError: not a bundle, altered, of another version, or its costs are missing or do not fit its model.
        ConfigError: unknown board, mode or precision.

    Example:
        >>> estimate_bundle("bundle", "jetson-orin-nano-8gb", precision="fp16").statistics.latency_ms.value > 0
        True
    """
    checked = open_bundle(Path(bundle))
    manifest, stored = checked.manifest, checked.require(checked.manifest.precision, "precision")
    device = board if isinstance(board, Board) else load_board(board)
    device = device if power_mode is None else device.in_mode(power_mode)
    chosen = stored if precision is None else precision
    device.peak(chosen)  # Rejects what the board cannot do before anything is computed.
    shape, sparsity = model_of(checked)
    (assumed, because), batch = _kernels(manifest, device), 1 if manifest.batch is None else manifest.batch
    if not manifest.ops and plan_of(sparsity, shape.depth, shape.patches).sparse_layers:
        raise ArtifactError(f"{checked.folder}: the manifest names no operators for its sparse layers.", _AGAIN)
    if not manifest.inputs:
        raise ArtifactError(f"{checked.folder}: inputs is missing.", _AGAIN)
    if not 0 < batch <= MOST_BATCH:
        raise ArtifactError(f"{checked.folder}: an input's shape is {list(manifest.inputs[0].shape)!r}.", _AGAIN)
    size = (checked.folder / MODEL_FILE).stat().st_size * SIZES[chosen] / SIZES.get(stored, 4)
    cpu = device.kind == "cpu"
    kernels = ("native" if cpu else "kernels") if assumed == "native" else "bodies"
    work = Workload(shape, sparsity, batch, kernels, materialised=cpu and assumed == "none")
    fit = CPU_FIT if cpu else GPU_FIT
    method = EstimateMethod(
        estimate="computed, not measured; `machine` is where it was computed, not the board",
        board={name: value for name, value in msgspec.structs.asdict(device).items() if name not in _OMITTED},
        power_mode=power_mode or Unavailable("none chosen: full clocks"),
        precision={"linear": chosen, "other": roofline.other_precision(chosen, device)},
        kernels={"assumed": assumed, "because": because},
        batch=batch,
        calibration=fit,
    )
    statistics = _statistics(device, work, chosen, fit, size)
    return EstimateResult("estimate", [checked.subject()], method, {}, statistics)


def _kernels(manifest: Manifest, board: Board) -> tuple[str, str]:
    """What is assumed to run sparse operators, and why."""
    if not manifest.ops:
        return "none", "the bundle has standard operators alone"
    if board.kind == "cpu":
        return "native", "the native library is assumed to be installed there"
    if table_file(board.sm) in manifest.files:
        return "native", f"the bundle carries kernels compiled for SM {board.sm}"
    return "portable", f"the bundle carries no kernels compiled for SM {board.sm}"


def model_of(bundle: Bundle) -> tuple[ModelShape, SparsityConfig]:
    """Sizes and sparsity of a bundle's model, as its manifest says.

    Raises:
        ArtifactError: it does not say, or there is no such model.
    """
    manifest = bundle.manifest
    shape, sparsity = bundle.require(manifest.shape, "shape"), manifest.sparsity or SparsityConfig(keep=1)
    try:
        summary(shape, sparsity)
    except SparsifinerError as error:
        raise ArtifactError(f"{bundle.folder}: {error.what}", _AGAIN) from error
    return shape, sparsity


def _statistics(
    board: Board, work: Workload, precision: str, fit: RooflineFit, model_bytes: float
) -> EstimateStatistics:
    spent, room = roofline.costs(work, board, precision, fit), board.memory_gb * 1e9
    gpu = board.kind == "gpu"
    spread = fit.spread * (UNFITTED if gpu and precision not in FITTED else 1.0)
    latency = _latency(work, gpu, spread, spent)
    memory = memory_bytes(board.kind, model_bytes, *peak_activations(work, SIZES[precision]))
    low, _, high = memory
    how = "runtime, weights as often as they are held, tensors of some layers, and scores kept in memory"
    return EstimateStatistics(
        latency_ms=_quantity(latency, 1e3, f"roofline; factor {spread:.3g} either way"),
        memory_bytes=_quantity(memory, 1.0, how),
        energy_j=_energy(board, spent, latency),
        fits_memory="yes" if high <= room else "no" if low > room else "perhaps",
    )


def _quantity(bounds: _Bounds, factor: float, how: str) -> Quantity:
    low, value, high = (factor * bound for bound in bounds)
    return Quantity(value, low, high, ESTIMATED, how)


def _latency(work: Workload, gpu: bool, spread: float, spent: Sequence[Cost]) -> _Bounds:
    """Seconds, by the spread; wider for what none was fitted for, on a GPU what is sparse or merges."""
    sparse_layers = plan_of(work.sparsity, work.shape.depth, work.shape.patches).sparse_layers
    least = most = 0.0
    for cost in spent:
        sparse = cost.operator.layer in sparse_layers and cost.operator.kind in SPARSE_KINDS
        judged = gpu and (sparse or (work.sparsity.merge and cost.operator.kind == "pruning"))
        few, many = UNMEASURED[work.kernels] if judged else (1.0, 1.0)
        least, most = least + cost.seconds * few / spread, most + cost.seconds * many * spread
    return least, roofline.seconds(spent), most


def memory_bytes(kind: str, weights: float, layer: float, scores: float) -> _Bounds:
    """Least, likely and most memory of a process on a board of `kind` with this many bytes of each."""
    low, value, high = (
        runtime + a * weights + b * layer + c * scores
        for runtime, a, b, c in zip(*MEMORY[kind], SCORE_COPIES, strict=True)
    )
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
        if sparsity.merge and work.portable:
            scores = max(scores, 4.0 * roofline.partner_elements(here, sparsity))
    return work.batch * float(layer), work.batch * scores


def _body_bytes(shape: ModelShape, sparsity: SparsityConfig, size: int) -> float:
    """Gathered keys and values, and scores, of a sparse layer's bodies."""
    layout = sparsity.layout(shape.patches, shape.prefix)
    read = layout.keys + shape.prefix
    return 2.0 * size * layout.tiles * read * shape.width + 4.0 * shape.heads * shape.patches * (read + layout.cells)


def _energy(board: Board, spent: Sequence[Cost], latency: _Bounds) -> Quantity:
    """(idle + utilisation x (cap - idle)) x time; the cap is the power mode's, else the most that the board takes."""
    busy = 1 - sum(c.launch_s for c in spent) / latency[1] if board.kind == "gpu" else 1.0
    low_w, idle_w = (board.idle_w,) * 2 if board.idle_w else (share * board.tdp_w for share in IDLE_SHARE)
    power = idle_w + busy * (board.tdp_w - idle_w)
    how = f"{power:.3g} W: {idle_w:.3g} at rest, up to {board.tdp_w:.3g}, by the share of time that it computes"
    least, likely, most = latency
    return _quantity((low_w * least, power * likely, board.tdp_w * most), 1.0, how)
