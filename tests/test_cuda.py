"""The CUDA layer, against a fake of cuda-python and, where no driver is, against the real one; and ONNX Runtime on a
GPU: refused clearly where it is not possible, never replaced by the CPU in silence.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import json
import os
import subprocess
import sys
import warnings

import onnxruntime
import pytest

from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.errors import BackendError, MissingExtraError
from sparsifiner_edge.execution import Execution
from sparsifiner_edge.runtime import cuda, open_session
from sparsifiner_edge.runtime.build import build_engine
from sparsifiner_edge.runtime.cuda import probe
from sparsifiner_edge.runtime.onnxruntime import CUDA, FALLBACK, OnnxRuntime
from tests.fakes.gpu import Gpu, cuda_bindings, install_cuda
from tests.tiny import make_bundle

REAL = importlib.util.find_spec("cuda") and importlib.util.find_spec("cuda.bindings")


def test_no_package_gives_the_pip_command(monkeypatch):
    for name in ("cuda.bindings", "pycuda"):
        monkeypatch.setitem(sys.modules, name, None)
    for release, extra in ((None, "gpu"), ("36.4.3", "jetson")):
        monkeypatch.setattr(cuda, "jetson_release", lambda release=release: release)
        with pytest.raises(MissingExtraError, match=rf"(?s)cuda-python is not installed.*sparsifiner-edge\[{extra}\]"):
            probe()


@pytest.mark.parametrize(
    ("gpu", "message"),
    [
        (Gpu(driver=0), "No NVIDIA driver"),
        (Gpu(fail={"cudaGetDeviceCount": "cudaErrorNoDevice"}), "CUDA_VISIBLE_DEVICES"),
        (Gpu(fail={"cudaGetDeviceCount": "cudaErrorInsufficientDriver"}), "doctor` says what fits"),
    ],
)
def test_no_device_says_why(monkeypatch, gpu, message):
    install_cuda(monkeypatch, gpu)
    with pytest.raises(BackendError, match=message):
        probe()


def test_a_package_that_cannot_load_the_driver(monkeypatch):
    """cuda-python up to 12.8 raises RuntimeError from the first call."""
    module = install_cuda(monkeypatch, Gpu())

    def missing():
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    module.cudaDriverGetVersion = missing
    with pytest.raises(BackendError, match=r"No NVIDIA driver \(cuda-python 12.6.2: Failed to dlopen"):
        probe()


@pytest.mark.skipif(not REAL, reason="cuda-python is not installed")
def test_the_fake_has_the_surface_of_the_real_package():
    """Names and numbers of parameters, as the docstrings of the real functions give them; enums by value."""
    import cuda.bindings.runtime as real

    fake = cuda_bindings(Gpu())
    for name, body in Gpu().functions().items():
        text = (getattr(real, name).__doc__ or "").split("\n")[0]
        parameters = [p for p in text.partition("(")[2].rpartition(")")[0].split(",") if p.strip()]
        assert len(parameters) == len(inspect.signature(body).parameters), text
    for name in ("cudaHostAllocMapped", "cudaStreamNonBlocking"):
        assert int(getattr(real, name)) == getattr(fake, name)
    for kind in ("cudaMemcpyKind", "cudaStreamCaptureMode", "cudaError_t"):
        for member in getattr(fake, kind):
            assert int(getattr(getattr(real, kind), member.name)) == int(member), member


STUB = """
#include <string.h>
int cuDriverGetVersion(int *version) { *version = VERSION; return 0; }
int cuInit(unsigned flags) { return 100; }
int cuGetProcAddress(const char *name, void **found, int version, unsigned long long flags) {
  *found = !strcmp(name, "cuDriverGetVersion") ? (void *)cuDriverGetVersion
         : !strcmp(name, "cuInit") ? (void *)cuInit
         : !strcmp(name, "cuGetProcAddress") ? (void *)cuGetProcAddress : 0;
  return *found ? 0 : 500;
}
int cuGetProcAddress_v2(const char *name, void **found, int version, unsigned long long flags, int *status) {
  return cuGetProcAddress(name, found, version, flags);
}
int cuGetExportTable(const void **table, const void *id) { *table = 0; return 500; }
"""
"""A driver that has no device, and says which CUDA it takes."""


@pytest.mark.skipif(not REAL, reason="cuda-python is not installed")
@pytest.mark.parametrize("older", [True, False])
def test_the_real_package_with_a_driver_of_an_older_cuda(tmp_path, older):
    """Its own error would be cudaErrorInsufficientDriver."""
    release = importlib.metadata.version("cuda-bindings")
    cuda = int(release.partition(".")[0]) - older
    source = tmp_path / "cuda.c"
    source.write_text(STUB)
    library = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(tmp_path / "libcuda.so.1")]
    subprocess.run(["gcc", f"-DVERSION={1000 * cuda + 60}", *library, str(source)], check=True)
    code = (
        "from sparsifiner_edge.errors import SparsifinerError\n"
        "from sparsifiner_edge.runtime.cuda import driver_version, probe\n"
        "print(driver_version())\n"
        "try: probe()\n"
        "except SparsifinerError as error: print(error)"
    )
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    version, what, fix = (line.strip() for line in done.stdout.splitlines())
    assert version == f"{cuda}.6"
    if older:
        assert f"{release} needs a driver for CUDA {cuda + 1}, and this one takes CUDA {cuda}.6 at most" in what
        assert fix == f'pip install "cuda-python>=12.6,<{cuda + 1}"' or cuda < 12
    else:
        assert "cudaErrorNoDevice" in what


BACKEND = OnnxRuntime(Execution(provider="cuda"))
CPU_BUILD = CUDA not in onnxruntime.get_available_providers()


@pytest.fixture
def bundle(tmp_path):
    return make_bundle(tmp_path / "b")


@pytest.fixture
def gpu_build(monkeypatch):
    """The CPU's build of ONNX Runtime that says it has the provider of a GPU, as onnxruntime-gpu does anywhere."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, "CPUExecutionProvider"])


