"""Compares attention operators on this CPU with the fastest dense ones, in float32, one image at a time.

    python benchmarks/attention_cpu.py [--tokens 1370:25 ...] [--threads N] [-o FOLDER]

H = 6 heads of 64, one class token, tiles of 16, query pools of 8, 24 channels: the shapes of a ViT-S and this project's
defaults. Rivals: ONNX Runtime's fused MultiHeadAttention (given q, k and v separately, at no cost), OpenVINO's
scaled_dot_product_attention, and the MatMul, Softmax, MatMul that exporters write. "both" is KeySelect and
SparseAttention in one graph, background tokens included. If the CPU supports bfloat16, there are rows of our operators
in it, called through the C interface on float32 tensors, and OpenVINO's attention in it as a rival. GFLOP/s count the
operations that the operator needs; shares are relative to a float32 matrix product of 1024 x 1024 in ONNX Runtime,
measured in the same run.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click
import numpy as np
from cpu_engines import Run, gemm_peak, has_bf16, openvino_run, ort_session, ratio, time_in_turn
from onnx import TensorProto, helper
from summary import said, write_summary

from sparsifiner_edge.cli.common import err_console, print_table
from sparsifiner_edge.machine import available_cores
from sparsifiner_edge.ops import native
from sparsifiner_edge.ops.bodies import OPSET
from sparsifiner_edge.ops.native.interface import Operators
from sparsifiner_edge.ops.schema import DOMAIN, OPERATORS, VERSION
from sparsifiner_edge.results import Result, Subject

HEADS, WIDTH, TILE, PROBE, CHANNELS, SCALE = 6, 64, 16, 8, 24, 0.125
KEEPS = (0.25, 0.10, 0.05)
SIZES = ("257:16", "577:24", "1025:25", "1370:25", "2305:49", "4097:64", "5477:49", "9217:96")
"""Tokens and background tokens."""
FUSED, OPENVINO, PLAIN, DENSE = "ORT MultiHeadAttention", "OpenVINO SDPA", "ORT MatMul/Softmax/MatMul", "ours, dense"
OPENVINO16, IN_BF16 = "OpenVINO SDPA, bf16", ", bf16"


def model(nodes: list[Any], inputs: dict[str, np.ndarray], output: int = TensorProto.FLOAT) -> bytes:
    """Return a model whose output is the result of the last node."""
    values = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, x.shape) for n, x in inputs.items() if x.dtype != np.int32
    ]
    values += [
        helper.make_tensor_value_info(n, TensorProto.INT32, x.shape) for n, x in inputs.items() if x.dtype == np.int32
    ]
    out = helper.make_tensor_value_info(nodes[-1].output[0], output, None)
    opsets = [("", OPSET), (DOMAIN, VERSION), ("com.microsoft", 1)]
    return helper.make_model(
        helper.make_graph(nodes, "operator", values, [out]),
        opset_imports=[helper.make_opsetid(*pair) for pair in opsets],
        ir_version=10,
    ).SerializeToString()


def runner(nodes: list[Any], inputs: dict[str, np.ndarray], threads: int, output: int = TensorProto.FLOAT) -> Run:
    session = ort_session(model(nodes, inputs, output), threads)
    return lambda: session.run(None, inputs)


def plain_nodes(tokens: int) -> list[Any]:
    """Return attention nodes as exporters write them."""
    make = helper.make_node
    shape = helper.make_tensor("s", TensorProto.INT64, [4], [1, tokens, HEADS, WIDTH])
    nodes = [make("Constant", [], ["shape"], value=shape), make("Constant", [], ["scale"], value_float=SCALE)]
    for name, order in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
        nodes.append(make("Reshape", [name, "shape"], [f"{name}r"]))
        nodes.append(make("Transpose", [f"{name}r"], [f"{name}h"], perm=order))
    return [
        *nodes,
        make("MatMul", ["qh", "kh"], ["l"]),
        make("Mul", ["l", "scale"], ["ls"]),
        make("Softmax", ["ls"], ["p"], axis=-1),
        make("MatMul", ["p", "vh"], ["oh"]),
        make("Transpose", ["oh"], ["o"], perm=[0, 2, 1, 3]),
    ]


def rivals(qkv: np.ndarray, threads: int) -> dict[str, Run]:
    """Return other implementations of dense attention, from separate q, k and v."""
    tokens, channels = qkv.shape[1], qkv.shape[2] // 3
    q, k, v = (np.ascontiguousarray(x) for x in np.split(qkv, 3, -1))
    fused = helper.make_node("MultiHeadAttention", ["q", "k", "v"], ["o"], domain="com.microsoft", num_heads=HEADS)
    made = {FUSED: runner([fused], {"q": q, "k": k, "v": v}, threads)}
    if tokens < 5000:  # its score matrices alone take gigabytes beyond that
        made[PLAIN] = runner(plain_nodes(tokens), {"q": q, "k": k, "v": v}, threads)
    import openvino
    import openvino.opset13 as ops

    given = [ops.parameter([1, tokens, channels], np.float32) for _ in range(3)]
    heads = [ops.transpose(ops.reshape(x, [1, tokens, HEADS, WIDTH], False), [0, 2, 1, 3]) for x in given]
    attended = ops.transpose(ops.scaled_dot_product_attention(*heads, causal=False), [0, 2, 1, 3])
    whole = openvino.Model([ops.reshape(attended, [1, tokens, channels], False)], given)
    made[OPENVINO] = openvino_run(whole, [q, k, v], threads, "f32")
    if has_bf16():
        made[OPENVINO16] = openvino_run(whole, [q, k, v], threads, "bf16")
    return made


def ours(qkv: np.ndarray, background_tokens: int, threads: int) -> tuple[dict[str, Run], dict[str, float]]:
    """Return our operators, and the GFLOP that attention needs in each."""
    tokens = qkv.shape[1]
    patches, channels = tokens - 1, HEADS * WIDTH
    cell = math.ceil(patches / background_tokens)
    rng = np.random.default_rng(1)
    projections = {n: rng.normal(size=(HEADS, WIDTH, CHANNELS)).astype(np.float32) for n in ("pq", "pk")}
    shared = {"domain": DOMAIN, "num_heads": HEADS, "scale": SCALE}
    given = {"qkv": qkv, "sizes": np.ones((1, tokens), np.float32)}
    runs = {DENSE: runner([helper.make_node("DenseAttention", ["qkv", "sizes"], ["o"], **shared)], given, threads)}
    work = {DENSE: 4 * tokens * tokens * channels / 1e9}
    halves = Operators(threads, bfloat16=True) if has_bf16() else None
    if halves is not None and halves.precision != "bfloat16":
        raise SystemExit(f"the native library runs on {native.target()}, without bfloat16")
    output = np.empty((1, tokens, channels), np.float32)
    settings = {
        "num_heads": HEADS,
        "scale": SCALE,
        "num_prefix": 1,
        "query_pool": PROBE,
        "tile": TILE,
        "key_pool": cell,
        "value_power": 2.0,
        "prefix_keys": 1,
    }
    if halves is not None:
        runs[DENSE + IN_BF16] = lambda: run_by_name(halves, "DenseAttention", settings, [*given.values()], output)
        work[DENSE + IN_BF16] = work[DENSE]
    for keep in KEEPS:
        keys = math.ceil(round(keep * patches, 9))
        select = helper.make_node(
            "KeySelect",
            ["qkv", "sizes", "pq", "pk"],
            ["i"],
            num_prefix=1,
            query_pool=PROBE,
            tile=TILE,
            key_pool=cell,
            keys=keys,
            value_power=2.0,
            **shared,
        )
        attend = helper.make_node(
            "SparseAttention",
            ["qkv", "sizes", "i"],
            ["o"],
            num_prefix=1,
            tile=TILE,
            key_pool=cell,
            prefix_keys=1,
            **shared,
        )
        inputs = {**given, **projections}
        runs[f"select {keep:g}"] = runner([select], inputs, threads, TensorProto.INT32)
        lists = runs[f"select {keep:g}"]()[0]
        runs[f"attend {keep:g}"] = runner([attend], {**given, "i": lists}, threads)
        runs[f"both {keep:g}"] = runner([select, attend], inputs, threads)
        work[f"attend {keep:g}"] = 4 * (patches * (1 + keys + background_tokens) + tokens) * channels / 1e9
        if halves is not None:
            runs |= _in_bf16(halves, [*given.values()], lists, projections, settings | {"keys": keys}, f"{keep:g}")
            work[f"attend {keep:g}{IN_BF16}"] = work[f"attend {keep:g}"]
    return runs, work


def run_by_name(
    operators: Operators, name: str, settings: dict[str, float], inputs: list[np.ndarray], output: np.ndarray
) -> None:
    """Run an operator with the settings that apply to it."""
    operators.run(name, {a.name: settings[a.name] for a in OPERATORS[name].attributes}, inputs, output)


def _in_bf16(
    halves: Operators,
    given: list[np.ndarray],
    lists: np.ndarray,
    projections: dict[str, np.ndarray],
    settings: dict[str, float],
    keep: str,
) -> dict[str, Run]:
    """Return attention in bfloat16, alone and after selection in float32."""
    found, output = np.empty_like(lists), np.empty((1, given[0].shape[1], given[0].shape[2] // 3), np.float32)

    def attend() -> None:
        run_by_name(halves, "SparseAttention", settings, [*given, lists], output)

    def both() -> None:
        run_by_name(halves, "KeySelect", settings, [*given, *projections.values()], found)
        run_by_name(halves, "SparseAttention", settings, [*given, found], output)

    return {f"attend {keep}{IN_BF16}": attend, f"both {keep}{IN_BF16}": both}


def measure(
    tokens: int, background_tokens: int, threads: int, rounds: int, tell: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Measure samples and statistics for one number of tokens."""
    qkv = np.random.default_rng(0).normal(size=(1, tokens, 3 * HEADS * WIDTH)).astype(np.float32)
    runs, work = ours(qkv, background_tokens, threads)
    runs |= rivals(qkv, threads)
    runs["gemm"], work["gemm"] = gemm_peak(threads)
    burst = 8 if tokens < 2000 else 3 if tokens < 5000 else 1
    times = time_in_turn(runs, rounds, burst, lambda what: tell(f"{tokens} tokens, {what}"))
    medians = {name: float(np.median(x)) for name, x in times.items()}
    best = min((FUSED, OPENVINO), key=lambda name: medians[name])
    best16 = min((best, OPENVINO16), key=lambda name: medians.get(name, math.inf))
    peak = work["gemm"] / medians["gemm"]
    figures = {
        name: {
            "median_ms": medians[name],
            "times_faster_than_best_dense": ratio(times[best16 if name.endswith(IN_BF16) else best], times[name]),
            **(
                {"times_faster_than_fp32": ratio(times[name.removesuffix(IN_BF16)], times[name])}
                if name.endswith(IN_BF16) and name != OPENVINO16
                else {}
            ),
            **(
                {"gflops": 1e3 * work[name] / medians[name], "share_of_gemm": work[name] / medians[name] / peak}
                if name in work
                else {}
            ),
        }
        for name in runs
    }
    figures[DENSE]["times_faster_than_fused"] = ratio(times[FUSED], times[DENSE])
    found = {"background_tokens": background_tokens, "best_dense": best, "best_dense_any": best16, "operators": figures}
    return {n: x.tolist() for n, x in times.items()}, found


