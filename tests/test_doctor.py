import importlib.metadata
import json
import os
import subprocess
import sys

import onnxruntime
import pytest

from sparsifiner_edge.errors import BackendError
from sparsifiner_edge.ops import native
from sparsifiner_edge.runtime import BACKENDS
from sparsifiner_edge.runtime.cuda import support
from sparsifiner_edge.runtime.tensorrt import full
from tests.fakes.gpu import Gpu
from tests.fakes.install import install_cuda, install_driver, install_tensorrt
from tests.plain import examine


def command(*arguments, before=""):
    code = f"import sys\n{before}\nfrom sparsifiner_edge.cli.main import main\nmain(sys.argv[1:])"
    return subprocess.run(
        [sys.executable, "-c", code, "doctor", *arguments], capture_output=True, text=True, check=False
    )


def distribution(folder, name, version="1.2.3", requires=()):
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


def test_json_holds_every_backend():
    run = command("--json")
    assert (run.returncode, run.stderr) == (0, "")
    found = json.loads(run.stdout)
    assert found["native_library"].endswith(".so")
    assert "loads, and uses" in found["native_library_reason"]
    assert set(found["backends"]) == set(BACKENDS)
    ready, openvino = found["backends"]["onnxruntime"], found["backends"]["openvino"]
    assert set(ready["options"]) == {"--precision bf16", "--provider cuda"}
    assert set(openvino["options"]) == {"--precision bf16", "--precision fp16"}
    options = [*ready["options"].values(), *openvino["options"].values()]
    for entry in (*found["backends"].values(), *options, found["triton"]):
        assert entry.keys() - {"options"} == {"available", "reason", "version"}
        assert entry["reason"]
    assert ready["available"]
    assert ready["version"] == onnxruntime.__version__


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="onnxruntime-gpu is installed"
)
def test_the_build_for_the_cpu_has_no_gpu():
    entry = examine()["backends"]["onnxruntime"]["options"]["--provider cuda"]
    assert not entry["available"]
    assert 'pip install "sparsifiner-edge[gpu]"' in entry["reason"]


def test_a_build_for_the_gpu_without_a_gpu_is_not_available(monkeypatch):
    offered = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: offered)
    install_cuda(monkeypatch, Gpu(driver=0))
    found = examine()
    assert "No NVIDIA driver" in found["cuda"]["unavailable"]
    entry = found["backends"]["onnxruntime"]["options"]["--provider cuda"]
    assert not entry["available"]
    assert "is built in, and No NVIDIA driver" in entry["reason"]
    install_cuda(monkeypatch, Gpu())
    ready = examine()["backends"]["onnxruntime"]["options"]["--provider cuda"]
    assert ready["available"]
    assert "a fallback: function bodies, not the CUDA kernels, with pageable copies" in ready["reason"]


@pytest.mark.parametrize(
    ("number", "jetson", "version", "install"),
    [
        (12060, "36.4.3", "12.6", 'pip install "sparsifiner-edge[jetson]"; TensorRT comes with JetPack'),
        (13020, "39.2.0", "13.2", 'pip install "sparsifiner-edge[jetson]"; TensorRT comes with JetPack'),
        (11040, "35.4.1", "11.4", "Jetson Linux 35.4.1 is older than JetPack 6"),
        (12040, None, "12.4", 'pip install "sparsifiner-edge[gpu,tensorrt]"'),
        (13000, None, "13.0", 'pip install "sparsifiner-edge[gpu,tensorrt]"; or gpu-cu13, tensorrt-cu13'),
        (11080, None, "11.8", "update the driver first"),
    ],
)
def test_the_driver_says_which_extra_fits(monkeypatch, number, jetson, version, install):
    install_driver(monkeypatch, number)
    monkeypatch.setattr(support, "jetson_release", lambda: jetson)
    found = examine()["cuda_support"]
    assert (found["driver"], found["jetson"]) == (version, jetson)
    assert found["install"].startswith(install)
    assert ("cu13" in found["install"]) == (number == 13000)


