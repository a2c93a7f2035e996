"""Tests of `doctor`: what is installed and works, and the remedy for everything else."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from sparsifiner_edge.errors import pip_install
from sparsifiner_edge.ops import native
from sparsifiner_edge.runtime import BACKENDS, cuda
from sparsifiner_edge.runtime.tensorrt import full
from tests.fakes.gpu import Gpu, install_cuda, install_driver
from tests.fakes.tensorrt import install_tensorrt
from tests.plain import examine

Patch = pytest.MonkeyPatch


def command(*arguments: str, before: str = "") -> str:
    """Return what the command prints."""
    code = f"import sys\n{before}\nfrom sparsifiner_edge.cli.main import main\nmain(sys.argv[1:])"
    line = [sys.executable, "-c", code, "doctor", *arguments]
    run = subprocess.run(line, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    return run.stdout


def distribution(folder: Path, name: str, version: str = "1.2.3", requires: tuple[str, ...] = ()) -> None:
    """Write a package's metadata as pip does, and nothing else of the package."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {required}" for required in requires]
    (info / "METADATA").write_text("\n".join(lines) + "\n")


def backend(name: str) -> tuple[bool, str]:
    """Return a backend's availability and the reason."""
    found = examine()["backends"][name]
    return found["available"], found["reason"]


def test_json_holds_every_backend() -> None:
    lesser = "AVX2" if os.uname().machine == "x86_64" else "NEON"  # as a processor without bfloat16
    found = json.loads(command("--json", before=f"import os; os.environ['SPARSIFINER_TARGET'] = {lesser!r}"))
    assert found["native_library"].endswith(".so")
    assert "loads, and uses" in found["native_library_reason"]
    assert {name.partition(",")[0] for name in found["backends"]} == set(BACKENDS)
    # OpenVINO rejects most fp16 files on any processor, so only a file can show that it works.
    assert not any("fp16" in name for name in found["backends"])
    ready, bf16 = found["backends"]["onnxruntime"], found["backends"]["onnxruntime, bf16"]
    assert (ready["available"], ready["version"], bf16["available"]) == (True, onnxruntime.__version__, False)
    assert "has no bfloat16" in bf16["reason"]
    assert all(entry["reason"] for entry in (*found["backends"].values(), found["triton"]))


def test_a_build_for_the_gpu_needs_a_gpu(monkeypatch: Patch) -> None:
    offered = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: offered)
    for driver, said in ((0, "is built in, but No NVIDIA driver"), (12060, "not the CUDA kernels")):
        install_cuda(monkeypatch, Gpu(driver=driver))
        available, reason = backend("onnxruntime, cuda")
        assert (available, said in reason) == (driver > 0, True)


@pytest.mark.parametrize(
    ("number", "jetson", "version", "install"),
    [
        (12060, "36.4.3", "12.6", f"{pip_install('jetson')}; TensorRT comes with JetPack"),
        (11040, "35.4.1", "11.4", "Jetson Linux 35.4.1 is older than JetPack 6"),
        (12040, None, "12.4", pip_install("gpu,tensorrt")),
        (13000, None, "13.0", f"{pip_install('gpu,tensorrt')}; or gpu-cu13, tensorrt-cu13"),
        (11080, None, "11.8", "update the driver first"),
    ],
)
def test_the_driver_says_which_extra_fits(monkeypatch, number, jetson, version, install):
    install_driver(monkeypatch, number)
    monkeypatch.setattr(cuda, "jetson_release", lambda: jetson)
    found = examine()["cuda_support"]
    assert (found["driver"], found["jetson"]) == (version, jetson)
    assert found["install"].startswith(install)


