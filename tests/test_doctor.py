"""`doctor`: what is installed and works here, and what to do about the rest."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from sparsifiner_edge.errors import BackendError
from sparsifiner_edge.ops import native
from sparsifiner_edge.runtime import BACKENDS
from sparsifiner_edge.runtime.cuda import probe, support
from sparsifiner_edge.runtime.tensorrt import full
from tests.fakes.gpu import Gpu, install_cuda, install_driver
from tests.fakes.tensorrt import install_tensorrt
from tests.plain import examine

Patch = pytest.MonkeyPatch


def command(*arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    code = f"import sys\n{before}\nfrom sparsifiner_edge.cli.main import main\nmain(sys.argv[1:])"
    line = [sys.executable, "-c", code, "doctor", *arguments]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def distribution(folder: Path, name: str, version: str = "1.2.3", requires: tuple[str, ...] = ()) -> None:
    """A package's metadata as pip leaves it, and nothing else of it."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {r}" for r in requires),
    ]
    (info / "METADATA").write_text("\n".join(lines) + "\n")


def test_json_holds_every_backend() -> None:
    lesser = "AVX2" if os.uname().machine == "x86_64" else "NEON"  # As a processor without bfloat16.
    run = command("--json", before=f"import os; os.environ['SPARSIFINER_TARGET'] = {lesser!r}")
    assert (run.returncode, run.stderr) == (0, "")
    found = json.loads(run.stdout)
    assert found["native_library"].endswith(".so")
    assert "loads, and uses" in found["native_library_reason"]
    assert {name.partition(" ")[0] for name in found["backends"]} == set(BACKENDS)
    # OpenVINO refuses most files in fp16, whatever the processor has: only a file can say.
    assert not any("fp16" in name for name in found["backends"])
    ready = found["backends"]["onnxruntime"]
    assert (ready["available"], ready["version"]) == (True, onnxruntime.__version__)
    assert all(entry["reason"] for entry in (*found["backends"].values(), found["triton"]))
    bf16 = found["backends"]["onnxruntime --precision bf16"]
    assert (bf16["available"], "has no bfloat16" in bf16["reason"]) == (False, True)


def test_a_build_for_the_gpu_needs_a_gpu(monkeypatch: Patch) -> None:
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        assert 'pip install "sparsifiner-edge[gpu]"' in examine()["backends"]["onnxruntime --provider cuda"]["reason"]
    offered = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: offered)
    install_cuda(monkeypatch, Gpu(driver=0))
    found = examine()
    assert "No NVIDIA driver" in found["cuda"]["unavailable"]
    entry = found["backends"]["onnxruntime --provider cuda"]
    assert (entry["available"], "is built in, and No NVIDIA driver" in entry["reason"]) == (False, True)
    install_cuda(monkeypatch, Gpu())
    ready = examine()["backends"]["onnxruntime --provider cuda"]
    assert (ready["available"], "not the CUDA kernels" in ready["reason"]) == (True, True)


@pytest.mark.parametrize(
    ("number", "jetson", "version", "install"),
    [
        (12060, "36.4.3", "12.6", 'pip install "sparsifiner-edge[jetson]"; TensorRT comes with JetPack'),
        (11040, "35.4.1", "11.4", "Jetson Linux 35.4.1 is older than JetPack 6"),
        (12040, None, "12.4", 'pip install "sparsifiner-edge[gpu,tensorrt]"'),
        (13000, None, "13.0", 'pip install "sparsifiner-edge[gpu,tensorrt]"; or gpu-cu13, tensorrt-cu13'),
        (11080, None, "11.8", "update the driver first"),
    ],
)
def test_the_driver_says_which_extra_fits(
    monkeypatch: Patch, number: int, jetson: str | None, version: str, install: str
) -> None:
    install_driver(monkeypatch, number)
    monkeypatch.setattr(support, "jetson_release", lambda: jetson)
    found = examine()["cuda_support"]
    assert (found["driver"], found["jetson"]) == (version, jetson)
    assert found["install"].startswith(install)


def test_a_cuda_python_newer_than_the_driver_is_a_warning(tmp_path: Path, monkeypatch: Patch) -> None:
    distribution(tmp_path, "cuda-python", "13.4.4")
    monkeypatch.syspath_prepend(str(tmp_path))
    install_driver(monkeypatch, 13000)
    assert examine()["warnings"] == []
    install_driver(monkeypatch, 12060)
    (warning,) = examine()["warnings"]
    assert 'pip install "cuda-python>=12.6,<13"' in warning


def test_tensorrt_needs_a_device_to_be_available(monkeypatch: Patch) -> None:
    gpu = Gpu("NVIDIA L4", (8, 9), 24 << 30, False)
    install_cuda(monkeypatch, gpu)
    install_tensorrt(monkeypatch, gpu, "10.9")
    found = examine()
    assert (found["cuda"]["name"], found["cuda"]["compute_capability"]) == ("NVIDIA L4", "8.9")
    said = "imports, builds engines, and runs them on NVIDIA L4"
    assert found["backends"]["tensorrt"] == {"available": True, "reason": said, "version": "10.9.0.34"}
    gpu.count = 0
    entry = examine()["backends"]["tensorrt"]
    assert (entry["available"], "CUDA finds no device" in entry["reason"]) == (False, True)
    install_tensorrt(monkeypatch, gpu, "10.3").__version__ = "8.5.2"
    assert "older than 10.3" in examine()["backends"]["tensorrt"]["reason"]


