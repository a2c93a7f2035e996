"""Kernels of a bundle as plugins, handed to TensorRT's real plugin module."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sparsifiner_edge.export.board import board_files
from sparsifiner_edge.profiles.boards.board import load_board
from tests.fakes import record_tensorrt
from tests.merging_models import merging_graph
from tests.sparse_graph import sparse_model
from tests.tables import table_of

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=[sparse_model, merging_graph], ids=["sparse", "merging"])
def folder(request, tmp_path_factory):
    made = tmp_path_factory.mktemp("plugin")
    board_files(request.param(dtype=np.float16), {"name": "tiny"}, load_board("jetson-orin-nano-8gb"), made)
    return made


@pytest.mark.skipif(shutil.which("gcc") is None and shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.parametrize("version", ["10.7", "10.9", "11.4"])
def test_the_real_plugin_module_takes_them(folder, tmp_path, version):
    """TensorRT's own decorators check names, types and return values; 10.7 has none ahead of time."""
    try:
        unpacked = record_tensorrt.download(record_tensorrt.VERSIONS[version], tmp_path)
    except OSError as error:
        pytest.skip(f"the wheel cannot be downloaded for this Python: {error}")
    stubs = record_tensorrt.stub_libraries(version.partition(".")[0], tmp_path / "stubs")
    done = subprocess.run(
        [sys.executable, "-m", "tests.tensorrt.register_plugins", str(folder)],
        capture_output=True, text=True, check=False, cwd=ROOT,
        env=os.environ | {"LD_LIBRARY_PATH": str(stubs), "PYTHONPATH": f"{unpacked}:{ROOT}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    if version == "10.7":
        assert result == {"reason": "TensorRT 10.7.0 has no ahead-of-time plugins (10.9 and later have)"}
        return
    table = table_of(folder, 87)
    assert result["again"]
    assert len(result["found"]) == result["registered"] == len(table.launches) in (3, 5)
    kinds = {"float32": "FLOAT", "float16": "HALF", "int32": "INT32"}
    for identifier, found in result["found"].items():
        launch = table.launches[identifier.partition("::")[2]]
        assert found["inputs"] == list(launch.inputs)
        assert found["outputs"] == len(launch.outputs)
        assert found["types"] == [kinds[launch.tensors[name].dtype] for name in launch.outputs]
        assert found["ranks"] == [1 + len(launch.tensors[name].shape) for name in launch.outputs]
        assert (found["symbol"], found["kind"], found["extra"]) == (launch.symbol, "KernelLaunchParams", 0)
        assert found["in ptx"]
