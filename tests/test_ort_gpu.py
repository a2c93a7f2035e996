"""ONNX Runtime on a GPU: refused clearly where it is not possible, never replaced by the CPU in silence."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings

import onnxruntime
import pytest

from sparsifiner_edge.bundle.manifest import Manifest
from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.errors import BackendError, ConfigError
from sparsifiner_edge.runtime import open_session
from sparsifiner_edge.runtime.build import build_engine
from sparsifiner_edge.runtime.onnxruntime.backends import OnnxRuntimeCuda, OnnxRuntimeTensorRt
from sparsifiner_edge.runtime.onnxruntime.session import Execution, OrtSession
from tests.fakes.gpu import Gpu
from tests.fakes.install import install_cuda
from tests.tiny import make_bundle

BOTH = [OnnxRuntimeCuda(), OnnxRuntimeTensorRt()]
CPU_BUILD = "CUDAExecutionProvider" not in onnxruntime.get_available_providers()


@pytest.fixture
def bundle(tmp_path):
    return make_bundle(tmp_path / "b")


@pytest.fixture
def gpu_build(monkeypatch):
    """The CPU's build of ONNX Runtime that says it has the providers of a GPU, as onnxruntime-gpu does anywhere."""
    offered = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: offered)


@pytest.mark.skipif(not CPU_BUILD, reason="onnxruntime-gpu is installed")
@pytest.mark.parametrize("backend", BOTH)
def test_the_real_build_for_the_cpu_is_named(bundle, backend):
    with pytest.raises(BackendError, match=r"(?s)onnxruntime \d.* has no .*; it offers .*CPU.*sparsifiner-edge\[gpu\]"):
        backend.load()
    with pytest.raises(BackendError, match=f"has no {backend.provider}"):
        backend.open(open_bundle(bundle), 1, "auto")


@pytest.mark.parametrize("backend", BOTH)
def test_no_device_is_said_before_a_session_is_made(bundle, gpu_build, monkeypatch, backend):
    install_cuda(monkeypatch, Gpu(count=0))
    monkeypatch.setattr(onnxruntime, "InferenceSession", None)
    with pytest.raises(BackendError, match="CUDA finds no device"):
        backend.open(open_bundle(bundle), 1, "auto")


@pytest.mark.skipif(not CPU_BUILD, reason="onnxruntime-gpu is installed")
@pytest.mark.parametrize("backend", BOTH)
def test_a_silent_fallback_is_an_error(bundle, gpu_build, monkeypatch, backend):
    """The real ONNX Runtime falls back here: it has no such provider."""
    install_cuda(monkeypatch, Gpu())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with pytest.raises(BackendError, match=rf"(?s){backend.provider} does not start.*CPUExecutionProvider instead"):
            backend.open(open_bundle(bundle), 1, "auto")


@pytest.mark.parametrize("backend", BOTH)
def test_what_the_provider_is_given(bundle, gpu_build, monkeypatch, backend, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    install_cuda(monkeypatch, Gpu())
    asked = {}
    real = onnxruntime.InferenceSession

    class Session:
        """The real session on the CPU, under the name of the provider that was asked for."""

        def __init__(self, model, options, providers):
            asked["providers"] = providers
            self._session = real(model, options, providers=["CPUExecutionProvider"])

        def get_providers(self):
            return [asked["providers"][0][0], "CPUExecutionProvider"]

        def __getattr__(self, name):
            return getattr(self._session, name)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    with backend.open(open_bundle(bundle), 1, "auto") as session:
        described = session.description
        assert session.backend == backend.name
    assert described.provider == backend.provider
    assert described.device == "Orin (compute capability 8.7)"
    (name, options), last = asked["providers"]
    assert (name, last) == (backend.provider, "CPUExecutionProvider")
    if isinstance(backend, OnnxRuntimeTensorRt):
        assert options["trt_engine_cache_path"].startswith(str(tmp_path / "cache"))
        assert (options["trt_fp16_enable"], options["trt_int8_enable"]) == (False, False)
    else:
        assert options["use_tf32"] == 0


def test_types_of_the_file_are_allowed(tmp_path):
    def options(digest="ab", precision="fp32"):
        return OnnxRuntimeTensorRt().options(
            Manifest(schema_version=2, files={"model.onnx": digest * 32}, precision=precision)
        )

    assert options(precision="fp16")["trt_fp16_enable"]
    assert options(precision="int8")["trt_int8_enable"]
    assert options("cd")["trt_engine_cache_path"] != options()["trt_engine_cache_path"]


@pytest.mark.parametrize("backend", BOTH)
def test_native_kernels_and_builds_are_refused(bundle, backend):
    with pytest.raises(BackendError, match="native kernels are the processor's"):
        open_session(bundle, backend.name, kernels="native")
    with pytest.raises(ConfigError, match=f"{backend.name} builds no engine file"):
        build_engine(bundle, backend.name)


def test_the_cpu_is_reported_as_before(bundle):
    path = bundle / "model.onnx"
    with OrtSession(path, path.read_bytes(), 1) as session:
        assert (session.backend, session.description.provider) == ("onnxruntime", "CPUExecutionProvider")
    warnings.simplefilter("ignore", UserWarning)
    with pytest.raises(BackendError, match="NoSuchProvider"):
        OrtSession(path, path.read_bytes(), 1, execution=Execution(provider="NoSuchProvider"))


def test_standard_output_stays_clean(bundle):
    """What ONNX Runtime prints while it looks for CUDA must not mix with JSON."""
    code = (
        "import sys, json, onnxruntime\n"
        "onnxruntime.preload_dlls = lambda: print('Failed to load libcudnn')\n"
        "onnxruntime.get_available_providers = lambda: ['CUDAExecutionProvider']\n"
        "from sparsifiner_edge.runtime.onnxruntime import backends\n"
        "from sparsifiner_edge.runtime.cuda import CudaDevice\n"
        "backends.probe = lambda: CudaDevice(0, 'x', (8, 7), 1, True, '12.6')\n"
        "from pathlib import Path\n"
        "from sparsifiner_edge.bundle.store import open_bundle\n"
        "folder = Path(sys.argv[1])\n"
        "try: backends.OnnxRuntimeCuda().open(open_bundle(folder), 1, 'auto')\n"
        "except Exception as error: print(json.dumps(str(error)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(bundle)], capture_output=True, text=True, check=False)
    assert "does not start" in json.loads(done.stdout)
    assert "libcudnn" in done.stderr
