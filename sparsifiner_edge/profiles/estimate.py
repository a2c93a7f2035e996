"""Estimate the cost of one or two bundles on a board that is not available, with bounds."""

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
"""Confidence of the bounds: the fit's spread covers nine of ten left-out measurements."""
UNFITTED = {("gpu", "fp32"): 1.5, ("gpu", "tf32"): 1.5}
"""Factor that widens the bounds, by kind of board and precision, if no measurement of that precision was fitted."""
UNMEASURED = {"kernels": (0.5, 2.5), "bodies": (0.3, 4.0)}
"""Minimum and maximum factor on the time of sparse layers and merging on a GPU, by their implementation.

These are judgements, because no measurements have been published.
"""
RATIO_SPREAD = {"gpu": (1.42, 1.75), "cpu": (1.17, 1.17)}
"""Factor within which the latency ratio of two models on one board fell in nine of ten cases, by kind of board.

The first value is for two models at the same precision, the second for different precisions. The chip (GPU) or the
models (CPU) were left out of the fit. The ratio is more accurate than the latencies, because errors about the board
cancel (`profiles/results/estimate.json`).
"""
ENERGY_RANGE = 3.0
"""Ratio of highest to lowest energy above which no energy is reported, because it would not help to choose.

Our choice.
"""
MEMORY = {
    "gpu": ((150e6, 400e6, 1200e6), (1.0, 1.1, 2.0), (1.0, 2.0, 4.0)),
    "cpu": ((60e6, 90e6, 130e6), (1.0, 1.45, 2.1), (3.0, 5.5, 8.0)),
}
"""Constants of the memory estimate by kind of board, each as (minimum, likely value, maximum).

In order: memory of the runtime itself in bytes; number of copies of the weights at the peak, where packed weights lie
next to the weights that were read; number of layers whose activations are alive at the same time. The values for CPUs
were recorded, those for GPUs are judgements.
"""
SCORE_COPIES = (1.0, 1.0, 2.0)
"""Copies of scores and gathered keys at the peak, if they are kept in memory, as (minimum, likely value, maximum)."""


class EstimateStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """Estimated cost of a bundle.

    Attributes:
        latency_ms: Latency of one query in milliseconds.
        peak_memory_bytes: Peak memory of the process; on a graphics card, the memory that the process holds there.
        energy_j: Energy of one query in joules.
        fits_memory: "yes" if the upper bound of the memory fits the board, "no" if the lower bound does not, else
            "perhaps".
        against: Estimate of the other bundle, if two are compared.
        comparison: Comparison of both bundles.
    """

    latency_ms: Quantity
    peak_memory_bytes: Quantity
    energy_j: Known[Quantity]
    fits_memory: str
    against: EstimateStatistics | None = None
    comparison: Comparison | None = None


class EstimateMethod(msgspec.Struct, frozen=True, kw_only=True):
    """Assumptions of an estimate.

    Attributes:
        estimate: Note that the values were not measured.
        board: Board in its power mode, without sources.
        power_mode: Power mode as given.
        jetpack: JetPack release of the board, if it has any.
        dense: True if every layer reads every token.
        precision: Weight precision of the file.
        linear: Compute precision assumed for linear layers.
        other: Compute precision assumed for all other operators.
        kernels: Assumed implementation of the sparse operators: "native", "portable" or "none".
        because: Reason for this assumption.
        batch: Batch size.
        calibration: Constants of the roofline model.
        against: Assumptions for the other bundle, if two are compared.
    """

    estimate: str = "computed, not measured; `machine` is where it was computed, not the board"
    board: Board
    power_mode: str | Unavailable
    jetpack: JetPack | None = None
    dense: bool
    precision: str
    linear: str
    other: str
    kernels: str
    because: str
    batch: int
    calibration: RooflineFit
    against: EstimateMethod | None = None


class EstimateResult(Result, frozen=True):
    """Result of kind "estimate"; it has no samples."""

    method: EstimateMethod
    samples: dict[str, Any]
    statistics: EstimateStatistics


_Bounds: TypeAlias = tuple[float, float, float]
"""Minimum, likely value and maximum."""