def show(statistics: dict[str, Any]) -> None:
    """Print one table per number of tokens."""
    for tokens, found in statistics.items():
        rows = []
        for name, figure in found["operators"].items():
            twin = figure.get("times_faster_than_fp32", {}).get("value", math.nan)
            work = [f"{figure['gflops']:.0f}", f"{figure['share_of_gemm']:.0%}"] if "gflops" in figure else ["", ""]
            ours = [f"{figure['median_ms']:.2f}", said(figure["times_faster_than_best_dense"])]
            rows.append([name, *ours, f"{twin:.2f}" if not math.isnan(twin) else "", *work])
        rival = f"times {found['best_dense']} (bf16: {found['best_dense_any']})"
        columns = ["", "ms", rival, "times fp32", "GFLOP/s", "of gemm"]
        print_table(f"{tokens} tokens, {found['background_tokens']} cells", columns, rows)


@click.command()
@click.option("--tokens", "sizes", multiple=True, default=SIZES, help="TOKENS:CELLS; may be repeated.")
@click.option("--threads", type=int, default=available_cores())
@click.option("--rounds", type=int, default=11, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for attention_cpu.json.")
def main(sizes: tuple[str, ...], threads: int, rounds: int, output: Path | None) -> None:
    samples, statistics = {}, {}
    with err_console.status("") as status:
        for size in sizes:
            tokens, cells = map(int, size.split(":"))
            found = measure(tokens, cells, threads, rounds, status.update)
            samples[str(tokens)], statistics[str(tokens)] = found
    show(statistics)
    if output:
        method = {"threads": threads, "rounds": rounds, "kernels": native.target(), "heads": HEADS, "width": WIDTH}
        result = Result("comparison", [Subject(path="operators", sha256="random inputs")], method, samples, statistics)
        write_summary(output / "attention_cpu.json", result)


if __name__ == "__main__":
    main()
