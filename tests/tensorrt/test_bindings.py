"""Tests of the fake, and of a bundle's kernels as plugins, with TensorRT's real Python bindings of several versions.

Each version runs this file in a separate process, with stub libraries that are never called.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from sparsifiner_edge.bundle.kernels import NAMESPACE, CompiledLaunch
from sparsifiner_edge.export.board import board_files
from sparsifiner_edge.profiles.boards.board import load_board
from sparsifiner_edge.runtime.cuda import CudaDevice
from sparsifiner_edge.runtime.tensorrt import plugin as kernel_plugin
from tests.everything import first
from tests.fakes.gpu import Gpu
from tests.fakes.tensorrt import VERSIONS, Behaviour, make_tensorrt
from tests.seal import bundle_of, table_of
from tests.sparse_graph import merging_graph, sparse_model

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).parents[2]
SYMBOLS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
"""Libraries that the bindings link: a stub with the exported names suffices to import and inspect the module."""


def bindings(version: str, folder: Path) -> dict[str, str]:
    """Return the environment to import a PyPI wheel: CUDA 12 up to TensorRT 10, CUDA 13 from 11 on."""
    major, python = version.partition(".")[0], f"{sys.version_info.major}.{sys.version_info.minor}"
    wheel = f"tensorrt-cu{12 if major == '10' else 13}-bindings=={version}"
    wanted = [wheel, "--no-deps", "--only-binary", ":all:", "--python-version", python]
    line = [sys.executable, "-m", "pip", "download", "-q", "-d", folder / "wheel", *wanted]
    if subprocess.run(line, capture_output=True, check=False, timeout=120).returncode:
        pytest.skip(f"{wheel} cannot be downloaded for this Python")
    with zipfile.ZipFile(next((folder / "wheel").iterdir())) as archive:
        archive.extractall(folder)
    (folder / "stub.c").write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in SYMBOLS))
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    for library in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
        name = f"lib{library}.so.{major}"
        line = [compiler, "-shared", "-fPIC", "-o", folder / name, folder / "stub.c", f"-Wl,-soname,{name}"]
        subprocess.run(line, check=True)
    return os.environ | {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": f"{folder}:{ROOT}"}


@pytest.mark.parametrize("graph", first([sparse_model, merging_graph]))
@pytest.mark.parametrize("version", first(["10.9", "10.3", "11.4"], 2))
def test_the_real_module_has_every_name_and_takes_the_plugins(tmp_path, version, graph):
    """TensorRT's own decorators check names, types and return values; for 10.3 see test_plugin_v3.py."""
    folder, model = tmp_path / "bundle", graph(dtype=np.float16)
    folder.mkdir()
    onnx.save(model, folder / "model.onnx")
    board_files(model, "tiny", load_board("jetson-orin-nano-8gb"), folder)
    environment = bindings(VERSIONS[version], tmp_path)
    line = [sys.executable, "-m", "tests.tensorrt.test_bindings", str(folder)]
    done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["lacking"] == []
    if version == "10.3":
        return
    table = table_of(folder, 87)
    assert table is not None
    assert len(result["found"]) == result["registered"] == len(table.launches) in (3, 5)
    kinds = {"float32": "FLOAT", "float16": "HALF", "int32": "INT32"}
    for name, found in result["found"].items():
        launch = table.launches[name]
        outputs = launch.outputs.values()
        assert found == {
            "inputs": list(launch.inputs),
            "types": [kinds[x.dtype] for x in outputs],
            "ranks": [1 + len(x.shape) for x in outputs],
            "symbol": launch.symbol,
            "kind": "KernelLaunchParams",
            "extra": 0,
            "in ptx": True,
        }


ORIN = CudaDevice("Orin", "8.7", True, "12.6")


def lacking(trt: Any) -> list[str]:
    """Return the names of the fake that the real module lacks."""
    fake = vars(make_tensorrt(Gpu(), Behaviour()))
    members = [(name, member) for name, made in fake.items() for member in vars(made) if not member.startswith("_")]
    found = [f"{name}.{member}" for name, member in members if not hasattr(getattr(trt, name, None), member)]
    return found + [name for name in fake if not hasattr(trt, name)]


def called(trt: Any, identifier: str, launch: CompiledLaunch) -> dict[str, Any]:
    """Return what TensorRT's registry holds of a plugin, and the results of its functions."""
    plugin = sys.modules["tensorrt.plugin"]
    definition = importlib.import_module("tensorrt_bindings.plugin._lib").QDP_REGISTRY[identifier]
    inputs = [plugin.from_shape_expr((1, *x.shape), trt.DataType.FLOAT) for x in launch.inputs.values()]
    outputs = definition.register_func(*inputs)
    symbol, ptx, parameters, extra = definition.aot_impl_func(*inputs, outputs, 0)
    return {
        "inputs": definition.input_tensor_names,
        "types": [o.dtype.name for o in outputs],
        "ranks": [o.ndim for o in outputs],
        "symbol": symbol,
        "kind": type(parameters).__name__,
        "extra": len(extra),
        "in ptx": f".entry {symbol}(" in ptx,
    }


def result(folder: Path) -> dict[str, Any]:
    trt, creators = importlib.import_module("tensorrt_bindings"), list[Any]()
    # Under the names of a complete installation; the stub library has no registry.
    sys.modules["tensorrt"], trt.__name__ = trt, "tensorrt"
    registry = SimpleNamespace(
        register_creator=lambda creator, namespace: creators.append(creator), get_creator=lambda *_: creators[-1]
    )
    trt.get_plugin_registry = lambda: registry
    assert kernel_plugin.why_not(trt, bundle_of(folder), ORIN) is None
    if kernel_plugin.is_in_python(trt):
        return {"lacking": lacking(trt)}
    sys.modules["tensorrt.plugin"] = importlib.import_module("tensorrt_bindings.plugin")
    table, model = table_of(folder, 87), onnx.load(folder / "model.onnx")
    assert table is not None
    for _ in range(2):  # A name is registered once.
        kernel_plugin.with_plugins(trt, model, bundle_of(folder), ORIN)
    found = {name: called(trt, f"{NAMESPACE}::{name}", launch) for name, launch in table.launches.items()}
    return {"lacking": lacking(trt), "found": found, "registered": len(creators)}


if __name__ == "__main__":
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # The bindings' logger prints to standard output.
    json.dump(result(Path(sys.argv[1])), output)
    output.close()