def estimate_bundle(
    bundle: str | Path,
    board: str | Path | Board,
    *,
    against: str | Path | None = None,
    compute_precision: str | None = None,
    power_mode: str | None = None,
    jetpack: str | None = None,
) -> EstimateResult:
    """Estimate a bundle on a board, alone or compared with another bundle.

    On a CPU, sparse operators are assumed to run in the native library. On a GPU, they are assumed to run in CUDA
    kernels if the bundle carries kernels for the GPU's SM and the JetPack release supports them, else as ONNX function
    bodies.

    Args:
        bundle: Bundle folder; its manifest describes the model.
        board: Name of a board, a TOML file, or a loaded board.
        against: Bundle to compare with.
        compute_precision: "fp32", "tf32", "fp16" or "int8", for both bundles. None takes the precision that is usual
            for deployment: int8 if the weights are int8, else fp16 on a GPU.
        power_mode: Name or number of a power mode; None takes full clocks.
        jetpack: JetPack release of a Jetson: "6", "7" or a version; None takes the newest release for the board.

    Raises:
        ArtifactError: The folder is not a bundle, was altered or has another schema version, or its manifest does not
            describe the model or does not fit it.
        ConfigError: The board, power mode, precision or JetPack release is unknown, or both bundles are the same.

    Example:
        >>> estimate_bundle("bundle", "jetson-orin-nano-8gb").method.kernels
        'portable'
    """
    device = board if isinstance(board, Board) else load_board(board)
    release = device.release(jetpack)
    device = device if power_mode is None else device.in_mode(power_mode)
    setup = power_mode or Unavailable("none chosen: full clocks"), release
    result, ours = _estimate("subject", Path(bundle), device, compute_precision, *setup)
    if against is None:
        return result
    other, theirs = _estimate("against", Path(against), device, compute_precision, *setup)
    if result.subjects[0].sha256 == other.subjects[0].sha256:
        raise ConfigError(f"{against} is the same bundle as {bundle}.", "Give --against another one, or leave it out.")
    comparison = _compare(result.method, ours, other.method, theirs)
    return msgspec.structs.replace(
        result,
        subjects=result.subjects + other.subjects,
        method=msgspec.structs.replace(result.method, against=other.method),
        statistics=msgspec.structs.replace(result.statistics, against=other.statistics, comparison=comparison),
    )


