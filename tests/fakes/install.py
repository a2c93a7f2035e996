"""Puts fakes in the place of packages for one test."""

from __future__ import annotations

import ctypes
import sys
import types
from typing import Any

import pytest

from sparsifiner_edge.runtime.cuda import driver, support
from sparsifiner_edge.runtime.tensorrt import plugin as tensorrt_plugin
from tests.fakes.cuda_modules import cuda_bindings, pycuda_driver
from tests.fakes.gpu import Gpu
from tests.fakes.tensorrt import Behaviour, make_plugin_module, make_tensorrt


def install_cuda(
    monkeypatch: pytest.MonkeyPatch, gpu: Gpu, package: str = "cuda-python", release: str = "12.6.2"
) -> Any:
    """The fake of a CUDA package, and nothing of the other; returns the module. `release`: of cuda-python."""
    module = {"cuda-python": "cuda.bindings", "pycuda": "pycuda"}[package]
    monkeypatch.setattr(driver, "installed", lambda name: name == module)
    if package == "cuda-python":
        made = cuda_bindings(gpu)
        parent = types.ModuleType("cuda.bindings")
        parent.__version__ = release
        monkeypatch.setitem(sys.modules, "cuda", types.ModuleType("cuda"))
        monkeypatch.setitem(sys.modules, "cuda.bindings", parent)
        monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", made)
    else:
        made = pycuda_driver(gpu)
        monkeypatch.setitem(sys.modules, "pycuda", types.ModuleType("pycuda"))
        monkeypatch.setitem(sys.modules, "pycuda.driver", made)
    return made


def install_driver(monkeypatch: pytest.MonkeyPatch, number: int, status: int = 0) -> None:
    """A driver's library that supports CUDA up to `number`, such as 12060, or gives an error."""

    def version(pointer: Any) -> int:
        pointer._obj.value = number
        return status

    def load(name: str) -> Any:
        assert name == "libcuda.so.1"
        return types.SimpleNamespace(cuDriverGetVersion=version)

    monkeypatch.setattr(support, "ctypes", types.SimpleNamespace(c_int=ctypes.c_int, byref=ctypes.byref, CDLL=load))


def install_tensorrt(
    monkeypatch: pytest.MonkeyPatch, gpu: Gpu, version: str = "10.3", behaviour: Behaviour | None = None
) -> Any:
    """The fake of a TensorRT version; returns the module."""
    made = make_tensorrt(version, gpu, behaviour)
    monkeypatch.setitem(sys.modules, "tensorrt", made)
    plugin = make_plugin_module(version, behaviour.seen if behaviour else {})
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", plugin)
    monkeypatch.setattr(tensorrt_plugin, "_registered", set())
    return made
