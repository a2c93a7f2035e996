"""Tests of Python plugins with the real TensorRT bindings and compiled stand-ins for TensorRT and the driver.

`TENSORRT_INCLUDE` lists, separated by colons, the folders of TensorRT's headers (NVIDIA/TensorRT, release/10.3,
include/) and of the CUDA headers that they need (cuda_runtime_api.h, crt/). Each version runs this file in a separate
process. To run it by hand for a bundle, with the libraries on the path: `TRITON_INTERPRET=1 python -m
tests.tensorrt.test_plugin_v3 BUNDLE IMAGE`.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from msgspec.structs import replace
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from PIL import Image

from sparsifiner_edge.arrays import bytes_at
from sparsifiner_edge.bundle.kernels import NAMESPACE, CompiledLaunch, LaunchTensor, kernel_model
from sparsifiner_edge.errors import BackendError
from sparsifiner_edge.export import board as boards
from sparsifiner_edge.metrics import cosine
from sparsifiner_edge.profiles.boards.board import load_board
from sparsifiner_edge.runtime.tensorrt import plugin_v3
from sparsifiner_edge.runtime.tensorrt.errors import PLUGIN_FAILURES
from tests.everything import first
from tests.seal import bundle_of, table_of
from tests.sparse_graph import merging_graph, sparse_model
from tests.tensorrt.test_bindings import bindings
from tests.test_board import GatherElements

pytest.importorskip("triton", reason="triton is not installed")

HERE = Path(__file__).parent
INCLUDE = [Path(folder) for folder in os.environ.get("TENSORRT_INCLUDE", "").split(os.pathsep) if folder]
VERSIONS = ["10.3.0", "10.7.0", "10.9.0.34", "10.13.0.35"]
LAUNCHED = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint * 5), ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)
)
KINDS = {"float32": 0, "float16": 1, "int32": 3}
"""Numbers of `nvinfer1::DataType`."""


def driver(folder: Path) -> Path:
    """The compiled stand-in for the driver's library."""
    path = folder / "libcuda.so.1"
    line = ["cc", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", HERE / "stand_in" / "cuda.c", "-o", path]
    subprocess.run(line, check=True)
    return path


@pytest.fixture
def cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    library = ctypes.CDLL(str(driver(tmp_path)))
    monkeypatch.setattr(plugin_v3, "driver", lambda: library)
    return library


LAUNCH = CompiledLaunch(
    symbol="twice",
    grid=(5, 3),
    threads=64,
    shared_bytes=64 << 10,
    inputs={"x": LaunchTensor("float16", (7,))},
    outputs={"y": LaunchTensor("float32", (7,))},
)
PTX = b".visible .entry twice(\n"


def test_code_is_loaded_and_launched_by_the_driver(cuda: Any) -> None:
    seen = list[Any]()

    @LAUNCHED
    def launched(symbol: bytes, sizes: Any, stream: int, parameters: Any) -> None:
        addresses = [ctypes.c_void_p.from_address(parameters[i]).value for i in range(2)]
        seen.append((symbol, list(sizes.contents), stream, addresses))

    cuda.stand_in_driver(launched, -1)
    plugin_v3._launch(LAUNCH, plugin_v3._load(cuda, LAUNCH, PTX), 2, [0x1_0000_0000, 0x2_0000_0000], 0x42)
    assert seen == [(b"twice", [5, 3, 2, 64, 64 << 10], 0x42, [0x1_0000_0000, 0x2_0000_0000])]
    assert cuda.stand_in_calls() == 4
    said = []
    for failing in range(4):
        cuda.stand_in_driver(launched, failing)
        with pytest.raises(BackendError) as error:
            plugin_v3._launch(LAUNCH, plugin_v3._load(cuda, LAUNCH, PTX), 2, [1, 2], 0)
        said.append(error.value.what)
    assert said == [
        "CUDA failed to load twice (cuModuleLoadDataEx): CUDA_ERROR_INVALID_PTX ptxas error : line 1.",
        "CUDA failed to find twice (cuModuleGetFunction): CUDA_ERROR_INVALID_VALUE.",
        "CUDA failed to give twice 64 KiB of shared memory (cuFuncSetAttribute): CUDA_ERROR_INVALID_VALUE.",
        "CUDA failed to launch twice (cuLaunchKernel): CUDA_ERROR_INVALID_VALUE.",
    ]
    cuda.stand_in_driver(launched, -1)
    plugin_v3._load(cuda, replace(LAUNCH, shared_bytes=48 << 10), PTX)
    assert cuda.stand_in_calls() == 2, "the driver is asked for what is above 48 KiB alone"
    with pytest.raises(BackendError, match="failed to find other"):
        plugin_v3._load(cuda, replace(LAUNCH, symbol="other"), PTX)


@pytest.mark.skipif(not INCLUDE, reason="TENSORRT_INCLUDE names no headers of TensorRT and CUDA")
@pytest.mark.parametrize("graph", first([sparse_model, merging_graph]))
@pytest.mark.parametrize("version", first(VERSIONS))
def test_a_plugins_life_and_its_numbers_on_the_real_bindings(tmp_path: Path, version: str, graph: Any) -> None:
    """A plugin is created, queried, serialised, recreated, attached and run; each driver call fails once.

    Triton's interpreter runs the launches in the memory that the plugin passes.
    """
    folder, model = tmp_path / "bundle", graph(dtype=np.float16)
    folder.mkdir()
    onnx.save(model, folder / "model.onnx")
    boards.board_files(model, "tiny", load_board("jetson-orin-nano-8gb"), folder)
    environment = bindings(version, tmp_path) | {"TRITON_INTERPRET": "1"}
    flags = ["-std=c++17", "-Wall", "-Wno-deprecated-declarations", "-shared", "-fPIC", *(f"-I{x}" for x in INCLUDE)]
    library = tmp_path / "libnvinfer.so.10"
    subprocess.run(["c++", *flags, HERE / "stand_in" / "nvinfer.cc", "-o", library], check=True)
    for name in ("nvinfer_plugin", "nvonnxparser"):
        shutil.copy(library, tmp_path / f"lib{name}.so.10")
    driver(tmp_path)
    line = [sys.executable, "-m", "tests.tensorrt.test_plugin_v3", str(folder)]
    done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=HERE.parents[1], env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["version"] == version
    assert result["difference"] < 2e-2
    assert result["cosine"] > 0.9999
    assert [step for step, _ in result["failures"]] == ["attach", "attach", "run"]
    for (_, why), action in zip(result["failures"], ("load", "find", "launch"), strict=True):
        assert why.startswith(f"CUDA failed to {action} ")


class _Tensor(ctypes.Structure):
    """`Tensor` of nvinfer.cc."""

    _fields_ = (
        ("type", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("sizes", ctypes.c_int64 * 8),
        ("data", ctypes.c_void_p),
    )


def live(name: str, launch: CompiledLaunch, inputs: list[np.ndarray]) -> tuple[str | None, list[np.ndarray]]:
    """Run a plugin's whole life; return the step that failed, and the outputs."""
    library = ctypes.CDLL("libnvinfer.so.10")
    library.stand_in_live.restype = ctypes.c_char_p
    batch = len(inputs[0])
    outputs = [np.zeros((batch, *x.shape), x.dtype) for x in launch.outputs.values()]
    tensors = (_Tensor * (len(inputs) + len(outputs)))()
    for tensor, array in zip(tensors, (*inputs, *outputs), strict=True):
        tensor.data = array.ctypes.data
    for tensor, array in zip(tensors, inputs, strict=False):  # The plugin sets those of outputs.
        tensor.type, tensor.rank = KINDS[array.dtype.name], array.ndim
        tensor.sizes[: array.ndim] = array.shape
    failed = library.stand_in_live(NAMESPACE.encode(), name.encode(), tensors, len(inputs), len(outputs), 1)
    if failed is None:
        for tensor, array in zip(tensors[len(inputs) :], outputs, strict=True):
            assert (tensor.type, tensor.sizes[: tensor.rank]) == (KINDS[array.dtype.name], list(array.shape))
    return failed and failed.decode(), outputs


def steps(folder: Path, model: onnx.ModelProto) -> Iterator[tuple[str, CompiledLaunch, Any]]:
    """Yield each launch of a bundle's table: name, entry and plan."""
    table, types = table_of(folder, 87), boards._tensor_types(model)
    assert table is not None
    nodes = [node for node in model.graph.node if node.name in table.nodes]
    for together, schedule, _ in boards.launched_together(model, nodes, types, 87):
        assert not isinstance(schedule, str)
        entries = [entry for node in together for entry in table.nodes[node.name]]
        for entry, launch in zip(entries, schedule.launches, strict=True):
            yield entry.launch, table.launches[entry.launch], launch


def interpreted(entry: CompiledLaunch, launch: Any, shapes: list[tuple[int, ...]]) -> Callable[..., None]:
    """Return a function that runs a launch in the memory of its parameters; shapes: of its inputs, once known."""
    import torch

    from sparsifiner_edge.ops.triton.compile import kernel

    def launched(symbol: bytes, sizes: Any, stream: int, parameters: Any) -> None:
        x, y, batch, _, _ = sizes.contents
        assert (symbol.decode(), stream) == (entry.symbol, 0x42)
        tensors = {}
        every = [*shapes, *((batch, *declared.shape) for declared in entry.outputs.values())]
        for place, (name, declared) in enumerate((entry.inputs | entry.outputs).items()):
            address = ctypes.c_void_p.from_address(parameters[place]).value
            size = int(np.prod(every[place])) * np.dtype(declared.dtype).itemsize
            flat = bytes_at(address or 0, size).view(declared.dtype)
            tensors[name] = torch.from_numpy(flat.reshape(every[place]))
        names = {a: None if b is None else tensors[b] for a, b in launch.arguments.items()}
        kernel(launch.kernel)[(x, y, batch)](**names, **launch.constants, num_warps=launch.warps)

    return launched


def main(folder: Path, picture: Path | None = None) -> dict[str, Any]:
    """Register a bundle's plugins, fail at each driver call, and compare the launches with the bundle's model.

    The input is a picture or noise.
    """
    trt = sys.modules["tensorrt"] = importlib.import_module("tensorrt_bindings")
    for _ in range(2):  # A name is registered once.
        plugin_v3.register(trt, bundle_of(folder), 87)
    cuda, model, failures, operators = ctypes.CDLL("libcuda.so.1"), onnx.load(folder / "model.onnx"), [], {}
    held = []
    for name, entry, launch in steps(folder, model):
        shapes = list[tuple[int, ...]]()
        run = LAUNCHED(interpreted(entry, launch, shapes))
        held.append(run)

        def _run(
            _self: Any,
            *inputs: Any,
            name: str = name,
            entry: Any = entry,
            run: Any = run,
            shapes: Any = shapes,
            **_: Any,
        ) -> Any:
            given = [np.ascontiguousarray(x, y.dtype) for x, y in zip(inputs, entry.inputs.values(), strict=True)]
            shapes[:] = [x.shape for x in given]
            while len(failures) < 3:
                cuda.stand_in_driver(run, len(failures))
                failures.append((live(name, entry, given)[0], " ".join(PLUGIN_FAILURES)))
                PLUGIN_FAILURES.clear()
            cuda.stand_in_driver(run, -1)
            failed, outputs = live(name, entry, given)
            assert failed is None, (name, failed)
            return tuple(outputs)

        operators[name] = type(name, (OpRun,), {"op_domain": NAMESPACE, "_run": _run})
    table = table_of(folder, 87)
    sizes = [dim.dim_value or 2 for dim in model.graph.input[0].type.tensor_type.shape.dim]
    image = np.random.default_rng(0).integers(0, 256, sizes, dtype=np.uint8)
    if picture is not None:
        image[:] = Image.open(picture).convert("RGB").resize((sizes[2], sizes[1]))
    wanted = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"image": image})
    variant = ReferenceEvaluator(kernel_model(model, table), new_ops=[*operators.values(), GatherElements])
    got = variant.run(None, {"image": image})
    pairs = [(a.astype(np.float32), b.astype(np.float32)) for a, b in zip(got, wanted, strict=True)]
    difference = max(float(np.abs(a - b).max() / np.ptp(b)) for a, b in pairs)
    least = min(float(cosine(a, b).mean()) for a, b in pairs)  # For tokens, the mean over all of them.
    return {"version": trt.__version__, "failures": failures, "difference": difference, "cosine": least}


if __name__ == "__main__":
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # The bindings' logger prints to standard output.
    json.dump(main(*map(Path, sys.argv[1:])), output)
    output.close()
