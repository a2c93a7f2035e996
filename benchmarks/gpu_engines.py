"""Fair timing on a CUDA GPU with graphs and engines in turn, for `attention_gpu.py` and `model_gpu.py`."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping
from typing import Any

import click
import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsifiner_edge.cli.common import print_table
from sparsifiner_edge.machine import package_version
from sparsifiner_edge.profiles import stats
from sparsifiner_edge.records import write_record

Run = Callable[[], Any]
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


def require_gpu() -> dict[str, Any]:
    """Return the GPU to measure; exit with code 2 if there is none."""
    if not torch.cuda.is_available():
        built = torch.version.cuda or "no CUDA at all"
        click.echo(
            f"Error: there is no CUDA device (this torch, {torch.__version__}, was built for {built}).\n"
            "  Run this on a machine with an NVIDIA GPU, its driver, and a torch for CUDA.",
            err=True,
        )
        raise SystemExit(2)
    found = torch.cuda.get_device_properties(0)
    return {
        "gpu": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": package_version("triton"),
    }


def graph(run: Run) -> Run:
    """Warm `run` up and capture it as one CUDA graph: no launch overhead on either side."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.inference_mode():
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(captured):
        run()
    return captured.replay


def _milliseconds(run: Run, burst: int) -> list[float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(burst + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]


def time_in_turn(runs: Mapping[str, Run], rounds: int, burst: int) -> dict[str, np.ndarray]:
    """Return milliseconds [rounds, burst] of each engine; every round runs all in a new random order."""
    order, draw = list(runs), random.Random(0)
    taken: dict[str, list[list[float]]] = {name: [] for name in runs}
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            _milliseconds(runs[name], max(burst // 4, 1))
            taken[name].append(_milliseconds(runs[name], burst))
    return {name: np.array(rows) for name, rows in taken.items()}


def ratio(slow: np.ndarray, fast: np.ndarray) -> dict[str, Any]:
    """Return how many times faster `fast` is: median over rounds of the ratio of medians, interval and spread."""
    ratios = stats.round_ratios(list(fast), list(slow))
    return dict(write_record(stats.median(ratios))) | {"least": float(ratios.min()), "greatest": float(ratios.max())}


def by_backend(run: Run) -> tuple[dict[str, Run], dict[str, str]]:
    """Return graphs of `run`, compiled, by backend of scaled_dot_product_attention; and why others cannot run."""
    runs, refused = {}, {}
    for backend in BACKENDS:

        def limited(backend: SDPBackend = backend) -> Any:
            with sdpa_kernel(backend):
                return run()

        try:
            runs[backend.name] = graph(torch.compile(limited))
        except (RuntimeError, torch.cuda.OutOfMemoryError) as error:
            refused[backend.name] = str(error).splitlines()[0]
            torch.cuda.synchronize()
    return runs, refused


def flash_attn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> dict[str, Run]:
    """Return FlashAttention's own package, if it is installed; q, k, v [B,H,N,d]."""
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        return {}
    rows = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    return {"FLASH_ATTN": graph(lambda: flash_attn_func(*rows, softmax_scale=scale))}


def compare(
    rivals: tuple[dict[str, Run], dict[str, str]], ours: Callable[[], dict[str, Run]], rounds: int, burst: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return samples and statistics of our engines and the fastest of the rivals; see `by_backend`."""
    runs, refused = rivals
    rival = min(runs, key=lambda name: float(np.median(_milliseconds(runs[name], 10))))
    runs = {f"dense {rival}": runs[rival]} | ours()
    times = time_in_turn(runs, rounds, burst)
    dense = times[f"dense {rival}"]
    return {name: x.tolist() for name, x in times.items()}, {
        "fastest_backend": rival,
        "refused_backends": refused,
        "median_ms": {name: float(np.median(x)) for name, x in times.items()},
        "times_faster_than_dense": {name: ratio(dense, x) for name, x in times.items() if x is not dense},
    }


def show(title: str, found: dict[str, Any]) -> None:
    """Print a table of the results of `compare`."""
    rows = []
    for name, ms in found["median_ms"].items():
        against = found["times_faster_than_dense"].get(name)
        bounds = f"{against['value']:.2f} ({against['least']:.2f} to {against['greatest']:.2f})" if against else ""
        rows.append([name, f"{ms:.3f}", bounds])
    print_table(title, ["", "ms", "times dense"], rows)
