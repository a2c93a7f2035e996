"""Engines for `attention_cpu.py` and `model_cpu.py`, and fair timing of several engines in one process.

Each engine runs in bursts after a pause, because threads of the previous one may spin for some milliseconds. Each round
runs all engines in a new random order. Ratios are between medians of a round, intervals are order statistics over
rounds.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from sparsifiner_edge.execution import Execution
from sparsifiner_edge.ops import native
from sparsifiner_edge.profiles import stats
from sparsifiner_edge.profiles.measure.timing import call_ms
from sparsifiner_edge.records import write_record
from sparsifiner_edge.runtime.openvino import import_openvino

Run = Callable[[], Any]
PAUSE_S = 0.05
# One arena for all sessions: each would keep its own largest scores, over a gigabyte at 1036 px.
onnxruntime.create_and_register_allocator(
    onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    ),
    None,
)


def by_kernels(backend: str, precision: str, threads: int) -> Execution:
    """Open a backend with our native kernels instead of function bodies."""
    return Execution(backend=backend, compute_precision=precision, kernels="native", threads=threads)


def ort_session(model: bytes | str, threads: int, kernels: bool = True) -> Any:
    """Return an ONNX Runtime session, by default with our kernels registered."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.use_env_allocators", "1")
    if kernels:
        path = native.library_path()
        if path is None:
            raise SystemExit(f"the native library is {native.NOT_BUILT}")
        options.register_custom_ops_library(str(path))
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def has_bf16() -> bool:
    """Return True if the CPU supports bf16; otherwise OpenVINO emulates it, slower than fp32."""
    flags = Path("/proc/cpuinfo").read_text()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def openvino_compiled(model: Any, threads: int, precision: str) -> Any:
    """Compile a model, or the path of an ONNX file, with OpenVINO for the CPU. precision: "f32" or "bf16"."""
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision}
    return import_openvino().Core().compile_model(model, "CPU", settings)


def openvino_run(model: Any, inputs: Mapping[str, np.ndarray] | list[np.ndarray], threads: int, precision: str) -> Run:
    """Return a function that runs the compiled model on these inputs."""
    request = openvino_compiled(model, threads, precision).create_infer_request()
    return lambda: request.infer(inputs)


def time_in_turn(
    runs: Mapping[str, Run],
    rounds: int,
    burst: int,
    tell: Callable[[str], None],
    after: Callable[[str], None] = lambda _: None,
) -> dict[str, np.ndarray]:
    """Return milliseconds [rounds, burst] of each engine. after: called with the name of each timed engine."""
    order = list(runs)
    draw = random.Random(0)
    taken: dict[str, list[list[float]]] = {name: [] for name in runs}
    for name in order:
        runs[name]()
        after(name)
    for number in range(rounds):
        draw.shuffle(order)
        for name in order:
            tell(f"round {number + 1} of {rounds}: {name}")
            time.sleep(PAUSE_S)
            taken[name].append(call_ms(runs[name], burst, warm_up=1))
            after(name)
    return {name: np.array(rows) for name, rows in taken.items()}


def ratio(slow: np.ndarray, fast: np.ndarray) -> dict[str, Any]:
    """Return how many times faster `fast` is: median over rounds of the ratio of medians, with its interval."""
    return dict(write_record(stats.median(stats.round_ratios(list(fast), list(slow)))))


def gemm_peak(threads: int, size: int = 1024) -> tuple[Run, float]:
    """Return a float32 matrix product in ONNX Runtime, and its GFLOP."""
    kind = onnx.TensorProto.FLOAT
    a, b, c = (onnx.helper.make_tensor_value_info(n, kind, [size, size]) for n in "abc")
    graph = onnx.helper.make_graph([onnx.helper.make_node("MatMul", ["a", "b"], ["c"])], "gemm", [a, b], [c])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    session = ort_session(model.SerializeToString(), threads, kernels=False)
    rng = np.random.default_rng(0)
    feed = {name: rng.normal(size=(size, size)).astype(np.float32) for name in "ab"}
    return (lambda: session.run(None, feed)), 2 * size**3 / 1e9
