"""The fake, and kernels of a bundle as plugins, against TensorRT's real Python bindings of several versions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest

from sparsifiner_edge.export.board import board_files
from sparsifiner_edge.profiles.boards.board import load_board
from tests.everything import first
from tests.fakes.tensorrt import VERSIONS
from tests.sparse_graph import merging_graph, sparse_model
from tests.tables import table_of

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).parents[2]
SYMBOLS = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getBuilderPluginRegistry",
    "getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins",
)  # fmt: skip
"""What the bindings link: a stub that exports them is enough to import the module and to look at it."""


def bindings(version: str, folder: Path) -> dict[str, str]:
    """The environment in which a wheel of PyPI imports: CUDA 12's up to TensorRT 10, CUDA 13's from 11 on."""
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
    """TensorRT's own decorators check names, types and return values; 10.3 has none ahead of time."""
    folder, model = tmp_path / "bundle", graph(dtype=np.float16)
    folder.mkdir()
    onnx.save(model, folder / "model.onnx")
    board_files(model, "tiny", load_board("jetson-orin-nano-8gb"), folder)
    environment = bindings(VERSIONS[version], tmp_path)
    line = [sys.executable, "-m", "tests.tensorrt.real_bindings", str(folder)]
    done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["lacking"] == []
    if version == "10.3":
        assert result["reason"] == "TensorRT 10.3.0 has no ahead-of-time plugins (10.9 and later have)"
        return
    table = table_of(folder, 87)
    assert table is not None
    assert len(result["found"]) == result["registered"] == len(table.launches) in (3, 5)
    kinds = {"float32": "FLOAT", "float16": "HALF", "int32": "INT32"}
    for name, found in result["found"].items():
        launch = table.launches[name]
        outputs = launch.outputs.values()
        assert found == {
            "inputs": list(launch.inputs), "types": [kinds[x.dtype] for x in outputs],
            "ranks": [1 + len(x.shape) for x in outputs], "symbol": launch.symbol, "kind": "KernelLaunchParams",
            "extra": 0, "in ptx": True,
        }  # fmt: skip
