"""What a bundle, or each of two, would cost on a board you do not have: an estimate with bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from sparsifiner_edge.bounds import MOST_BATCH
from sparsifiner_edge.bundle.kernels import table_file
from sparsifiner_edge.bundle.manifest import AGAIN, MODEL_FILE, Manifest
from sparsifiner_edge.bundle.store import Bundle, open_bundle
from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.costs import ModelShape, layers, summary
from sparsifiner_edge.errors import ArtifactError, ConfigError, SparsifinerError
from sparsifiner_edge.plan import plan_of
from sparsifiner_edge.profiles import roofline, stats
from sparsifiner_edge.profiles.boards.board import Board, JetPack, load_board
from sparsifiner_edge.profiles.figures import Comparison
from sparsifiner_edge.profiles.roofline import CPU_FIT, GPU_FIT, GRAPH_FIT, SIZES, SPARSE_KINDS, RooflineFit, Workload
from sparsifiner_edge.records import Known, Unavailable
from sparsifiner_edge.results import Quantity, Result

ESTIMATED = 0.9
"""Of bounds: what the fit was widened to."""
UNFITTED = {("gpu", "fp32"): 1.5, ("gpu", "tf32"): 1.5}
"""Widens the bounds for a kind of board and a precision that no measurement was fitted for."""
UNMEASURED = {"kernels": (0.5, 2.5), "bodies": (0.3, 4.0)}
"""Least and most that sparse layers' own operators, and merging, may take on a GPU, as factors: no one published it."""
RATIO_SPREAD = {"gpu": (1.42, 1.75), "cpu": (1.17, 1.17)}
"""Within it fell nine of ten ratios of two models on one board, at one precision and at two, when the chip, or on a CPU
the models, were left out of the fit: what is wrong about the board cancels (`profiles/results/estimate.json`)."""
ENERGY_RANGE = 3.0
"""Highest over lowest energy, beyond which a figure would help nobody to choose. Our choice."""
MEMORY = {
    "gpu": ((150e6, 400e6, 1200e6), (1.0, 1.1, 2.0), (1.0, 2.0, 4.0)),
    "cpu": ((60e6, 90e6, 130e6), (1.0, 1.45, 2.1), (3.0, 5.5, 8.0)),
}
"""Least, taken and most: bytes of the runtime itself; how often weights lie in memory at the peak, packed beside what
was read; how many layers' tensors are alive then. CPU: recorded; GPU: judged.
"""
SCORE_COPIES = (1.0, 1.0, 2.0)
"""The same for scores and gathered keys, where they are kept in memory."""


class EstimateStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """What a bundle would cost.

    Attributes:
        peak_memory_bytes: of its process, and of a card what it holds there. energy_j: of one query.
        fits_memory: "yes" by the upper bound, "no" by the lower one, else "perhaps".
        against, comparison: of two, the other's, and both beside one another.
    """

    latency_ms: Quantity
    peak_memory_bytes: Quantity
    energy_j: Known[Quantity]
    fits_memory: str
    against: EstimateStatistics | None = None
    comparison: Comparison | None = None


class EstimateMethod(msgspec.Struct, frozen=True, kw_only=True):
    """How it was computed.

    Attributes:
        board: in its power mode, without sources. jetpack: of the board, where it has any.
        dense: whether every layer reads every token.
        stored, linear, other: precision of the file, and what linear layers and the rest are taken to compute in.
        kernels, because: what is assumed to run sparse operators, "native", "portable" or "none", and why.
        against: of two, the other one's.
    """

    estimate: str = "computed, not measured; `machine` is where it was computed, not the board"
    board: Board
    power_mode: str | Unavailable
    jetpack: JetPack | None = None
    dense: bool
    stored: str
    linear: str
    other: str
    kernels: str
    because: str
    batch: int
    calibration: RooflineFit
    against: EstimateMethod | None = None


class EstimateResult(Result, frozen=True):
    """Of kind "estimate"; it has no samples."""

    method: EstimateMethod
    samples: dict[str, Any]
    statistics: EstimateStatistics


_Bounds: TypeAlias = tuple[float, float, float]
"""Least, likely and most."""


