"""The CUDA layer, against a fake of cuda-python and, where no driver is, against the real one."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import os
import subprocess
import sys
from contextlib import ExitStack

import pytest

from sparsifiner_edge.errors import BackendError, MissingExtraError
from sparsifiner_edge.runtime import cuda
from sparsifiner_edge.runtime.cuda import Driver, probe
from tests.fakes.gpu import Gpu, cuda_bindings, install_cuda

REAL = importlib.util.find_spec("cuda") and importlib.util.find_spec("cuda.bindings")


def test_probe_describes_the_device(monkeypatch):
    install_cuda(monkeypatch, Gpu("NVIDIA L4", (8, 9), 24 << 30, False, 12080))
    found = probe()
    assert (found.name, found.compute_capability) == ("NVIDIA L4", "8.9")
    assert (found.memory_bytes, found.integrated, found.driver_version) == (24 << 30, False, "12.8")


def test_memory_that_is_not_there(monkeypatch):
    install_cuda(monkeypatch, Gpu(memory=100, integrated=False))
    assert Driver().free_bytes() == 100
    with ExitStack() as stack, pytest.raises(BackendError, match=r"(?s)to make 101 pinned bytes.*out of memory: end"):
        Driver().pinned(101, stack)


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
