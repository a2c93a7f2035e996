"""ONNX Runtime on a GPU: refused clearly where it is not possible, never replaced by the CPU in silence."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings

import onnxruntime
import pytest

from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.errors import BackendError
from sparsifiner_edge.execution import Execution
from sparsifiner_edge.runtime import open_session
from sparsifiner_edge.runtime.build import build_engine
from sparsifiner_edge.runtime.onnxruntime import CUDA, FALLBACK, OnnxRuntime
from tests.fakes.gpu import Gpu, install_cuda
from tests.tiny import make_bundle

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