def estimate_bundle(
    bundle: str | Path,
    board: str | Path | Board,
    *,
    against: str | Path | None = None,
    precision: str | None = None,
    power_mode: str | None = None,
    jetpack: str | None = None,
) -> EstimateResult:
    """Estimate a bundle on a board, alone or beside another. Sparse operators are taken to run natively on a CPU, and
    on a GPU where the bundle carries kernels compiled for its SM that the JetPack takes; else as function bodies.

    Args:
        bundle: its manifest says what there is to compute.
        board: a name, a TOML file, or one that was loaded.
        against: the bundle to compare with.
        precision: "fp32", "tf32", "fp16" or "int8", of both; None takes what one would deploy: int8 where the file
            stores it, else fp16 on a GPU.
        power_mode: name or number; None takes full clocks.
        jetpack: of a Jetson: "6", "7" or a version; None takes the board's newest.

    Raises:
        ArtifactError: not a bundle, altered, of another version, or its costs are missing or do not fit its model.
        ConfigError: unknown board, mode, precision or JetPack; both bundles are the same.

    Example:
        >>> estimate_bundle("bundle", "jetson-orin-nano-8gb").method.kernels
        'portable'
    """
    device = board if isinstance(board, Board) else load_board(board)
    release = device.release(jetpack)
    device = device if power_mode is None else device.in_mode(power_mode)
    how = power_mode or Unavailable("none chosen: full clocks"), release
    result, ours = _estimate("subject", Path(bundle), device, precision, *how)
    if against is None:
        return result
    other, theirs = _estimate("against", Path(against), device, precision, *how)
    if result.subjects[0].sha256 == other.subjects[0].sha256:
        raise ConfigError(f"{against} is the same bundle as {bundle}.", "Give --against another one, or leave it out.")
    compared = _compare(result.method, ours, other.method, theirs)
    return msgspec.structs.replace(
        result,
        subjects=result.subjects + other.subjects,
        method=msgspec.structs.replace(result.method, against=other.method),
        statistics=msgspec.structs.replace(result.statistics, against=other.statistics, comparison=compared),
    )


def _estimate(
    role: str, folder: Path, device: Board, precision: str | None, mode: str | Unavailable, release: JetPack | None
) -> tuple[EstimateResult, _Bounds]:
    """Of one bundle; and its latency as if the fit were right."""
    checked = open_bundle(folder)
    manifest, stored = checked.manifest, checked.require(checked.manifest.precision, "precision")
    half = device.fp16_tflops and (device.kind == "gpu" or stored == "fp16")
    chosen = precision or ("int8" if stored == "int8" else "fp16" if half else "fp32")
    device.peak(chosen)  # Rejects what the board cannot do before anything is computed.
    shape, sparsity = model_of(checked)
    plan, batch = plan_of(sparsity, shape.depth, shape.patches), 1 if manifest.batch is None else manifest.batch
    kernels, because = _kernels(manifest, device, release)
    if not manifest.ops and plan.sparse_layers:
        raise ArtifactError(f"{checked.folder}: the manifest names no operators for its sparse layers.", AGAIN)
    checked.require(manifest.inputs or None, "inputs")
    if not 0 < batch <= MOST_BATCH:
        raise ArtifactError(f"{checked.folder}: an input's shape is {list(manifest.inputs[0].shape)!r}.", AGAIN)
    size = (checked.folder / MODEL_FILE).stat().st_size * SIZES[chosen] / SIZES.get(stored, 4)
    cpu = device.kind == "cpu"
    run_by = ("native" if cpu else "kernels") if kernels == "native" else "bodies"
    work = Workload(shape, sparsity, batch, run_by, materialised=cpu and kernels == "none")
    fit = CPU_FIT if cpu else GRAPH_FIT
    method = EstimateMethod(
        board=msgspec.structs.replace(device, sources={}, power_modes=(), jetpack=()),
        power_mode=mode,
        jetpack=release,
        dense=plan.is_dense,
        stored=stored,
        linear=chosen,
        other=roofline.other_precision(chosen, device),
        kernels=kernels,
        because=because,
        batch=batch,
        calibration=fit,
    )
    seconds = _latency(method, work)
    statistics = _statistics(method, work, seconds, size)
    return EstimateResult("estimate", [checked.subject(role)], method, {}, statistics), seconds


def _kernels(manifest: Manifest, board: Board, release: JetPack | None) -> tuple[str, str]:
    """What is assumed to run sparse operators, and why."""
    if not manifest.ops:
        return "none", "the bundle has standard operators alone"
    if board.kind == "cpu":
        return "native", "the native library is assumed to be installed there"
    if why := why_no_kernels(release):
        return "portable", why
    here = [entry for entry in manifest.boards if entry.compute_capability == f"{board.sm / 10:.1f}" and entry.refused]
    if here:
        refused = here[0].refused
        return "portable", f"{len(refused)} nodes have no kernels: {next(iter(refused.values()))}"
    if table_file(board.sm) in manifest.files:
        return "native", f"the bundle carries kernels compiled for SM {board.sm}"
    return "portable", f"the bundle carries no kernels compiled for SM {board.sm}"


