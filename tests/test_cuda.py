"""The CUDA layer, against fakes of both packages and, where no driver is, against the real cuda-python."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import os
import subprocess
import sys
import threading
from contextlib import ExitStack

import numpy as np
import pytest

from sparsifiner_edge.errors import BackendError, MissingExtraError
from sparsifiner_edge.runtime.cuda import StreamBuffers, StreamTimes, driver, open_driver, probe
from sparsifiner_edge.runtime.cuda.driver import fail
from tests.fakes import cuda_modules
from tests.fakes.cuda_modules import cuda_bindings
from tests.fakes.gpu import Gpu
from tests.fakes.install import install_cuda

REAL = importlib.util.find_spec("cuda") and importlib.util.find_spec("cuda.bindings")
PACKAGES = ("cuda-python", "pycuda")
TWO = {"x": 16, "y": 16}
FLOATS = {"y": (np.dtype(np.float32), (4,))}


def doubling(gpu, buffers, times=None):
    """Puts y = 2 x into the stream of the buffers, as an engine would."""

    def compute():
        if times is not None:
            times.append(len(times))
        x, y = (np.frombuffer(gpu.block(buffers.pointer(name)), np.float32) for name in "xy")
        gpu.put(buffers.stream, lambda: np.multiply(x, 2, out=y))

    return compute


@pytest.mark.parametrize("package", PACKAGES)
def test_probe_describes_the_device(monkeypatch, package):
    install_cuda(monkeypatch, Gpu("NVIDIA L4", (8, 9), 24 << 30, False, 12080), package)
    found = probe()
    assert (found.name, found.sm, found.compute_capability) == ("NVIDIA L4", (8, 9), "8.9")
    assert (found.memory_bytes, found.integrated, found.driver_version) == (24 << 30, False, "12.8")


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("integrated", [True, False])
def test_buffers_copy_compute_and_give_all_back(monkeypatch, package, integrated):
    gpu = Gpu(integrated=integrated)
    install_cuda(monkeypatch, gpu, package)
    driver = open_driver()
    with StreamBuffers(driver, TWO) as buffers:
        taken = gpu.live()
        first = buffers.run({"x": np.float32([1, 2, 3, 4])}, FLOATS, doubling(gpu, buffers))["y"]
        second = buffers.run({"x": np.float32([5, 6, 7, 8])}, FLOATS, doubling(gpu, buffers))["y"]
        times = buffers.last_times
    driver.close()
    np.testing.assert_array_equal(first, [2, 4, 6, 8])  # its own memory: the second run has not changed it
    np.testing.assert_array_equal(second, [10, 12, 14, 16])
    assert taken == {"stream": 1, "event": 4, "host": 2} | ({} if integrated else {"device": 2})
    assert gpu.live() == {}
    assert times == (StreamTimes(0.0, 1.0, 0.0) if integrated else StreamTimes(0.25, 1.0, 0.25))


def test_a_repeated_run_is_recorded_once_and_launched(monkeypatch):
    gpu = Gpu(integrated=False)
    install_cuda(monkeypatch, gpu)
    ran: list[int] = []
    with StreamBuffers(open_driver(), TWO) as buffers:
        outputs = [
            buffers.run({"x": np.full(4, n, np.float32)}, FLOATS, doubling(gpu, buffers, ran), name)["y"][0]
            for n, name in enumerate(["a", "a", "a", "a", "b", "a", "a"])
        ]
        assert gpu.live()["executable graph"] == 1
    assert outputs == [0, 2, 4, 6, 8, 10, 12]
    # a runs itself, is recorded, launched twice; b drops the recording and runs; a again runs, then is recorded.
    assert len(ran) == 5
    assert gpu.calls["cudaGraphLaunch"] == 4
    assert gpu.live() == {}


def test_pycuda_runs_without_graphs_and_in_one_thread(monkeypatch):
    gpu = Gpu()
    install_cuda(monkeypatch, gpu, "pycuda")
    driver = open_driver()
    ran: list[int] = []
    caught: list[BaseException] = []
    with StreamBuffers(driver, TWO) as buffers:

        def run():
            try:
                buffers.run({"x": np.zeros(4, np.float32)}, FLOATS, doubling(gpu, buffers, ran), "a")
            except BackendError as error:
                caught.append(error)

        for _ in range(3):
            run()
        assert "no CUDA graphs" in buffers.why_no_graph
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert (len(ran), "works in the thread alone" in str(caught[0])) == (3, True)
    driver.close()
    driver.close()
    assert (gpu.calls["push"], gpu.calls["pop"], gpu.calls["detach"]) == (1, 1, 1)


@pytest.mark.parametrize(
    "function",
    ["cudaStreamCreateWithFlags", "cudaEventCreate", "cudaHostAlloc", "cudaHostGetDevicePointer", "cudaMalloc"],
)
def test_a_failure_while_opening_leaves_nothing(monkeypatch, function):
    gpu = Gpu(integrated=function == "cudaHostGetDevicePointer")
    install_cuda(monkeypatch, gpu)
    driver = open_driver()
    gpu.fail[function] = "cudaErrorMemoryAllocation"
    with pytest.raises(BackendError, match=r"(?s)cudaErrorMemoryAllocation.*out of memory"):
        StreamBuffers(driver, TWO)
    assert gpu.live() == {}


@pytest.mark.parametrize("function", ["cudaMemcpyAsync", "cudaEventRecord", "cudaStreamSynchronize"])
def test_a_failure_while_running_leaves_nothing(monkeypatch, function):
    gpu = Gpu(integrated=False)
    install_cuda(monkeypatch, gpu)
    with StreamBuffers(open_driver(), TWO) as buffers:
        buffers.run({"x": np.zeros(4, np.float32)}, FLOATS, doubling(gpu, buffers), "a")
        gpu.fail[function] = "cudaErrorLaunchFailure"
        with pytest.raises(BackendError, match=r"(?s)cudaErrorLaunchFailure.*lost to this process: start it again"):
            buffers.run({"x": np.zeros(4, np.float32)}, FLOATS, doubling(gpu, buffers), "a")
        del gpu.fail[function]
    assert gpu.live() == {}


@pytest.mark.parametrize(
    "refuses",
    ["cudaStreamBeginCapture", "engine", "cudaStreamEndCapture", "cudaGraphInstantiate", "cudaGraphLaunch"],
)
def test_runs_go_on_where_a_recording_is_refused(monkeypatch, refuses):
    gpu = Gpu(integrated=False, fail={refuses: "cudaErrorInvalidValue"})
    install_cuda(monkeypatch, gpu)
    with StreamBuffers(open_driver(), TWO) as buffers:
        doubles = doubling(gpu, buffers)

        def compute():
            if refuses == "engine" and gpu.captures(buffers.stream):
                raise BackendError("The engine refuses.")
            doubles()

        why = []
        for n, key in enumerate(["a", "a", "a", "b", "b"]):
            result = buffers.run({"x": np.full(4, n, np.float32)}, FLOATS, compute, key)["y"]
            np.testing.assert_array_equal(result, 2 * n)
            why.append(buffers.why_no_graph)
        assert gpu.live().keys() == {"stream", "event", "host", "device"}  # nothing of a graph is left
    assert why[0] is None
    assert len(set(why[1:])) == 1
    assert ("The engine refuses" if refuses == "engine" else "cudaErrorInvalidValue") in why[1]
    assert gpu.calls["cudaStreamBeginCapture"] == 1  # not tried again, of another shape either
    assert gpu.live() == {}


def test_closing_frees_all_even_when_one_step_fails(monkeypatch):
    gpu = Gpu(integrated=False)
    install_cuda(monkeypatch, gpu)
    buffers = StreamBuffers(open_driver(), TWO)
    with pytest.raises(BackendError, match="'x' needs 20 bytes; its buffer has 16"):
        buffers.run({"x": np.zeros(5, np.float32)}, FLOATS, doubling(gpu, buffers))
    gpu.fail["cudaEventDestroy"] = "cudaErrorLaunchFailure"
    with pytest.raises(BackendError, match="to free an event"):
        buffers.close()
    assert set(gpu.live()) == {"event"}  # which could not be given back; all else was
    buffers.close()


@pytest.mark.parametrize("package", PACKAGES)
def test_memory_that_is_not_there(monkeypatch, package):
    install_cuda(monkeypatch, Gpu(memory=100, integrated=False), package)
    driver = open_driver()
    assert driver.free_bytes() == 100
    with pytest.raises(BackendError, match=r"(?s)to make 101 pinned bytes.*out of memory: end other programs"):
        driver.pinned(101, ExitStack())


def test_no_package_gives_the_pip_command(monkeypatch):
    monkeypatch.setattr(driver, "installed", lambda _: False)
    for release, extra in ((None, "gpu"), ("36.4.3", "jetson")):
        monkeypatch.setattr(driver, "jetson_release", lambda release=release: release)
        with pytest.raises(MissingExtraError, match=rf"(?s)cuda-python or pycuda.*sparsifiner-edge\[{extra}\]"):
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
        ("14.0", 13020, "14.0 needs a driver for CUDA 14, and this one takes CUDA 13.2", '"cuda-python>=12.6,<14"'),
        ("12.9.10", 11040, "12.9.10 needs a driver for CUDA 12, and this one takes CUDA 11.4", "JetPack"),
    ],
)
def test_a_package_newer_than_the_driver_says_what_to_install(monkeypatch, release, number, what, fix):
    """CUDA's own error would be cudaErrorInsufficientDriver, from the first call that needs a device."""
    install_cuda(
        monkeypatch,
        Gpu(driver=number, fail={"cudaGetDeviceCount": "cudaErrorInsufficientDriver"}),
        "cuda-python",
        release,
    )
    with pytest.raises(BackendError) as caught:
        probe()
    assert what in caught.value.what
    assert fix in caught.value.fix
    assert ("pip install" in caught.value.fix) == (number >= 12000)


