"""Measures the overhead of our operators in OpenVINO's graph over direct calls of the C interface.

    python benchmarks/openvino_operators.py BUNDLE ... -o FOLDER

OpenVINO runs each bundle's file with its profiler enabled, with the extension in C++ and with operators in Python, in
turn. The times of our nodes, each the median over all inferences, are summed. They are compared with the sum of the
same calls through the C interface, on arrays of the same shapes and with threads of its own, each the median. In these
calls the input was written just before, as in a file, and other data has passed through the caches.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import onnx
import openvino
from openvino.frontend import onnx as frontend
from summary import write_summary

from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.machine import available_cores
from sparsifiner_edge.ops import native
from sparsifiner_edge.ops.native import interface
from sparsifiner_edge.ops.native.interface import Operators
from sparsifiner_edge.ops.schema import DOMAIN, OPERATORS
from sparsifiner_edge.records import Unavailable
from sparsifiner_edge.results import Result, Subject
from sparsifiner_edge.runtime.openvino import bind, converters, without_bodies

ROUNDS, RUNS = 8, 5
LEFT_OVER = 1 << 20
"""Values written between calls, about as many as a layer has weights, so that the caches are not warm."""
HINTS = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32", "PERF_COUNT": True}
Request = Any


@contextlib.contextmanager
def compiled(model: onnx.ModelProto, ours: list[str], extension: Path | None) -> Iterator[Request]:
    """Return an inference request of the file."""
    with contextlib.closing(Operators(available_cores())) as operators:
        core, bare = openvino.Core(), without_bodies(onnx.ModelProto.FromString(model.SerializeToString()), ours)
        if extension is not None:
            core.add_extension(str(extension))
            bind(bare, ours, operators.precision)
        else:
            for each in converters(openvino, frontend, ours, operators):
                core.add_extension(each)
        settings = HINTS | {"INFERENCE_NUM_THREADS": available_cores()}
        made = core.compile_model(core.read_model(bare.SerializeToString(), b""), "CPU", settings)
        yield made.create_infer_request()


def node_ms(request: Request) -> dict[str, float]:
    """Return milliseconds of our nodes in the last inference, which OpenVINO reports as references."""
    entries = [entry for entry in request.get_profiling_info() if entry.node_type == "Reference"]
    return {entry.node_name: entry.real_time.total_seconds() * 1e3 for entry in entries}


def alone_ms(model: onnx.ModelProto, ours: list[str]) -> list[float]:
    """Return milliseconds of each operator of the file through the C interface, on random arrays of its shapes."""
    inferred = onnx.shape_inference.infer_shapes(model)
    shapes = {
        v.name: [d.dim_value or 1 for d in v.type.tensor_type.shape.dim]
        for v in (*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output)
    }
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    random, times = np.random.default_rng(0), []
    with contextlib.closing(Operators(available_cores())) as operators:
        for node in (node for node in model.graph.node if node.domain == DOMAIN and node.op_type in ours):
            schema = OPERATORS[node.op_type]
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            given = [
                example(x.name, weights.get(name, shapes.get(name)), random)
                for x, name in zip(schema.inputs, node.input, strict=True)
            ]
            output = np.zeros(schema.output_shape(attributes, [x.shape for x in given]), schema_type(node.op_type))
            kinds = (*schema.inputs, schema.output)
            tensors = [
                interface._tensor(node.op_type, x, kind) for x, kind in zip((*given, output), kinds, strict=True)
            ]
            arguments = interface._arguments(node.op_type, attributes, given, tensors)
            call = interface._Call(interface._VERSION, 0, operators._loop, operators._pool)
            function = getattr(operators._library, interface._FUNCTIONS[node.op_type][0])
            spent, others = [], [given[0].copy(), np.zeros(LEFT_OVER, np.float32)]
            for _ in range(ROUNDS * RUNS):
                others[1] += 1  # In a file weights of layers pass through the caches in between,
                np.copyto(given[0], others[0])  # and another operator has just written what is read.
                start = time.perf_counter()
                assert function(ctypes.byref(call), *arguments) == 0, call.message
                spent.append(1e3 * (time.perf_counter() - start))
            times.append(median(spent))
    return times


def schema_type(op: str) -> Any:
    return np.int32 if OPERATORS[op].output.dtypes == ("int32",) else np.float32


def example(name: str, known: Any, random: np.random.Generator) -> Any:
    """Return an input of an operator: the file's own weights, or random values of the file's shape."""
    if isinstance(known, np.ndarray):
        return np.ascontiguousarray(known)
    if name in ("sizes", "counts"):
        return np.ones(known, np.float32)
    if name == "indices":
        return np.broadcast_to(np.arange(known[-1], dtype=np.int32), known).copy()
    if name == "pairs":
        return np.repeat(np.arange(known[1], dtype=np.int32)[None, :, None], 2, 2)
    return random.normal(size=known).astype(np.float32)


def measure(folder: Path) -> dict[str, float]:
    """Return milliseconds of a bundle's operators in OpenVINO, by kind of extension, and alone."""
    model = open_bundle(folder).model()
    ours = sorted({node.op_type for node in model.graph.node if node.domain == DOMAIN} & set(interface._FUNCTIONS))
    extension = native.openvino_extension()
    assert extension is not None, "Install this package again: OpenVINO was not there."
    shape = [axis.dim_value or 1 for axis in model.graph.input[0].type.tensor_type.shape.dim]
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    with contextlib.ExitStack() as stack:
        requests = {
            name: stack.enter_context(compiled(model, ours, each))
            for name, each in (("extension", extension), ("from_python", None))
        }
        times: dict[str, list[dict[str, float]]] = {name: [] for name in requests}
        for _ in range(ROUNDS):
            for name, request in requests.items():
                for _ in range(RUNS):
                    request.infer({"image": image})
                    times[name].append(node_ms(request))
    sums = {name: sum(median(run[node] for run in runs) for node in runs[0]) for name, runs in times.items()}
    alone, files = sum(alone_ms(model, ours)), len(times["extension"][0])
    return {"nodes": files, "alone_ms": alone} | {f"{name}_ms": ms for name, ms in sums.items()}


@click.command()
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder.")
def main(bundles: tuple[Path, ...], output: Path) -> None:
    """Measure the overhead of our operators in OpenVINO's graph."""
    rows = {folder.name: measure(folder) for folder in bundles}
    for name, row in rows.items():
        click.echo(f"{name}: {row}")
    subject = Subject(path=Unavailable("computed here"), name="operators", sha256=Unavailable("computed here"))
    output.mkdir(parents=True, exist_ok=True)
    write_summary(
        output / "openvino_operators.json",
        Result("comparison", [subject], {"script": __file__.split("/")[-1]}, {}, rows),
    )


if __name__ == "__main__":
    main()