def why_no_kernels(release: JetPack | None) -> str | None:
    """Why a board's JetPack runs no kernels of bundles; None where it does, or the board has none."""
    if release is not None and tuple(map(int, release.tensorrt.split("."))) < (10, 3):
        return f"TensorRT {release.tensorrt} takes no kernels of a bundle, 10.3 and later do"
    return None


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
        raise ArtifactError(f"{bundle.folder}: {error.what}", AGAIN) from error
    return shape, sparsity


def _statistics(method: EstimateMethod, work: Workload, seconds: _Bounds, model_bytes: float) -> EstimateStatistics:
    board, linear = method.board, method.linear
    spread = method.calibration.spread * UNFITTED.get((board.kind, linear), 1.0)
    latency, room = (seconds[0] / spread, seconds[1], seconds[2] * spread), board.memory_gb * 1e9
    memory = memory_bytes(board.kind, model_bytes, *peak_activations(work, SIZES[linear]))
    low, _, high = memory
    how = "runtime, weights as often as they are held, tensors of some layers, and scores kept in memory"
    return EstimateStatistics(
        latency_ms=_quantity(latency, 1e3, f"roofline; factor {spread:.3g} either way"),
        peak_memory_bytes=_quantity(memory, 1.0, how),
        energy_j=_energy(board, latency),
        fits_memory="yes" if high <= room else "no" if low > room else "perhaps",
    )


def _quantity(bounds: _Bounds, factor: float, how: str) -> Quantity:
    low, value, high = (factor * bound for bound in bounds)
    return Quantity(value, low, high, ESTIMATED, how)


def _latency(method: EstimateMethod, work: Workload) -> _Bounds:
    """Seconds; its bounds are of what none was fitted for, on a GPU what is sparse or merges, and launches that are
    not recorded as a graph.
    """
    spent = roofline.costs(work, method.board, method.linear, method.calibration)
    sparse_layers = plan_of(work.sparsity, work.shape.depth, work.shape.patches).sparse_layers
    least = most = 0.0
    for cost in spent:
        sparse = cost.operator.layer in sparse_layers and cost.operator.kind in SPARSE_KINDS
        judged = sparse or (work.sparsity.merge and cost.operator.kind == "pruning")
        few, many = UNMEASURED[work.kernels] if judged and method.board.kind == "gpu" else (1.0, 1.0)
        apart = cost.launch_s * (GPU_FIT.launch_us / GRAPH_FIT.launch_us - 1) if method.board.kind == "gpu" else 0.0
        least, most = least + cost.seconds * few, most + cost.seconds * many + apart
    return least, roofline.seconds(spent), most


def _compare(ours: EstimateMethod, subject: _Bounds, theirs: EstimateMethod, against: _Bounds) -> Comparison:
    """How many times as fast the subject is, from both latencies. What is wrong about the board cancels, and kernels of
    one kind are as fast in both, however fast that is.
    """
    least, value, most = (b / a for a, b in zip(subject, against, strict=True))
    if ours.kernels != theirs.kernels:
        least, most = against[0] / subject[2], against[2] / subject[0]
    kind, alike = ours.board.kind, ours.linear == theirs.linear
    spread = RATIO_SPREAD[kind][not alike] * max(UNFITTED.get((kind, how.linear), 1.0) for how in (ours, theirs))
    low, high = min(least, most) / spread, max(least, most) * spread
    ratio = _quantity((low, value, high), 1.0, f"factor {spread:.3g} either way, beside kernels that no one measured")
    return Comparison(ratio=ratio, verdict=stats.judge(low, high))


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


def _energy(board: Board, latency: _Bounds) -> Quantity | Unavailable:
    """From power at rest for the shortest time to the most (the power mode's, else the board's) for the longest."""
    low, high = board.idle_w * latency[0], board.tdp_w * latency[2]
    how = f"{board.idle_w:.3g} W at rest, if that is known, up to {board.tdp_w:.3g} W"
    if high > ENERGY_RANGE * low:
        return Unavailable(f"unknown: no sourced power figure narrow enough: {how}")
    return _quantity((low, (low * high) ** 0.5, high), 1.0, how)
