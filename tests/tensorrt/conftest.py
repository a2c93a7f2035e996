"""A machine with fakes of CUDA and of a TensorRT version, for every test of this folder that asks for one."""

from __future__ import annotations

import json

import pytest

from sparsifiner_edge.bundle.engines import Details, Engine
from sparsifiner_edge.records import read_record, write_record
from sparsifiner_edge.runtime import build
from sparsifiner_edge.runtime.tensorrt.full import TensorRt
from tests.fakes.gpu import Gpu, install_cuda
from tests.fakes.tensorrt import install_tensorrt


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def sent(record, kind):
    """What a process reads of what another wrote."""
    return read_record(json.loads(json.dumps(write_record(record))), kind, "what was sent", "")


@pytest.fixture
def machine(monkeypatch):
    """A function that makes a machine, where builds run in this process."""

    def make(version="10.3", behaviour=None, **device):
        gpu = Gpu(**device)
        install_cuda(monkeypatch, gpu)
        trt = install_tensorrt(monkeypatch, gpu, version, behaviour)

        def run(engine, folder, output, timeout_s):
            return sent(TensorRt().build(sent(engine, Engine), folder, output), Details)

        monkeypatch.setattr(build, "build_candidate", run)
        return gpu, trt

    return make