def test_tensorrt_on_a_jetson_is_jetpacks(monkeypatch: Patch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    for release, said in ((None, pip_install("tensorrt")), ("36.4.3", "--system-site-packages")):
        monkeypatch.setattr(full, "jetson_release", lambda release=release: release)
        assert said in backend("tensorrt")[1]


def test_tensorrt_needs_a_device_to_be_available(monkeypatch: Patch) -> None:
    gpu = Gpu("NVIDIA L4", (8, 9), 24 << 30, False)
    install_cuda(monkeypatch, gpu)
    install_tensorrt(monkeypatch, gpu, "10.9")
    found = examine()
    assert (found["cuda"]["name"], found["cuda"]["compute_capability"]) == ("NVIDIA L4", "8.9")
    said = "imports, builds engines, and runs them on NVIDIA L4"
    assert found["backends"]["tensorrt"] == {"available": True, "reason": said, "version": "10.9.0.34"}
    gpu.count = 0
    available, reason = backend("tensorrt")
    assert (available, "CUDA finds no device" in reason) == (False, True)
    if importlib.util.find_spec("tensorrt_rtx") is not None:  # It builds nevertheless.
        available, reason = backend("tensorrt-rtx")
        assert (available, "ahead of time for RTX cards, and cannot run them here" in reason) == (True, True)
    install_tensorrt(monkeypatch, gpu, "10.3").__version__ = "8.5.2"
    assert "older than 10.3" in backend("tensorrt")[1]


def test_a_tensorrt_for_a_newer_cuda_than_the_driver_is_refused(tmp_path: Path, monkeypatch: Patch) -> None:
    """TensorRT would create its objects without an error, and end the process on use."""
    gpu = Gpu(driver=12060)
    install_cuda(monkeypatch, gpu)
    install_tensorrt(monkeypatch, gpu, "10.9")
    distribution(tmp_path, "tensorrt-cu13")
    monkeypatch.syspath_prepend(str(tmp_path))
    available, reason = backend("tensorrt")
    assert not available
    assert "tensorrt-cu13 needs a driver for CUDA 13, and this one takes CUDA 12.6 at most." in reason
    gpu.driver = 13000
    assert backend("tensorrt")[0]


def test_what_does_not_import_is_said_with_its_version(tmp_path: Path, monkeypatch: Patch) -> None:
    distribution(tmp_path, "tensorrt-cu12", "10.9")
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    entry: Any = examine()["backends"]["tensorrt"]
    assert (entry["available"], entry["version"]) == (False, "10.9")
    assert "tensorrt cannot be imported: libnvinfer.so.10" in entry["reason"]


def test_a_bare_environment_is_enough(tmp_path: Path) -> None:
    heavy = (
        "onnxruntime",
        "torch",
        "timm",
        "PIL",
        "matplotlib",
        "safetensors",
        "tensorrt",
        "tensorrt_rtx",
        "triton",
        "cuda",
        "pycuda",
        "openvino",
    )
    before = f"sys.modules.update(dict.fromkeys({heavy}))"
    found = json.loads(command("--json", before=before))
    assert not any(entry["available"] for entry in (*found["backends"].values(), found["triton"]))
    assert pip_install("cpu") in found["backends"]["onnxruntime"]["reason"]
    assert pip_install("triton") in found["triton"]["reason"]
    distribution(tmp_path, "sparsifiner-edge", "0.0.1", ('no-such-package; extra == "gpu"',))
    said = command(before=f"{before}; sys.path.insert(0, {str(tmp_path)!r})")
    assert all(text in said for text in ("native library", "python", "CUDA device", "CUDA driver", "telemetry"))
    assert "[gpu]" in said  # With brackets that are not markup.


def test_a_missing_native_library_says_what_to_install(monkeypatch: Patch) -> None:
    monkeypatch.setattr(native, "_FILE", "no-such.so")
    found = examine()
    assert found["native_library"] is None
    assert "libhwy-dev libonnxruntime-dev" in found["native_library_reason"]


def test_packages_that_do_not_go_together_are_a_warning(tmp_path: Path, monkeypatch: Patch) -> None:
    assert examine()["warnings"] == []
    distribution(tmp_path, "onnxruntime-gpu")
    distribution(tmp_path, "cuda-python", "13.4.4")
    monkeypatch.syspath_prepend(str(tmp_path))
    install_driver(monkeypatch, 13000)
    (both,) = examine()["warnings"]
    assert "onnxruntime and onnxruntime-gpu are both installed" in both
    install_driver(monkeypatch, 12060)
    assert 'pip install "cuda-python>=12.6,<13"' in examine()["warnings"][1]


def test_extras_come_from_the_metadata(tmp_path: Path, monkeypatch: Patch) -> None:
    requires = (
        "numpy>=1.24",
        'numpy>=1.24; extra == "cpu"',
        'no-such-package>=1; extra == "cpu"',
        'sparsifiner-edge[cpu]; extra == "demo"',
        "rich>=13; python_version >= '3.10' and extra == 'demo'",
    )
    distribution(tmp_path, "sparsifiner-edge", "0.0.1", requires)
    monkeypatch.syspath_prepend(str(tmp_path))
    extras = examine()["extras"]
    numpy = importlib.metadata.version("numpy")
    assert extras["cpu"] == {"numpy": numpy, "no-such-package": {"unavailable": "not installed"}}
    assert list(extras["demo"]) == ["rich"]