@pytest.mark.skipif(not CPU_BUILD, reason="onnxruntime-gpu is installed")
def test_the_real_build_for_the_cpu_is_named(bundle):
    with pytest.raises(BackendError, match=r"(?s)onnxruntime \d.* has no CUDA.*it offers .*CPU.*edge\[gpu\]"):
        BACKEND.open(open_bundle(bundle))


def test_no_device_is_said_before_a_session_is_made(bundle, gpu_build, monkeypatch):
    install_cuda(monkeypatch, Gpu(count=0))
    monkeypatch.setattr(onnxruntime, "InferenceSession", None)
    with pytest.raises(BackendError, match="CUDA finds no device"):
        BACKEND.open(open_bundle(bundle))


@pytest.mark.skipif(not CPU_BUILD, reason="onnxruntime-gpu is installed")
def test_a_silent_fallback_is_an_error(bundle, gpu_build, monkeypatch):
    """The real ONNX Runtime falls back here: it has no such provider."""
    install_cuda(monkeypatch, Gpu())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with pytest.raises(BackendError, match=rf"(?s){CUDA} does not start.*CPUExecutionProvider instead"):
            BACKEND.open(open_bundle(bundle))


def test_what_runs_is_said_and_all_else_refused(tmp_path, bundle, gpu_build, monkeypatch):
    """The provider starts: the real session on the CPU, under the name that was asked for."""
    install_cuda(monkeypatch, Gpu())
    real = onnxruntime.InferenceSession

    class Session:
        def __init__(self, model, options, providers):
            (self.name, self.options), self.last = providers
            assert (self.name, self.options["use_tf32"], self.last) == (CUDA, 0, "CPUExecutionProvider")
            self._session = real(model, options, providers=["CPUExecutionProvider"])

        def get_providers(self):
            return [CUDA, "CPUExecutionProvider"]

        def __getattr__(self, name):
            return getattr(self._session, name)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    for function, said in ((True, FALLBACK), (False, "none (standard operators), with pageable copies")):
        with BACKEND.open(open_bundle(make_bundle(tmp_path / str(function), function=function))) as session:
            described = session.description
        assert (described.kernels, described.provider) == (said, CUDA)
        assert described.device == "Orin (compute capability 8.7)"
    with pytest.raises(BackendError, match="native kernels are the processor's"):
        open_session(bundle, kernels="native", provider="cuda")
    for precision in ("bf16", "fp16"):
        with pytest.raises(BackendError, match=f"computes in what a file stores, fp32 here, and not in {precision}"):
            open_session(bundle, precision=precision, provider="cuda")
    built = build_engine(bundle, provider="cuda")
    assert built.description.provider == CUDA
    assert built.golden["features"]["range_relative_error"] < 1e-5


def test_standard_output_stays_clean(bundle):
    """What ONNX Runtime prints while it looks for CUDA must not mix with JSON."""
    code = (
        "import sys, json, onnxruntime\n"
        "onnxruntime.preload_dlls = lambda: print('Failed to load libcudnn')\n"
        "onnxruntime.get_available_providers = lambda: ['CUDAExecutionProvider']\n"
        "from sparsifiner_edge.execution import Execution\n"
        "from sparsifiner_edge.runtime import onnxruntime as session\n"
        "from sparsifiner_edge.runtime.cuda import CudaDevice\n"
        "session.probe = lambda: CudaDevice('x', '8.7', 1, True, '12.6')\n"
        "from pathlib import Path\n"
        "from sparsifiner_edge.bundle.store import open_bundle\n"
        "try: session.OnnxRuntime(Execution(provider='cuda')).open(open_bundle(Path(sys.argv[1])))\n"
        "except Exception as error: print(json.dumps(str(error)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(bundle)], capture_output=True, text=True, check=False)
    assert "does not start" in json.loads(done.stdout)
    assert "libcudnn" in done.stderr
