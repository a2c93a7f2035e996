"""Single-stream latency of a bundle, alone or interleaved with another: one query at a time, one process per bundle."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparsifiner_edge.artifacts import open_bundle
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.profiles import stats
from sparsifiner_edge.profiles.client import Worker, start_worker
from sparsifiner_edge.results import bundle_subject, new_result
from sparsifiner_edge.runtime.open import check_backend, check_kernels

RULES = ("quick",)
Progress = Callable[[str, float, float], None]
"""Called with a stage, the seconds done and the seconds planned for the whole measurement."""

_LOAD_TIMEOUT_S = 900.0
_SETTLED = 0.02
_WARM_UP_S = 5.0
_WINDOW_MS = 100.0
_WINDOWS = 3
_BLOCK_MS = 200.0
_MIN_BLOCKS = 20
# After the other process ran, its threads still spin for some milliseconds and the caches hold its data.
_REWARM_MS = 20.0


class _Rules(NamedTuple):
    name: str
    seconds: float
    min_queries: int
    max_seconds: float
    seed: int


class _Side(NamedTuple):
    """One of the bundles: its worker, what loading reported, how warm-up went, and a query's time after it."""

    role: str
    worker: Worker
    load: dict[str, Any]
    warm_up: dict[str, Any]
    query_ms: float
    blocks: list[list[float]]