def test_a_tensorrt_for_a_newer_cuda_than_the_driver_is_refused(tmp_path: Path, monkeypatch: Patch) -> None:
    """It would make its objects all the same, and end the process on use."""
    gpu = Gpu(driver=12060)
    install_cuda(monkeypatch, gpu)
    install_tensorrt(monkeypatch, gpu, "10.9")
    distribution(tmp_path, "tensorrt-cu13")
    monkeypatch.syspath_prepend(str(tmp_path))
    said = "tensorrt-cu13 needs a driver for CUDA 13, and this one takes CUDA 12.6 at most."
    entry = examine()["backends"]["tensorrt"]
    assert (entry["available"], said in entry["reason"]) == (False, True)
    with pytest.raises(BackendError, match=said):
        full.TensorRt().require_driver(probe())
    gpu.driver = 13000
    assert examine()["backends"]["tensorrt"]["available"]


def test_tensorrt_rtx_builds_without_a_device(monkeypatch: Patch) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    install_cuda(monkeypatch, Gpu(count=0))
    entry = examine()["backends"]["tensorrt-rtx"]
    assert entry["available"]
    assert "builds engines ahead of time for RTX cards, and cannot run them here: CUDA finds no" in entry["reason"]


def test_tables_are_for_people(tmp_path: Path) -> None:
    distribution(tmp_path, "sparsifiner-edge", "0.0.1", ('no-such-package; extra == "gpu"',))
    before = f"sys.path.insert(0, {str(tmp_path)!r}); sys.modules['onnxruntime'] = None"
    run = command(before=before)
    assert (run.returncode, run.stderr) == (0, "")
    for text in ("native library", "onnxruntime", "python", "CUDA device", "CUDA driver", "triton", "telemetry"):
        assert text in run.stdout
    assert 'pip install "sparsifiner-edge[gpu]"' in run.stdout  # With its brackets, which are no markup.
    assert "sparsifiner-edge[cpu]" in run.stdout


def test_a_bare_environment_is_enough() -> None:
    heavy = (
        "onnxruntime", "torch", "timm", "PIL", "matplotlib", "safetensors", "tensorrt", "tensorrt_rtx", "triton",
        "cuda", "openvino",
    )  # fmt: skip
    run = command("--json", before=f"sys.modules.update(dict.fromkeys({heavy}))")
    assert (run.returncode, run.stderr) == (0, "")
    found = json.loads(run.stdout)
    assert not any(entry["available"] for entry in (*found["backends"].values(), found["triton"]))
    assert 'pip install "sparsifiner-edge[cpu]"' in found["backends"]["onnxruntime"]["reason"]
    assert 'pip install "sparsifiner-edge[triton]"' in found["triton"]["reason"]


def test_a_missing_native_library_says_what_to_install(monkeypatch: Patch) -> None:
    monkeypatch.setattr(native, "_FILE", "no-such.so")
    found = examine()
    assert found["native_library"] is None
    assert "libhwy-dev libonnxruntime-dev" in found["native_library_reason"]


def test_what_does_not_import_is_said_with_its_version(tmp_path: Path, monkeypatch: Patch) -> None:
    distribution(tmp_path, "tensorrt-cu12", "10.9")
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    entry: Any = examine()["backends"]["tensorrt"]
    assert (entry["available"], entry["version"]) == (False, "10.9")
    assert "tensorrt cannot be imported: libnvinfer.so.10" in entry["reason"]


def test_two_packages_of_one_module_are_a_warning(tmp_path: Path, monkeypatch: Patch) -> None:
    assert examine()["warnings"] == []
    distribution(tmp_path, "onnxruntime-gpu")
    monkeypatch.syspath_prepend(str(tmp_path))
    (warning,) = examine()["warnings"]
    assert "onnxruntime and onnxruntime-gpu are both installed" in warning


def test_extras_come_from_the_metadata(tmp_path: Path, monkeypatch: Patch) -> None:
    requires = (
        "numpy>=1.24", 'numpy>=1.24; extra == "cpu"', 'no-such-package>=1; extra == "cpu"',
        'sparsifiner-edge[cpu]; extra == "demo"', "rich>=13; python_version >= '3.10' and extra == 'demo'",
    )  # fmt: skip
    distribution(tmp_path, "sparsifiner-edge", "0.0.1", requires)
    monkeypatch.syspath_prepend(str(tmp_path))
    extras = examine()["extras"]
    numpy = importlib.metadata.version("numpy")
    assert extras["cpu"] == {"numpy": numpy, "no-such-package": {"unavailable": "not installed"}}
    assert list(extras["demo"]) == ["rich"]