def _estimate(
    role: str,
    folder: Path,
    device: Board,
    compute_precision: str | None,
    mode: str | Unavailable,
    release: JetPack | None,
) -> tuple[EstimateResult, _Bounds]:
    """Return the estimate of one bundle, and its latency in seconds without the spread of the fit."""
    checked = open_bundle(folder)
    manifest, weight_precision = checked.manifest, checked.require(checked.manifest.precision, "precision")
    half = device.fp16_tflops and (device.kind == "gpu" or weight_precision == "fp16")
    chosen = compute_precision or ("int8" if weight_precision == "int8" else "fp16" if half else "fp32")
    device.peak(chosen)  # Rejects a precision that the board does not support, before anything is computed.
    shape, sparsity = model_of(checked)
    plan, batch = plan_of(sparsity, shape.depth, shape.patches), 1 if manifest.batch is None else manifest.batch
    kernels, because = _kernels(manifest, device, release)
    if not manifest.ops and plan.sparse_layers:
        raise ArtifactError(f"{checked.folder}: the manifest names no operators for its sparse layers.", AGAIN)
    checked.require(manifest.inputs or None, "inputs")
    if not 0 < batch <= MOST_BATCH:
        raise ArtifactError(f"{checked.folder}: an input's shape is {list(manifest.inputs[0].shape)!r}.", AGAIN)
    size = (checked.folder / MODEL_FILE).stat().st_size * SIZES[chosen] / SIZES.get(weight_precision, 4)
    cpu = device.kind == "cpu"
    implementation = ("native" if cpu else "kernels") if kernels == "native" else "bodies"
    work = Workload(shape, sparsity, batch, implementation, materialised=cpu and kernels == "none")
    fit = CPU_FIT if cpu else GRAPH_FIT
    method = EstimateMethod(
        board=msgspec.structs.replace(device, sources={}, power_modes=(), jetpack=()),
        power_mode=mode,
        jetpack=release,
        dense=plan.is_dense,
        precision=weight_precision,
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
    """Return the assumed implementation of sparse operators, and the reason."""
    if not manifest.ops:
        return "none", "the bundle uses only standard operators"
    if board.kind == "cpu":
        return "native", "the native library is assumed to be installed on the board"
    if why := why_no_kernels(release):
        return "portable", why
    capability = f"{board.sm / 10:.1f}"
    partial = [entry for entry in manifest.boards if entry.compute_capability == capability and entry.refused]
    if partial:
        refused = partial[0].refused
        return "portable", f"{len(refused)} nodes have no kernels: {next(iter(refused.values()))}"
    if table_file(board.sm) in manifest.files:
        return "native", f"the bundle carries kernels compiled for sm_{board.sm}"
    return "portable", f"the bundle carries no kernels compiled for sm_{board.sm}"


def why_no_kernels(release: JetPack | None) -> str | None:
    """Return why a board's JetPack release cannot run a bundle's kernels; None if it can, or if there is no release."""
    if release is not None and tuple(map(int, release.tensorrt.split("."))) < (10, 3):
        return f"TensorRT {release.tensorrt} does not support a bundle's kernels, 10.3 and later do"
    return None


def model_of(bundle: Bundle) -> tuple[ModelShape, SparsityConfig]:
    """Return the shape and sparsity of a bundle's model, as its manifest describes them.

    Raises:
        ArtifactError: The manifest has no shape, or no model of this shape exists.
    """
    manifest = bundle.manifest
    shape, sparsity = bundle.require(manifest.shape, "shape"), manifest.sparsity or SparsityConfig(keep=1)
    try:
        summary(shape, sparsity)
    except SparsifinerError as error:
        raise ArtifactError(f"{bundle.folder}: {error.what}", AGAIN) from error
    return shape, sparsity


def _statistics(method: EstimateMethod, work: Workload, seconds: _Bounds, model_bytes: float) -> EstimateStatistics:
    """Return latency, memory and energy of a workload."""
    board, linear = method.board, method.linear
    spread = method.calibration.spread * UNFITTED.get((board.kind, linear), 1.0)
    latency, capacity = (seconds[0] / spread, seconds[1], seconds[2] * spread), board.memory_gb * 1e9
    memory = memory_bytes(board.kind, model_bytes, *peak_activations(work, SIZES[linear]))
    low, _, high = memory
    how = "runtime, copies of the weights, activations of some layers, and scores kept in memory"
    return EstimateStatistics(
        latency_ms=_quantity(latency, 1e3, f"roofline; factor {spread:.3g} either way"),
        peak_memory_bytes=_quantity(memory, 1.0, how),
        energy_j=_energy(board, latency),
        fits_memory="yes" if high <= capacity else "no" if low > capacity else "perhaps",
    )


def _quantity(bounds: _Bounds, factor: float, how: str) -> Quantity:
    """Scale bounds by a factor; `how` describes the interval."""
    low, value, high = (factor * bound for bound in bounds)
    return Quantity(value, low, high, ESTIMATED, how)


def _latency(method: EstimateMethod, work: Workload) -> _Bounds:
    """Return the latency in seconds.

    On a GPU, the bounds include the uncertainty of sparse layers and merging, for which nothing was fitted. The maximum
    also includes the launches of a session that records no CUDA graph.
    """
    spent = roofline.costs(work, method.board, method.linear, method.calibration)
    sparse_layers = plan_of(work.sparsity, work.shape.depth, work.shape.patches).sparse_layers
    least = most = 0.0
    for cost in spent:
        sparse = cost.operator.layer in sparse_layers and cost.operator.kind in SPARSE_KINDS
        unmeasured = sparse or (work.sparsity.merge and cost.operator.kind == "pruning")
        low, high = UNMEASURED[work.kernels] if unmeasured and method.board.kind == "gpu" else (1.0, 1.0)
        launch_s = cost.launch_s * (GPU_FIT.launch_us / GRAPH_FIT.launch_us - 1) if method.board.kind == "gpu" else 0.0
        least, most = least + cost.seconds * low, most + cost.seconds * high + launch_s
    return least, roofline.seconds(spent), most


def _compare(ours: EstimateMethod, subject: _Bounds, theirs: EstimateMethod, against: _Bounds) -> Comparison:
    """Return the speed of the subject relative to the other bundle, from both latencies.

    Errors about the board cancel. If both bundles use the same kind of kernels, an error about their speed cancels too.
    """
    least, value, most = (b / a for a, b in zip(subject, against, strict=True))
    if ours.kernels != theirs.kernels:
        least, most = against[0] / subject[2], against[2] / subject[0]
    kind, same_precision = ours.board.kind, ours.linear == theirs.linear
    unfitted = max(UNFITTED.get((kind, method.linear), 1.0) for method in (ours, theirs))
    spread = RATIO_SPREAD[kind][not same_precision] * unfitted
    low, high = min(least, most) / spread, max(least, most) * spread
    ratio = _quantity((low, value, high), 1.0, f"factor {spread:.3g} either way, and the bounds of unmeasured kernels")
    return Comparison(ratio=ratio, verdict=stats.verdict_of(low, high))


def memory_bytes(kind: str, weights: float, layer: float, scores: float) -> _Bounds:
    """Return the memory of a process in bytes.

    Args:
        kind: Kind of board, "cpu" or "gpu".
        weights: Bytes of the weights.
        layer: Bytes of the largest layer's activations.
        scores: Bytes of the scores and gathered keys.
    """
    low, value, high = (
        runtime + a * weights + b * layer + c * scores
        for runtime, a, b, c in zip(*MEMORY[kind], SCORE_COPIES, strict=True)
    )
    return low, value, high


def peak_activations(work: Workload, size: int) -> tuple[float, float]:
    """Return the bytes of the largest layer's activations, and of its scores and gathered keys if kept in memory.

    Args:
        work: Model and batch size.
        size: Bytes per element.
    """
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
    """Return the bytes of gathered keys and values and of scores in the function bodies of a sparse layer."""
    layout = sparsity.layout(shape.patches, shape.prefix)
    read = layout.keys + shape.prefix
    return 2.0 * size * layout.tiles * read * shape.width + 4.0 * shape.heads * shape.patches * (
        read + layout.background_tokens
    )


def _energy(board: Board, latency: _Bounds) -> Quantity | Unavailable:
    """Return the energy in joules: from idle power for the shortest time to maximum power for the longest time.

    The maximum is the power mode's, else the board's.
    """
    low, high = board.idle_w * latency[0], board.tdp_w * latency[2]
    how = f"from {board.idle_w:.3g} W when idle (0: unknown) to {board.tdp_w:.3g} W"
    if high > ENERGY_RANGE * low:
        return Unavailable(f"not estimated: the range {how} is too wide")
    return _quantity((low, (low * high) ** 0.5, high), 1.0, how)