def profile_bundle(
    bundle: str | Path,
    backend: str = "onnxruntime",
    *,
    against: str | Path | None = None,
    rules: str = "quick",
    threads: int | None = None,
    kernels: str = "auto",
    seconds: float = 10.0,
    min_queries: int = 64,
    max_seconds: float = 60.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a bundle; with `against`, also the ratio between the two.

    Each bundle lives in a process of its own, warmed until the medians of three consecutive windows lie within 2 %
    (at most about 5 s; the result says whether they did). Then one query follows another. With `against`, both
    processes stay alive and run in turn, in short blocks, in an order drawn from ABBA and BAAB; one idles meanwhile.

    Args:
        bundle: the bundle that is judged.
        backend: one of `sparsifiner_edge.runtime.BACKENDS`, for both bundles.
        against: the bundle to compare with.
        rules: "quick", the only set so far; the numbers below are its own.
        threads: threads inside one operator; None takes the cores that this process may run on.
        kernels: one of `sparsifiner_edge.runtime.KERNELS`, for both bundles.
        seconds: least time measured per bundle.
        min_queries: least number of queries per bundle.
        max_seconds: most time spent per bundle, even when `min_queries` is not reached; at least twice `seconds`.
        seed: of the order.
        progress: called now and then.

    Returns:
        A result (see `sparsifiner_edge.results`) of kind "profile", or "comparison" with `against`. Under `samples`
        and `statistics`: `subject`, `against`; and `statistics.comparison` with `ratio` (against's latency over the
        subject's: above 1 the subject is faster), `verdict` ("faster", "slower", "no difference shown") and `sentence`.

    Raises:
        ArtifactError: not a bundle, altered, or of a newer schema.
        BackendError: unknown backend, the backend refuses the model, or a process died or hung.
        ConfigError: a number is out of range.
    """
    settings = _checked(_Rules(rules, seconds, min_queries, max_seconds, seed))
    check_backend(backend)
    check_kernels(kernels)
    folders = {"subject": Path(bundle)} | ({"against": Path(against)} if against is not None else {})
    subjects = [{"role": role} | bundle_subject(path, open_bundle(path)) for role, path in folders.items()]
    clock = _Clock(progress or (lambda *_: None), settings, len(folders))
    with contextlib.ExitStack() as stack:
        sides = []
        for role, path in folders.items():
            worker = stack.enter_context(start_worker())
            clock.tell(f"loading {path.name}")
            request = {"bundle": str(path.resolve()), "backend": backend, "threads": threads, "kernels": kernels}
            load = worker.ask("load", _LOAD_TIMEOUT_S, **request)
            sides.append(_warm_up(role, worker, load, clock))
        order = _measure(sides, settings, clock)
        memory = {side.role: side.worker.ask("memory", 60) for side in sides}
        descriptions = {side.role: side.worker.ask("describe", _LOAD_TIMEOUT_S) for side in sides}
    samples = {side.role: {"latency_ms": _latency(side)} for side in sides}
    figures: dict[str, Any] = {side.role: _figures(side, memory[side.role]) for side in sides}
    if len(sides) == 2:
        figures["comparison"] = _compare(sides, _names(subjects))
    method = _method(settings, sides, order, descriptions)
    return new_result("comparison" if against is not None else "profile", subjects, method, samples, figures)


def _checked(settings: _Rules) -> _Rules:
    if settings.name not in RULES:
        raise ConfigError(f"rules is {settings.name!r}.", f"Choose one of: {', '.join(RULES)}.")
    if not settings.seconds > 0 or not settings.max_seconds > 0:
        raise ConfigError(f"seconds is {settings.seconds}, at most {settings.max_seconds}.", "Give more than 0.")
    if settings.min_queries < 1:
        raise ConfigError(f"min_queries is {settings.min_queries}.", "Give at least 1.")
    # Twice, because a comparison also spends time on unrecorded queries.
    return settings._replace(max_seconds=max(2 * settings.seconds, settings.max_seconds))


class _Clock:
    """Seconds done and planned over the whole measurement, for a progress bar with the time left."""

    def __init__(self, progress: Progress, settings: _Rules, sides: int) -> None:
        self._progress = progress
        self._start = time.monotonic()
        self._planned = sides * (settings.seconds + 1.0)

    def plan(self, seconds_left: float) -> None:
        self._planned = time.monotonic() - self._start + seconds_left

    def tell(self, stage: str) -> None:
        done = time.monotonic() - self._start
        self._progress(stage, done, max(self._planned, done))


def _block(side: Worker, queries: int, rewarm: int, query_ms: float) -> list[float]:
    """A hundredfold slowdown is still waited for; a hang is not."""
    timeout = 60 + 0.1 * (queries + rewarm) * query_ms
    latency: list[float] = side.ask("block", timeout, queries=queries, rewarm=rewarm)["latency_ms"]
    return latency


def _warm_up(role: str, worker: Worker, load: dict[str, Any], clock: _Clock) -> _Side:
    """Run windows of about 100 ms until three medians in a row lie within 2 %, for about 5 s at most."""
    start = time.monotonic()
    query_ms = max(_block(worker, 1, 0, load["first_inference_ms"])[0], 1e-3)
    window = max(1, round(_WINDOW_MS / query_ms))
    medians: list[float] = []
    settled = False
    while not settled and (time.monotonic() - start < _WARM_UP_S or len(medians) < 1):
        medians.append(statistics.median(_block(worker, window, 0, query_ms)))
        last = medians[-_WINDOWS:]
        settled = len(last) == _WINDOWS and max(last) <= min(last) * (1 + _SETTLED)
        clock.tell(f"warming up {role}")
    report = {
        "settled": settled,
        "queries": 1 + window * len(medians),
        "seconds": time.monotonic() - start,
        "window_queries": window,
        "window_medians_ms": medians,
    }
    return _Side(role, worker, load, report, medians[-1], [])


def _measure(sides: list[_Side], settings: _Rules, clock: _Clock) -> list[str]:
    """Fill every side's `blocks`; returns the order within each round, such as ["subject", "against"]."""
    block_ms = min(_BLOCK_MS, settings.seconds * 1000 / _MIN_BLOCKS)
    sizes = {side.role: max(1, round(block_ms / side.query_ms)) for side in sides}
    random = np.random.default_rng(settings.seed)
    order: list[str] = []
    rewarm = {side.role: _rewarm(side) if len(sides) > 1 else 0 for side in sides}
    wall = dict.fromkeys(sizes, 0.0)
    clock.plan(sum(_expected_s(side, settings, rewarm[side.role] / sizes[side.role]) for side in sides))
    while not all(_enough(side, wall[side.role], settings) for side in sides):
        first = sides[::-1] if random.integers(2) else sides
        for turn in (first, first[::-1]):  # ABBA or BAAB: each side is first as often as second.
            for side in turn:
                start = time.monotonic()
                side.blocks.append(_block(side.worker, sizes[side.role], rewarm[side.role], side.query_ms))
                wall[side.role] += time.monotonic() - start
                clock.tell("measuring")
            order.append(turn[0].role)
    return order


def _rewarm(side: _Side) -> int:
    return int(_REWARM_MS / side.query_ms)


def _expected_s(side: _Side, settings: _Rules, rewarm_share: float) -> float:
    measured = max(settings.seconds, settings.min_queries * side.query_ms / 1000)
    return min(measured * (1 + rewarm_share), settings.max_seconds)


def _enough(side: _Side, wall_s: float, settings: _Rules) -> bool:
    latency = _latency(side)
    done = sum(latency) / 1000 >= settings.seconds and len(latency) >= settings.min_queries
    return (done and len(side.blocks) >= _MIN_BLOCKS) or wall_s >= settings.max_seconds


def _latency(side: _Side) -> list[float]:
    return [ms for block in side.blocks for ms in block]


def _figures(side: _Side, memory: dict[str, Any]) -> dict[str, Any]:
    latency = _latency(side)
    once = {name: value for name, value in side.load.items() if name.endswith(("_ms", "_bytes"))}
    return stats.summarise(latency) | {"queries": len(latency)} | once | memory


def _compare(sides: list[_Side], names: list[str]) -> dict[str, Any]:
    subject, against = sides
    ratios = stats.round_ratios(subject.blocks, against.blocks)
    low, high = stats.quantile_interval(ratios, 0.5)
    ratio = float(np.median(ratios))
    verdict = stats.judge(low, high)
    return {
        "ratio": stats.estimate(ratio, low, high, "order statistics of paired rounds, effective sample size"),
        "rounds": len(ratios),
        "verdict": verdict,
        "sentence": _sentence(verdict, names, ratio, low, high),
    }


def _names(subjects: list[dict[str, Any]]) -> list[str]:
    """Two names that differ: the models', else the folders', else by place."""
    for key in ("name", "path"):
        names = [Path(subject[key]).name for subject in subjects]
        if names[0] != names[1]:
            return names
    return [f"{names[0]} (first)", f"{names[1]} (second)"]


def _sentence(verdict: str, names: list[str], ratio: float, low: float | None, high: float | None) -> str:
    subject, against = names
    if low is None or high is None:
        return f"No difference shown between {subject} and {against}: too few independent rounds; measure longer."
    interval = f"95 % interval {low:.3f} to {high:.3f}"
    if verdict == "no difference shown":
        return f"No difference shown between {subject} and {against}: ratio {ratio:.3f}, {interval}, not beyond +-1 %."
    return f"{subject} is {verdict} than {against}: {ratio:.3f} times its speed, {interval}."


def _method(settings: _Rules, sides: list[_Side], order: list[str], described: dict[str, Any]) -> dict[str, Any]:
    method: dict[str, Any] = {
        "scenario": "single stream: one query at a time, from Session.infer's call to its return",
        "clock": "time.perf_counter_ns",
        "rules": settings._asdict(),
        "input": {"kind": "uniform random, seed 0, made once", "shapes": sides[0].load["input_shapes"]},
        "isolation": "one process per bundle",
        "load_ms": "the session's creation alone, after importing the backend (import_ms)",
        "peak_rss_bytes": "VmHWM of the whole process: Python, the backend and the model",
        "runtime": described,
        "warm_up": {side.role: side.warm_up for side in sides},
        "block_queries": {side.role: len(side.blocks[0]) for side in sides},
    }
    if len(sides) == 2:
        method["ratio"] = "median over rounds of: against's median latency over the subject's, within one round"
        method["first_in_round"] = order
        method["rewarm_queries"] = {side.role: _rewarm(side) for side in sides}
    if any(len(_latency(side)) < settings.min_queries for side in sides):
        method["cut_short"] = f"max_seconds came before {settings.min_queries} queries"
    return method
