"""The CUDA layer, against fakes of its packages and, where no driver is, against the real one."""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import inspect
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import pytest

from sparsifiner_edge.errors import BackendError, MissingExtraError
from sparsifiner_edge.runtime.cuda import Driver, StreamBuffers, driver, probe
from tests.fakes.gpu import Gpu, cuda_bindings, install_cuda, install_pycuda

REAL = importlib.util.find_spec("cuda") and importlib.util.find_spec("cuda.bindings")
FLOATS = {"y": (np.dtype(np.float32), (4,))}


@pytest.fixture
def stack():
    with ExitStack() as stack:
        yield stack


def opened(stack, **sizes):
    return StreamBuffers(Driver(), sizes or {"x": 16, "y": 16}, stack)


def double(gpu, buffers, value, key, ran=None):
    """Puts y = 2 x into the stream of the buffers, as an engine would; gives y's first."""

    def compute():
        if ran is not None:
            ran.append(key)
        x, y = (np.frombuffer(gpu.blocks[buffers.pointer(name)][0], np.float32) for name in "xy")
        gpu.put(buffers.stream, lambda: np.multiply(x, 2, out=y))

    return buffers.run({"x": np.full(4, value, np.float32)}, FLOATS, compute, key)["y"]


def test_probe_describes_the_device(monkeypatch):
    install_cuda(monkeypatch, Gpu("NVIDIA L4", (8, 9), 24 << 30, False, 12080))
    found = probe()
    assert (found.name, found.compute_capability) == ("NVIDIA L4", "8.9")
    assert (found.memory_bytes, found.integrated, found.driver_version) == (24 << 30, False, "12.8")


@pytest.mark.parametrize("integrated", [True, False])
def test_buffers_copy_compute_and_give_all_back(monkeypatch, integrated):
    gpu = Gpu(integrated=integrated)
    install_cuda(monkeypatch, gpu)
    with ExitStack() as stack:
        buffers = opened(stack)
        taken = gpu.live()
        first, second = (double(gpu, buffers, value, "a") for value in (1, 5))
        assert buffers.compute_ms == 1.0
    assert first.tolist() == [2] * 4  # its own memory: the second run has not changed it
    assert second.tolist() == [10] * 4
    assert taken == {"stream": 1, "event": 2, "host": 2} | ({} if integrated else {"device": 2})
    assert gpu.live() == {}


def test_a_repeated_run_is_recorded_once_and_launched(monkeypatch):
    gpu, ran = Gpu(integrated=False), []
    install_cuda(monkeypatch, gpu)
    with ExitStack() as stack:
        buffers = opened(stack)
        outputs = [double(gpu, buffers, n, key, ran)[0] for n, key in enumerate("aaaabaa")]
        assert gpu.live()["executable graph"] == 1
    assert outputs == [0, 2, 4, 6, 8, 10, 12]
    # a runs itself, is recorded, launched twice; b drops the recording and runs; a again runs, then is recorded.
    assert ran == list("aabaa")
    assert gpu.calls["cudaGraphLaunch"] == 4
    assert gpu.live() == {}


@pytest.mark.parametrize("integrated", [True, False])
def test_pycuda_runs_without_graphs_and_in_one_thread(monkeypatch, integrated):
    gpu = Gpu(integrated=integrated)
    install_pycuda(monkeypatch, gpu)
    assert (probe().name, probe().integrated) == ("Orin", integrated)
    with ExitStack() as stack:
        buffers = opened(stack)
        for value in (1, 5, 7):
            assert double(gpu, buffers, value, "a").tolist() == [2 * value] * 4
        assert buffers.compute_ms == 1.0
        assert "pycuda has no cudaStreamBeginCapture" in buffers.why_no_graph
        with ThreadPoolExecutor(1) as pool, pytest.raises(BackendError, match="the thread alone that opened it"):
            pool.submit(Driver().use).result()
    gc.collect()
    assert gpu.live() == {}
    gpu.fail["cudaHostAlloc"] = "cudaErrorMemoryAllocation"
    with ExitStack() as stack, pytest.raises(BackendError, match=r"(?s)pycuda 2026.1.*end other programs on it"):
        opened(stack)
    gc.collect()
    assert gpu.live() == {}


@pytest.mark.parametrize(
    "function",
    ["cudaStreamCreateWithFlags", "cudaEventCreate", "cudaHostAlloc", "cudaHostGetDevicePointer", "cudaMalloc"],
)
def test_a_failure_while_opening_leaves_nothing(monkeypatch, function):
    gpu = Gpu(integrated=function == "cudaHostGetDevicePointer", fail={function: "cudaErrorMemoryAllocation"})
    install_cuda(monkeypatch, gpu)
    with ExitStack() as stack, pytest.raises(BackendError, match=r"(?s)cudaErrorMemoryAllocation.*out of memory"):
        opened(stack)
    assert gpu.live() == {}


@pytest.mark.parametrize("function", ["cudaMemcpyAsync", "cudaEventRecord", "cudaStreamSynchronize"])
def test_a_failure_while_running_leaves_nothing(monkeypatch, function):
    gpu = Gpu(integrated=False)
    install_cuda(monkeypatch, gpu)
    with ExitStack() as stack:
        buffers = opened(stack)
        double(gpu, buffers, 1, "a")
        gpu.fail[function] = "cudaErrorLaunchFailure"
        with pytest.raises(BackendError, match=r"(?s)cudaErrorLaunchFailure.*lost to this process: start it again"):
            double(gpu, buffers, 1, "a")
        del gpu.fail[function]
    assert gpu.live() == {}


