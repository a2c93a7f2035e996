"""Fixtures with fakes of CUDA and of a TensorRT version."""

from __future__ import annotations

import json

import pytest

from sparsifiner_edge.bundle.engines import Details, Engine
from sparsifiner_edge.records import read_record, write_record
from sparsifiner_edge.runtime import build
from sparsifiner_edge.runtime.tensorrt.full import TensorRt
from tests.fakes.gpu import Gpu, install_cuda
from tests.fakes.tensorrt import Behaviour, install_tensorrt


def sent(record, kind):
    """Return data as another process would receive it."""
    return read_record(json.loads(json.dumps(write_record(record))), kind, "what was sent", "")


@pytest.fixture
def machine(monkeypatch):
    """Return a function that makes a GPU and its TensorRT's behaviour; builds run in this process."""

    def make(version="10.3", behaviour=None, **device):
        gpu, behaviour = Gpu(**device), behaviour or Behaviour()
        install_cuda(monkeypatch, gpu)
        install_tensorrt(monkeypatch, gpu, version, behaviour)

        def run(engine, folder, output, timeout_s):
            return sent(TensorRt().build(sent(engine, Engine), folder, output), Details)

        monkeypatch.setattr(build, "build_variant", run)
        return gpu, behaviour

    return make
