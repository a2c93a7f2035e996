"""Points and fit of `benchmarks/estimate.py`: published and recorded latencies, and a few constants."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from summary import RESULTS

from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.costs import ModelShape
from sparsifiner_edge.profiles import roofline
from sparsifiner_edge.profiles.boards.board import Board, load_board
from sparsifiner_edge.profiles.roofline import GPU_FIT, OperatorWork, RooflineFit, Workload

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).parent
PUBLISHED = HERE / "published_latency.toml"
DENSE = SparsityConfig(keep=1)
SHAPES = {"vit_small": (384, 6, 1536), "vit_base": (768, 12, 3072)}
Values = dict[str, float]
START_GPU: Values = {"arithmetic": 0.4, "bandwidth": 0.8, "launch_us": 8.0, "int8": 0.8}
START_CPU: Values = {"linear": 0.8, "attention": 0.6, "predictor": 0.2, "int8": 0.6, "launch_us": 10.0, "gb_s": 20.0}
BOUNDS = {
    "arithmetic": (0.05, 1.0),
    "bandwidth": (0.2, 1.0),
    "int8": (0.2, 1.0),
    "launch_us": (0.5, 100.0),
    "linear": (0.2, 1.0),
    "attention": (0.1, 1.0),
    "predictor": (0.02, 1.0),
    "gb_s": (3.0, 100.0),
}


class Point(NamedTuple):
    """A measurement: board, work, precision, operators (equal layers counted) and latency."""

    board: Board
    model: str
    precision: str
    operators: Counter[OperatorWork]
    ms: float


class Peak(NamedTuple):
    """A recorded process: its model, bytes of the linear layers' weights, and its peak memory."""

    work: Workload
    weights: float
    peak: int


def predicted_ms(point: Point, board: Board, share: RooflineFit) -> float:
    return 1e3 * sum(n * roofline.cost(o, board, point.precision, share).seconds for o, n in point.operators.items())


def _operators(work: Workload) -> Counter[OperatorWork]:
    return Counter(dataclasses.replace(operator, layer=0) for operator in roofline.operators(work))


def published(fitted: bool = True) -> list[Point]:
    """Return the points of `published_latency.toml` that are fitted, or those that only serve as checks."""
    content = tomllib.loads(PUBLISHED.read_text("utf-8"))
    work = {name: _operators(Workload(ModelShape(**shape), DENSE)) for name, shape in content["models"].items()}
    found: list[Point] = []
    for series in content["series"]:
        times = series.get("ms") or {name: 1000 / rate for name, rate in series["frames_per_s"].items()}
        if series.get("fitted", True) == fitted:
            board = load_board(series["board"])
            found += [Point(board, name, series["precision"], work[name], ms) for name, ms in times.items()]
    return found


def recorded() -> list[Point]:
    """Return points of `results/model_cpu*`; the board's rate is the fastest recorded one, for int8 four times that."""
    gemm = max(
        operator["gflops"] / operator["share_of_gemm"]
        for row in _statistics("attention_cpu/attention_cpu.json").values()
        for operator in row["operators"].values()
        if "gflops" in operator
    )
    board = msgspec.structs.replace(load_board("cpu-generic"), fp32_tflops=gemm / 1e3, int8_tops=4 * gemm / 1e3)
    found: list[Point] = []
    for folder in ("model_cpu", "model_cpu_base", "model_cpu_base_1036"):
        for name, row in _statistics(f"{folder}/model_cpu.json").items():
            found += _recorded_points(board, name, row["median_ms"])
    return found


def _statistics(path: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / path).read_text("utf-8"))["statistics"]
    return content


def _recorded_points(board: Board, name: str, medians: Mapping[str, float]) -> Iterable[Point]:
    for engine, work in _recorded_work(name).items():
        for precision in ("fp32", "int8"):
            yield Point(board, name, precision, _operators(work), medians[f"{engine} {precision}"])