@pytest.mark.parametrize(
    "refuses", ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate", "cudaGraphLaunch"]
)
def test_runs_go_on_where_a_recording_is_refused(monkeypatch, stack, refuses):
    gpu = Gpu(integrated=False, fail={refuses: "cudaErrorInvalidValue"})
    install_cuda(monkeypatch, gpu)
    buffers, why = opened(stack), []
    for n, key in enumerate("aaabb"):
        np.testing.assert_array_equal(double(gpu, buffers, n, key), 2 * n)
        why.append(buffers.why_no_graph)
    assert gpu.live().keys() == {"stream", "event", "host", "device"}  # nothing of a graph is left
    assert why[0] is None
    assert len(set(why[1:])) == 1
    assert "cudaErrorInvalidValue" in why[1]
    assert gpu.calls["cudaStreamBeginCapture"] == 1  # not tried again, of another shape either


def test_closing_frees_all_even_when_one_step_fails(monkeypatch):
    gpu, stack = Gpu(integrated=False), ExitStack()
    install_cuda(monkeypatch, gpu)
    buffers = opened(stack, x=8, y=16)
    with pytest.raises(BackendError, match="'x' needs 16 bytes; its buffer has 8"):
        double(gpu, buffers, 1, "a")
    gpu.fail["cudaEventDestroy"] = "cudaErrorLaunchFailure"
    with pytest.raises(BackendError, match="to free an event"):
        stack.close()
    assert set(gpu.live()) == {"event"}  # which could not be given back; all else was


def test_memory_that_is_not_there(monkeypatch, stack):
    install_cuda(monkeypatch, Gpu(memory=100, integrated=False))
    assert Driver().free_bytes() == 100
    with pytest.raises(BackendError, match=r"(?s)to make 101 pinned bytes.*out of memory: end other programs"):
        Driver().pinned(101, stack)


def test_no_package_gives_the_pip_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    for release, extra in ((None, "gpu"), ("36.4.3", "jetson")):
        monkeypatch.setattr(driver, "jetson_release", lambda release=release: release)
        with pytest.raises(MissingExtraError, match=rf"(?s)cuda-python is not installed.*sparsifiner-edge\[{extra}\]"):
            probe()


@pytest.mark.parametrize(
    ("gpu", "message"),
    [
        (Gpu(driver=0), "No NVIDIA driver"),
        (Gpu(count=0), "CUDA finds no device"),
        (Gpu(fail={"cudaGetDeviceCount": "cudaErrorNoDevice"}), "CUDA_VISIBLE_DEVICES"),
        (Gpu(fail={"cudaGetDeviceCount": "cudaErrorInsufficientDriver"}), "doctor` says what fits"),
    ],
)
def test_no_device_says_why(monkeypatch, gpu, message):
    install_cuda(monkeypatch, gpu)
    with pytest.raises(BackendError, match=message):
        probe()


@pytest.mark.parametrize(
    ("release", "number", "what", "fix"),
    [
        ("13.4.4", 12060, "13.4.4 needs a driver for CUDA 13, and this one takes CUDA 12.6", '"cuda-python>=12.6,<13"'),
        ("12.9.10", 11040, "12.9.10 needs a driver for CUDA 12, and this one takes CUDA 11.4", "JetPack"),
        ("12.9.10", 12020, None, None),
        ("12.6.2", 13020, None, None),
        ("", 12060, None, None),
    ],
)
def test_a_package_newer_than_the_driver_says_what_to_install(monkeypatch, release, number, what, fix):
    """CUDA's own error would be cudaErrorInsufficientDriver, from the first call that needs a device."""
    install_cuda(monkeypatch, Gpu(driver=number), release)
    if what is None:
        assert probe().name == "Orin"
        return
    with pytest.raises(BackendError) as caught:
        probe()
    assert what in caught.value.what
    assert fix in caught.value.fix


def test_a_package_that_cannot_load_the_driver(monkeypatch):
    """cuda-python up to 12.8 raises RuntimeError from the first call."""
    module = install_cuda(monkeypatch, Gpu())

    def missing():
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    module.cudaDriverGetVersion = missing
    with pytest.raises(BackendError, match=r"No NVIDIA driver \(cuda-python 12.6.2: Failed to dlopen"):
        probe()


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("cudaErrorMemoryAllocation", "out of memory: end other programs"),
        ("cudaErrorIllegalAddress", "lost to this process"),
        ("cudaErrorInvalidValue", "Start again; if it stays"),
    ],
)
def test_errors_say_what_to_do(monkeypatch, name, fix):
    install_cuda(monkeypatch, Gpu(fail={"cudaMemGetInfo": name}))
    with pytest.raises(BackendError, match=rf"(?s)failed to read free memory: {name}, text of.*{fix}"):
        Driver().free_bytes()


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
        "from sparsifiner_edge.runtime.cuda import probe, support\n"
        "print(support.driver_version())\n"
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
