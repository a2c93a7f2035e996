"""ONNX Runtime on a GPU: refused clearly where it is not possible, never replaced by the CPU in silence."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest

from sparsifiner_edge.bundle.manifest import Manifest
from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.errors import BackendError, GateError
from sparsifiner_edge.execution import Execution
from sparsifiner_edge.runtime import open_session
from sparsifiner_edge.runtime.build import build_engine
from sparsifiner_edge.runtime.onnxruntime import backend as backend_module
from sparsifiner_edge.runtime.onnxruntime.backend import GPU_PROVIDERS, OnnxRuntime
from sparsifiner_edge.runtime.onnxruntime.session import FALLBACK, OrtSession, Provider
from tests.fakes.gpu import Gpu
from tests.fakes.install import install_cuda
from tests.tiny import make_bundle

BOTH = [OnnxRuntime(Execution(provider=name)) for name in GPU_PROVIDERS]
CPU_BUILD = "CUDAExecutionProvider" not in onnxruntime.get_available_providers()


def name_of(backend):
    """ONNX Runtime's, of the provider."""
    return GPU_PROVIDERS[backend.execution.provider]


@pytest.fixture
def bundle(tmp_path):
    return make_bundle(tmp_path / "b")


@pytest.fixture
def gpu_build(monkeypatch):
    """The CPU's build of ONNX Runtime that says it has the providers of a GPU, as onnxruntime-gpu does anywhere."""
    offered = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: offered)


