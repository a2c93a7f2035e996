"""The builder for full TensorRT on a real library of the same interface: TensorRT-RTX, which builds without a GPU.

What differs is the target: full TensorRT builds for the GPU that is there, TensorRT-RTX for the one it is told.
"""

from __future__ import annotations

import types

import onnx
import pytest

from sparsifiner_edge.bundle.engines import BatchRange
from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.errors import UnsupportedModelError
from sparsifiner_edge.export.deployed_model import deploy
from sparsifiner_edge.export.fp16 import convert
from sparsifiner_edge.export.graph import export_graph
from sparsifiner_edge.runtime.cuda import CudaDevice
from sparsifiner_edge.runtime.tensorrt import build as tensorrt_build
from sparsifiner_edge.runtime.tensorrt.build import build_engine_file
from sparsifiner_edge.runtime.tensorrt.errors import Messages, make_logger
from tests.everything import first
from tests.models import student
from tests.tensorrt.engine_kernels import compiled_kernels
from tests.tiny import make_bundle

rtx = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
CARD = CudaDevice("a card that is not here", (8, 6), 12 << 30, False, "12.8")


@pytest.fixture(autouse=True)
def no_timing_cache(monkeypatch):
    """TensorRT-RTX has none."""
    for name in ("load_timing_cache", "save_timing_cache"):
        monkeypatch.setattr(tensorrt_build, name, lambda *_: None)


@pytest.fixture(scope="module")
def trt():
    """The real module, with a builder whose configurations are for compute capability 8.6."""

    class Builder:
        def __init__(self, logger):
            self._builder = rtx.Builder(logger)

        def __getattr__(self, name):
            return getattr(self._builder, name)

        def create_builder_config(self):
            config = self._builder.create_builder_config()
            config.num_compute_capabilities = 1
            assert config.set_compute_capability(rtx.ComputeCapability.SM86, 0)
            return config

    return types.SimpleNamespace(**{name: getattr(rtx, name) for name in dir(rtx)} | {"Builder": Builder})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = make_bundle(tmp_path_factory.mktemp("real") / "b", depth=2, function=True)
    return (folder / "model.onnx").read_bytes()


SOME = BatchRange(1, 2, 4)


def build(trt, model, batch=SOME):
    return build_engine_file(trt, model, CARD, 1 << 30, batch)


def test_an_engine_is_built(trt, model):
    content, details = build(trt, model)
    assert len(content) > 1000
    assert details.layers > 3


@pytest.mark.parametrize("keep", first([1.0, 0.2]))
def test_a_model_that_merges_is_parsed_and_built(trt, keep):
    """For a range of batches; dense attention over merged tokens is one fused kernel a layer."""
    sparsity = SparsityConfig(keep=keep, cells=4, channels=8, merge=(12, 2))
    deployed = deploy(student(sparsity=sparsity, depth=2))
    model = convert(export_graph(deployed, 160, None, deployed.output_names)).model.SerializeToString()
    content, details = build(trt, model)
    assert details.layers > 500
    if keep == 1:
        assert compiled_kernels(content)["fused_attention"] == 2


def test_the_parser_names_the_node(trt, model):
    bad = onnx.load_from_string(model)
    bad.graph.node[2].op_type, bad.graph.node[2].name = "NoSuchOperator", "the culprit"
    with pytest.raises(UnsupportedModelError, match=r"the culprit \(NoSuchOperator\)"):
        build(trt, bad.SerializeToString())
    with pytest.raises(UnsupportedModelError, match="cannot read the model"):
        build(trt, b"not a model")


def test_the_logger_keeps_what_is_said(trt):
    messages = Messages()
    logger = make_logger(trt, messages)
    logger.log(trt.ILogger.ERROR, "first\n line")
    logger.log(trt.ILogger.WARNING, "a warning")
    logger.log(trt.ILogger.INFO, "nothing")
    assert messages.text() == "first line"
    assert list(messages.warnings) == ["a warning"]