def _recorded_work(name: str) -> dict[str, Workload]:
    """Return an engine's work: the sparse model with native kernels, or the dense model with attention in memory."""
    model, size, keep, cells = name.split(":")
    width, heads, hidden = SHAPES[model[: model.index("_patch")]]
    shape = ModelShape(12, heads, width, hidden, 1, (int(size) // 14) ** 2, 14)
    sparse = Workload(shape, SparsityConfig(keep=float(keep), background_tokens=int(cells)))
    return {"ours": sparse, "ONNX Runtime": Workload(shape, DENSE, materialised=True)}


def recorded_memory(folder: str) -> Iterable[Peak]:
    """Return the peak memory of float32 processes recorded by `model_cpu.py`."""
    for name, row in _statistics(f"{folder}/model_cpu.json").items():
        for engine, work in _recorded_work(name).items():
            weights = 4.0 * work.shape.depth * 12 * work.shape.width**2
            yield Peak(work, weights, row["peak_memory"][f"{engine} fp32"]["peak_rss_bytes"])


def gpu_share(values: Values, spread: float = 1.0, points: int = 0) -> RooflineFit:
    one = values["arithmetic"]
    return RooflineFit(
        one, one, one, values["int8"], values["bandwidth"], values["launch_us"], GPU_FIT.body_passes, spread, points
    )


def cpu_share(values: Values, spread: float = 1.0, points: int = 0) -> RooflineFit:
    own = {name: values[name] for name in ("linear", "attention", "predictor", "int8", "launch_us")}
    passes = values.get("body_passes", 0.0)
    return RooflineFit(**own, bandwidth=1.0, body_passes=passes, spread=spread, points=points)


def gpu_ratio(point: Point, values: Values) -> float:
    """Return predicted over measured latency."""
    return predicted_ms(point, point.board, gpu_share(values)) / point.ms


def cpu_ratio(point: Point, values: Values) -> float:
    """Return predicted over measured latency; the machine's bandwidth was not recorded and is fitted as well."""
    board = msgspec.structs.replace(point.board, bandwidth_gb_s=values["gb_s"])
    return predicted_ms(point, board, cpu_share(values)) / point.ms


def body_passes(values: Values) -> float:
    """Return the passes at which function bodies are slower than the dense model by the recorded factor.

    From `profile SPARSE/ --against DENSE/ --kernels portable --seconds 15 -o`: keep .10, 25 background tokens, 518 px.
    """
    shape = ModelShape(12, 6, 384, 1536, 1, 37 * 37, 14)
    sparse = Workload(shape, SparsityConfig(keep=0.1, background_tokens=25), kernels="bodies")
    dense = Workload(shape, DENSE, materialised=True)
    wanted = 1 / _statistics("portable_cpu_518.json")["comparison"]["ratio"]["value"]
    board = msgspec.structs.replace(recorded()[0].board, bandwidth_gb_s=values["gb_s"])

    def ratio(passes: float) -> float:
        share = cpu_share(values | {"body_passes": passes})
        one, two = (roofline.seconds(roofline.costs(w, board, "fp32", share)) for w in (sparse, dense))
        return one / two

    low, high = 0.0, 1000.0
    while high - low > 0.01:
        middle = (low + high) / 2
        low, high = (middle, high) if ratio(middle) < wanted else (low, middle)
    return high


def fit(points: Sequence[Point], ratio: Callable[[Point, Values], float], start: Values) -> Values:
    """Return values of least mean squared log ratio, by ever smaller steps along one value at a time."""

    def loss(values: Values) -> float:
        return sum(math.log(ratio(point, values)) ** 2 for point in points) / len(points)

    best, least, step = dict(start), loss(start), 0.3
    while step > 0.005:
        improved = False
        for name in start:
            for factor in (1 + step, 1 / (1 + step)):
                low, high = BOUNDS[name]
                tried = best | {name: min(high, max(low, best[name] * factor))}
                if (value := loss(tried)) < least - 1e-9:
                    best, least, improved = tried, value, True
        step = step if improved else step / 2
    return best


def left_out(
    points: Sequence[Point], ratio: Callable[[Point, Values], float], start: Values, group: Callable[[Point], str]
) -> dict[str, list[tuple[Point, float]]]:
    """Return for each group its points, and predicted over measured when fitted to the others."""
    found = {}
    for name in dict.fromkeys(map(group, points)):
        values = fit([p for p in points if group(p) != name], ratio, start)
        found[name] = [(p, ratio(p, values)) for p in points if group(p) == name]
    return found


def board_of(point: Point) -> str:
    return point.board.name


def chip_of(point: Point) -> str:
    """Return the name of the board without its clock setting."""
    return point.board.name.removesuffix("-super")


def model_of(point: Point) -> str:
    return point.model


def errors(groups: Mapping[str, Sequence[tuple[Point, float]]]) -> Values:
    """Return the median and largest relative error, and the factor that bounds nine of ten points."""
    ratios = np.array([r for pairs in groups.values() for _, r in pairs])
    logs = np.abs(np.log(ratios))
    return {
        "median_error": float(np.median(np.abs(ratios - 1))),
        "greatest_error": float(np.max(np.abs(ratios - 1))),
        "factor_nine_of_ten": float(np.exp(np.quantile(logs, 0.9))),
        "points": len(ratios),
    }