@pytest.fixture
def provider(gpu_build, monkeypatch, tmp_path):
    """The providers start: the real session on the CPU, under the name that was asked for.

    `asked` holds the providers, `error` is added to every output.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    install_cuda(monkeypatch, Gpu())
    real, said = onnxruntime.InferenceSession, SimpleNamespace(asked=None, error=0.0)

    class Session:
        def __init__(self, model, options, providers):
            said.asked = providers
            self._session = real(model, options, providers=["CPUExecutionProvider"])

        def get_providers(self):
            return [said.asked[0][0], "CPUExecutionProvider"]

        def run(self, *arguments):
            return [output + np.float32(said.error) for output in self._session.run(*arguments)]

        def __getattr__(self, name):
            return getattr(self._session, name)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    return said


@pytest.mark.skipif(not CPU_BUILD, reason="onnxruntime-gpu is installed")
@pytest.mark.parametrize("backend", BOTH)
def test_the_real_build_for_the_cpu_is_named(bundle, backend):
    with pytest.raises(BackendError, match=r"(?s)onnxruntime \d.* has no .*; it offers .*CPU.*sparsifiner-edge\[gpu\]"):
        backend.load()
    with pytest.raises(BackendError, match=f"has no {name_of(backend)}"):
        backend.open(open_bundle(bundle))


@pytest.mark.parametrize("backend", BOTH)
def test_no_device_is_said_before_a_session_is_made(bundle, gpu_build, monkeypatch, backend):
    install_cuda(monkeypatch, Gpu(count=0))
    monkeypatch.setattr(onnxruntime, "InferenceSession", None)
    with pytest.raises(BackendError, match="CUDA finds no device"):
        backend.open(open_bundle(bundle))


@pytest.mark.skipif(not CPU_BUILD, reason="onnxruntime-gpu is installed")
@pytest.mark.parametrize("backend", BOTH)
def test_a_silent_fallback_is_an_error(bundle, gpu_build, monkeypatch, backend):
    """The real ONNX Runtime falls back here: it has no such provider."""
    install_cuda(monkeypatch, Gpu())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with pytest.raises(BackendError, match=rf"(?s){name_of(backend)} does not start.*CPUExecutionProvider instead"):
            backend.open(open_bundle(bundle))


@pytest.mark.parametrize("backend", BOTH)
def test_what_the_provider_is_given(bundle, provider, backend, tmp_path):
    with backend.open(open_bundle(bundle)) as session:
        described = session.description
        assert session.backend == backend.name
    assert described.provider == name_of(backend)
    assert described.device == "Orin (compute capability 8.7)"
    (name, options), last = provider.asked
    assert (name, last) == (name_of(backend), "CPUExecutionProvider")
    if backend.execution.provider == "tensorrt":
        assert options["trt_engine_cache_path"].startswith(str(tmp_path / "cache"))
    else:
        assert options["use_tf32"] == 0


@pytest.mark.parametrize("backend", BOTH)
def test_what_runs_is_said(tmp_path, provider, backend):
    for function, said in ((True, FALLBACK), (False, "none (standard operators), with pageable copies")):
        made = make_bundle(tmp_path / str(function), function=function)
        with backend.open(open_bundle(made)) as session:
            assert session.description.kernels == said
    assert FALLBACK == "function bodies, not the CUDA kernels, with pageable copies"


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_types_are_those_of_the_file(precision):
    """With `trt_fp16_enable` or `trt_int8_enable` ONNX Runtime drops strong typing."""

    def options(digest="ab"):
        manifest = Manifest(schema_version=3, files={"model.onnx": digest * 32}, precision=precision)
        return backend_module._gpu_options("tensorrt", manifest)

    assert not [name for name in options() if name.endswith(("16_enable", "int8_enable"))]
    assert options("cd")["trt_engine_cache_path"] != options()["trt_engine_cache_path"]


def test_an_engine_that_differs_from_golden_is_refused(bundle, provider, monkeypatch):
    closed = []
    monkeypatch.setattr(OrtSession, "close", lambda self: closed.append(self.backend))
    provider.error = 0.01
    with pytest.raises(GateError, match=r"(?s)'features' differs from golden.*Do not trust onnxruntime"):
        OnnxRuntime(Execution(provider="tensorrt")).open(open_bundle(bundle))
    assert closed == ["onnxruntime"]


@pytest.mark.parametrize("backend", BOTH)
def test_native_kernels_and_other_precisions_are_refused(bundle, provider, backend):
    name = backend.execution.provider
    with pytest.raises(BackendError, match="native kernels are the processor's"):
        open_session(bundle, kernels="native", provider=name)
    for precision in ("bf16", "fp16"):
        with pytest.raises(BackendError, match=f"computes in what a file stores, fp32 here, and not in {precision}"):
            open_session(bundle, precision=precision, provider=name)
    built = build_engine(bundle, provider=name)
    assert built.description.provider == name_of(backend)
    assert built.golden["features"]["range_relative_error"] < 1e-5


def test_the_cpu_is_reported_as_before(bundle):
    path = bundle / "model.onnx"
    with OrtSession(path, path.read_bytes()) as session:
        assert (session.backend, session.description.provider) == ("onnxruntime", "CPUExecutionProvider")
    warnings.simplefilter("ignore", UserWarning)
    with pytest.raises(BackendError, match="NoSuchProvider"):
        OrtSession(path, path.read_bytes(), provider=Provider("NoSuchProvider"))


def test_standard_output_stays_clean(bundle):
    """What ONNX Runtime prints while it looks for CUDA must not mix with JSON."""
    code = (
        "import sys, json, onnxruntime\n"
        "onnxruntime.preload_dlls = lambda: print('Failed to load libcudnn')\n"
        "onnxruntime.get_available_providers = lambda: ['CUDAExecutionProvider']\n"
        "from sparsifiner_edge.execution import Execution\n"
        "from sparsifiner_edge.runtime.onnxruntime import backend\n"
        "from sparsifiner_edge.runtime.cuda import CudaDevice\n"
        "backend.probe = lambda: CudaDevice(0, 'x', (8, 7), 1, True, '12.6')\n"
        "from pathlib import Path\n"
        "from sparsifiner_edge.bundle.store import open_bundle\n"
        "folder = Path(sys.argv[1])\n"
        "try: backend.OnnxRuntime(Execution(provider='cuda')).open(open_bundle(folder))\n"
        "except Exception as error: print(json.dumps(str(error)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(bundle)], capture_output=True, text=True, check=False)
    assert "does not start" in json.loads(done.stdout)
    assert "libcudnn" in done.stderr