def test_without_a_driver_that_comes_first(monkeypatch):
    install_driver(monkeypatch, 0, status=999)
    found = examine()["cuda_support"]
    assert found["driver"] == {"unavailable": "NVIDIA's driver does not say its version: CUDA error 999"}
    assert found["install"] == "install NVIDIA's driver first"


def test_a_cuda_python_newer_than_the_driver_is_a_warning(tmp_path, monkeypatch):
    distribution(tmp_path, "cuda-python", "13.4.4")
    monkeypatch.syspath_prepend(str(tmp_path))
    install_driver(monkeypatch, 13000)
    assert examine()["warnings"] == []
    install_driver(monkeypatch, 12060)
    install_cuda(monkeypatch, Gpu(), release="13.4.4")
    found = examine()
    assert found["warnings"] == [
        "cuda-python 13.4.4 needs a driver for CUDA 13, and this one takes CUDA 12.6 at most. "
        'pip install "cuda-python>=12.6,<13"'
    ]
    assert found["cuda"] == {"unavailable": found["warnings"][0]}


def test_tensorrt_on_a_jetson_is_jetpacks(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    for release, said in ((None, 'pip install "sparsifiner-edge[tensorrt]"'), ("36.4.3", "--system-site-packages")):
        monkeypatch.setattr(full, "jetson_release", lambda release=release: release)
        reason = examine()["backends"]["tensorrt"]["reason"]
        assert said in reason
        assert ("pip install" in reason) == (release is None)


def test_tensorrt_needs_a_device_to_be_available(monkeypatch):
    gpu = Gpu("NVIDIA L4", (8, 9), 24 << 30, False)
    install_cuda(monkeypatch, gpu)
    install_tensorrt(monkeypatch, gpu, "10.9")
    found = examine()
    assert found["cuda"]["name"] == "NVIDIA L4"
    assert found["cuda"]["compute_capability"] == "8.9"
    assert found["backends"]["tensorrt"] == {
        "available": True,
        "reason": "imports; builds engines for the GPU of this machine, and runs them on NVIDIA L4",
        "version": "10.9.0.34",
    }
    gpu.count = 0
    entry = examine()["backends"]["tensorrt"]
    assert not entry["available"]
    assert "cannot be used here: CUDA finds no device" in entry["reason"]
    install_tensorrt(monkeypatch, gpu, "10.3").__version__ = "8.5.2"
    assert "older than 10.3" in examine()["backends"]["tensorrt"]["reason"]


def test_a_tensorrt_for_a_newer_cuda_than_the_driver_is_refused(tmp_path, monkeypatch):
    """It would make its objects all the same, and end the process on use."""
    gpu = Gpu(driver=12060)
    install_cuda(monkeypatch, gpu)
    install_tensorrt(monkeypatch, gpu, "10.9")
    distribution(tmp_path, "tensorrt-cu12")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert examine()["backends"]["tensorrt"]["available"]
    assert full.TensorRt().device().compute_capability == "8.7"
    distribution(tmp_path / "newer", "tensorrt-cu13")
    monkeypatch.syspath_prepend(str(tmp_path / "newer"))
    said = "tensorrt-cu13 needs a driver for CUDA 13, and this one takes CUDA 12.6 at most."
    entry = examine()["backends"]["tensorrt"]
    assert (entry["available"], said in entry["reason"]) == (False, True)
    with pytest.raises(BackendError, match=said):
        full.TensorRt().device()
    gpu.driver = 13000
    assert examine()["backends"]["tensorrt"]["available"]


def test_tensorrt_rtx_builds_without_a_device(monkeypatch):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    install_cuda(monkeypatch, Gpu(count=0))
    entry = examine()["backends"]["tensorrt-rtx"]
    assert entry["available"]
    assert "builds engines ahead of time for RTX cards, and cannot run them here: CUDA finds no" in entry["reason"]


def test_a_triton_that_does_not_import_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    missing = examine()["triton"]
    assert not missing["available"]
    assert 'pip install "sparsifiner-edge[triton]"' in missing["reason"]


def test_tables_are_for_people():
    run = command()
    assert (run.returncode, run.stderr) == (0, "")
    for text in (
        "Backends",
        "Extras",
        "Machine",
        "native library",
        "onnxruntime",
        "python",
        "CUDA device",
        "CUDA driver",
        "triton",
    ):
        assert text in run.stdout


def test_the_tables_hold_pip_commands_with_their_brackets(tmp_path):
    distribution(tmp_path, "sparsifiner-edge", "0.0.1", ['no-such-package; extra == "gpu"'])
    before = f"sys.path.insert(0, {str(tmp_path)!r}); sys.modules['onnxruntime'] = None"
    printed = command(before=before).stdout
    assert 'pip install "sparsifiner-edge[gpu]"' in printed
    assert "sparsifiner-edge[cpu]" in printed


def test_a_processor_without_bfloat16_has_onnxruntime_all_the_same():
    lesser = "AVX2" if os.uname().machine == "x86_64" else "NEON"
    run = command("--json", before=f"import os; os.environ['SPARSIFINER_TARGET'] = {lesser!r}")
    found = json.loads(run.stdout)["backends"]["onnxruntime"]
    bf16 = found["options"]["--precision bf16"]
    assert (found["available"], bf16["available"]) == (True, False)
    assert "has no bfloat16" in bf16["reason"]


def test_a_bare_environment_is_enough():
    heavy = (
        "('onnxruntime', 'torch', 'timm', 'PIL', 'matplotlib', 'safetensors', 'tensorrt', 'tensorrt_rtx', 'triton', "
        "'cuda', 'pycuda', 'openvino')"
    )
    run = command("--json", before=f"sys.modules.update(dict.fromkeys({heavy}))")
    assert (run.returncode, run.stderr) == (0, "")
    found = json.loads(run.stdout)
    assert not any(entry["available"] for entry in found["backends"].values())
    assert not found["triton"]["available"]
    assert found["cuda"]["unavailable"]
    missing = found["backends"]["onnxruntime"]
    assert not missing["available"]
    assert 'pip install "sparsifiner-edge[cpu]"' in missing["reason"]


def test_a_missing_native_library_says_what_to_install(monkeypatch):
    monkeypatch.setattr(native, "_FILE", "no-such.so")
    found = examine()
    assert found["native_library"] is None
    assert "libhwy-dev libonnxruntime-dev" in found["native_library_reason"]


def test_an_onnxruntime_that_does_not_import_is_said(tmp_path):
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('libfoo.so is missing')")
    run = command("--json", before=f"sys.path.insert(0, {str(tmp_path)!r})")
    assert run.returncode == 0
    assert "libfoo.so is missing" in json.loads(run.stdout)["backends"]["onnxruntime"]["reason"]


def test_two_packages_of_one_module_are_a_warning(tmp_path, monkeypatch):
    assert examine()["warnings"] == []
    distribution(tmp_path, "onnxruntime-gpu")
    monkeypatch.syspath_prepend(str(tmp_path))
    (warning,) = examine()["warnings"]
    assert "onnxruntime and onnxruntime-gpu are both installed" in warning


def test_extras_come_from_the_metadata(tmp_path, monkeypatch):
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
    assert set(extras) == {"cpu", "demo"}
    assert list(extras["cpu"]["packages"]) == ["numpy", "no-such-package"]
    assert extras["cpu"]["packages"]["numpy"] == importlib.metadata.version("numpy")
    assert extras["cpu"]["packages"]["no-such-package"] == {"unavailable": "not installed"}
    assert list(extras["demo"]["packages"]) == ["numpy", "no-such-package", "rich"]
    assert not extras["demo"]["complete"]
    assert extras["demo"]["install"] == 'pip install "sparsifiner-edge[demo]"'


def test_a_tensorrt_that_does_not_import_keeps_its_version(tmp_path, monkeypatch):
    distribution(tmp_path, "tensorrt-cu12", "10.9")
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    entry = examine()["backends"]["tensorrt"]
    assert (entry["available"], entry["version"]) == (False, "10.9")
    assert "tensorrt cannot be imported: libnvinfer.so.10" in entry["reason"]