@pytest.mark.parametrize(("release", "number"), [("12.9.10", 12020), ("12.6.2", 13020), ("13.4.4", 13000), ("", 12060)])
def test_a_package_runs_with_drivers_of_its_own_cuda_and_newer(monkeypatch, release, number):
    install_cuda(monkeypatch, Gpu(driver=number), "cuda-python", release)
    assert probe().name == "Orin"


def test_a_package_that_cannot_load_the_driver(tmp_path, monkeypatch):
    """cuda-python up to 12.8 raises RuntimeError from the first call; pycuda does not import."""
    module = install_cuda(monkeypatch, Gpu())

    def missing():
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    module.cudaDriverGetVersion = missing
    with pytest.raises(BackendError, match=r"No NVIDIA driver \(cuda-python 12.6.2: Failed to dlopen"):
        probe()
    install_cuda(monkeypatch, Gpu(), "pycuda")
    monkeypatch.delitem(sys.modules, "pycuda.driver")
    monkeypatch.delitem(sys.modules, "pycuda")
    for text, said in (("libcuda.so.1: cannot open", "No NVIDIA driver"), ("no module", "pycuda cannot be imported")):
        (tmp_path / "pycuda.py").write_text(f"raise ImportError({text!r})")
        monkeypatch.syspath_prepend(str(tmp_path))
        with pytest.raises(BackendError, match=said):
            probe()


def test_names_of_errors_of_both_packages_have_one_meaning():
    for name in ("cudaErrorMemoryAllocation", "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"):
        with pytest.raises(BackendError, match="out of memory: end other programs"):
            fail("p", "to run", name)
    for name in ("cudaErrorIllegalAddress", "launch failed", "invalid/unknown error code", "ECC uncorrectable"):
        with pytest.raises(BackendError, match="lost to this process"):
            fail("p", "to run", name)
    with pytest.raises(BackendError, match="Start again; if it stays"):
        fail("p", "to run", "cudaErrorInvalidValue")


@pytest.mark.skipif(not REAL, reason="cuda-python is not installed")
def test_the_fake_has_the_surface_of_the_real_package():
    """Names and numbers of parameters, as the docstrings of the real functions give them; enums by value."""
    import cuda.bindings.runtime as real

    fake = cuda_bindings(Gpu())
    for body in cuda_modules._functions(Gpu()):
        text = (getattr(real, body.__name__).__doc__ or "").split("\n")[0]
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
