"""Tests of the CUDA layer with a fake cuda-python, and of ONNX Runtime on a GPU.

A GPU that cannot be used is an error; the CPU never replaces it silently.
"""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import warnings

import onnxruntime
import pytest

from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.errors import BackendError, MissingExtraError
from sparsifiner_edge.execution import Execution
from sparsifiner_edge.runtime import cuda
from sparsifiner_edge.runtime.cuda import probe
from sparsifiner_edge.runtime.golden import check_golden
from sparsifiner_edge.runtime.onnxruntime import CUDA, FALLBACK, OnnxRuntime
from tests.fakes.gpu import STATUS, Gpu, cuda_bindings, install_cuda
from tests.flat import open_session
from tests.tiny import make_bundle


def test_no_package_gives_the_pip_command(monkeypatch):
    for name in ("cuda.bindings", "pycuda"):
        monkeypatch.setitem(sys.modules, name, None)
    for release, extra in ((None, "gpu"), ("36.4.3", "jetson")):
        monkeypatch.setattr(cuda, "jetson_release", lambda release=release: release)
        with pytest.raises(MissingExtraError, match=rf"(?s)cuda-python is not installed.*\[{extra}\]"):
            probe()


@pytest.mark.parametrize(
    ("gpu", "release", "message"),
    [
        (Gpu(driver=0), "12.6", "No NVIDIA driver"),
        (Gpu(driver=12060), "13.4", r"(?s)13.4 needs .* takes CUDA 12.6 at most.*cuda-python>=12.6,<13"),
        (Gpu(driver=11040), "12.6", r"(?s)this one takes CUDA 11.4 at most.*on a Jetson: JetPack"),
        (Gpu(fail={"cudaGetDeviceCount": "cudaErrorNoDevice"}), "12.6", "CUDA_VISIBLE_DEVICES"),
        (Gpu(fail={"cudaGetDeviceCount": "cudaErrorInsufficientDriver"}), "12.6", "doctor` says what fits"),
    ],
)
def test_no_device_says_why(monkeypatch, gpu, release, message):
    install_cuda(monkeypatch, gpu, release)
    with pytest.raises(BackendError, match=message):
        probe()


def test_a_package_that_cannot_load_the_driver(monkeypatch):
    """cuda-python up to 12.8 raises RuntimeError from the first call if it cannot load the driver."""
    module = install_cuda(monkeypatch, Gpu())

    def missing():
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    module.cudaDriverGetVersion = missing
    with pytest.raises(BackendError, match=r"No NVIDIA driver \(cuda-python 12.6.2: Failed to dlopen"):
        probe()


def test_the_fake_has_the_surface_of_the_real_package():
    """Compare names and parameter counts with the docstrings of the real functions, and enums by name."""
    real, fake = pytest.importorskip("cuda.bindings.runtime"), cuda_bindings(Gpu())
    for name, body in Gpu().functions().items():
        text = (getattr(real, name).__doc__ or "").split("\n")[0]
        parameters = [p for p in text.partition("(")[2].rpartition(")")[0].split(",") if p.strip()]
        assert len(parameters) == len(inspect.signature(body).parameters), text
    for kind in ("cudaMemcpyKind", "cudaStreamCaptureMode"):
        assert vars(getattr(fake, kind)).items() <= getattr(real, kind).__members__.items()
    assert STATUS.__members__.keys() <= real.cudaError_t.__members__.keys()


BACKEND = OnnxRuntime(Execution(provider="cuda"))
CPU_BUILD = CUDA not in onnxruntime.get_available_providers()


@pytest.fixture
def gpu_build(monkeypatch):
    """Make the CPU build of ONNX Runtime report a GPU provider, as onnxruntime-gpu does on any machine."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, "CPUExecutionProvider"])


@pytest.mark.skipif(not CPU_BUILD, reason="onnxruntime-gpu is installed")
def test_the_real_build_for_the_cpu_is_named(tiny):
    with pytest.raises(BackendError, match=r"(?s)onnxruntime \d.* has no CUDA.*it offers .*CPU.*\[gpu\]"):
        BACKEND.open(open_bundle(tiny))


def test_no_device_is_said_before_a_session_is_made(tiny, gpu_build, monkeypatch):
    install_cuda(monkeypatch, Gpu(count=0))
    monkeypatch.setattr(onnxruntime, "InferenceSession", None)
    with pytest.raises(BackendError, match="CUDA finds no device"):
        BACKEND.open(open_bundle(tiny))


@pytest.mark.skipif(not CPU_BUILD, reason="onnxruntime-gpu is installed")
def test_a_silent_fallback_is_an_error(tiny, gpu_build, monkeypatch):
    """ONNX Runtime itself falls back to the CPU here, since it lacks the provider."""
    install_cuda(monkeypatch, Gpu())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with pytest.raises(BackendError, match=rf"(?s){CUDA} does not start.*CPUExecutionProvider instead"):
            BACKEND.open(open_bundle(tiny))


def test_what_runs_is_said_and_all_else_refused(tmp_path, tiny, gpu_build, monkeypatch):
    """The provider starts: a real CPU session under the requested name."""
    install_cuda(monkeypatch, Gpu())
    real = onnxruntime.InferenceSession

    def start(model, options, providers):
        (name, settings), last = providers
        assert (name, settings["use_tf32"], last) == (CUDA, 0, "CPUExecutionProvider")
        session = real(model, options, providers=["CPUExecutionProvider"])
        session.get_providers = lambda: [CUDA, "CPUExecutionProvider"]
        return session

    monkeypatch.setattr(onnxruntime, "InferenceSession", start)
    for function, said in ((True, FALLBACK), (False, "none (standard operators), with pageable copies")):
        with BACKEND.open(open_bundle(make_bundle(tmp_path / str(function), function=function))) as session:
            described = session.description
        assert (described.kernels, described.provider) == (said, CUDA)
        assert described.device == "Orin (compute capability 8.7)"
    with pytest.raises(BackendError, match="native kernels run on the CPU only"):
        open_session(tiny, kernels="native", provider="cuda")
    for precision in ("bf16", "fp16"):
        with pytest.raises(BackendError, match=f"computes in the file's precision, fp32, not in {precision}"):
            open_session(tiny, compute_precision=precision, provider="cuda")
    with open_session(tiny, provider="cuda") as session:
        assert session.description.provider == CUDA
        assert check_golden(session, open_bundle(tiny))["features"]["range_relative_error"] < 1e-5


def test_standard_output_stays_clean(tiny):
    """Output that ONNX Runtime prints while it searches for CUDA must not mix with JSON."""
    code = (
        "import sys, json, onnxruntime\n"
        "onnxruntime.preload_dlls = lambda: print('Failed to load libcudnn')\n"
        "onnxruntime.get_available_providers = lambda: ['CUDAExecutionProvider']\n"
        "from sparsifiner_edge import Execution\n"
        "from sparsifiner_edge.runtime import cuda, open_session, onnxruntime as session\n"
        "session.probe = lambda: cuda.CudaDevice('x', '8.7', True, '12.6')\n"
        "try: open_session(sys.argv[1], Execution(provider='cuda'))\n"
        "except Exception as error: print(json.dumps(str(error)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tiny)], capture_output=True, text=True, check=False)
    assert "does not start" in json.loads(done.stdout)
    assert "libcudnn" in done.stderr
