"""Tests of full TensorRT with a fake: build settings, inference, failures and release of resources."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from sparsifiner_edge.artifacts import sha256
from sparsifiner_edge.bundle.engines import BatchRange
from sparsifiner_edge.bundle.store import open_bundle, remember_execution
from sparsifiner_edge.errors import BackendError, ConfigError, GateError
from sparsifiner_edge.export.export import ExportOptions, export_student
from sparsifiner_edge.runtime import bisect
from sparsifiner_edge.runtime.build import build_engine
from sparsifiner_edge.runtime.golden import check_golden
from sparsifiner_edge.runtime.tensorrt.full import TensorRt
from tests.commands import assert_refused, call, snapshot
from tests.fakes.gpu import install_pycuda
from tests.fakes.tensorrt import Behaviour
from tests.flat import open_session
from tests.models import student
from tests.tensorrt.conftest import sent

CARD = {"name": "NVIDIA GeForce RTX 4060", "sm": (8, 9), "integrated": False}


def image(batch=1, seed=5):
    return np.random.default_rng(seed).integers(0, 256, (batch, 4, 4, 3), dtype=np.uint8)


@pytest.fixture
def built(tiny, machine):
    """A bundle with an engine, the GPU, and the behaviour of its TensorRT."""
    gpu, behaviour = machine()
    build_engine(tiny, "tensorrt")
    behaviour.seen.clear()
    gpu.calls.clear()
    return tiny, gpu, behaviour


@pytest.mark.parametrize("device", [{}, CARD])
def test_build_and_run(tiny, machine, device):
    gpu, behaviour = machine(**device)
    (engine,) = build_engine(tiny, "tensorrt").engines
    capability = "8.9" if device else "8.7"
    assert (engine.compute_capability, engine.version, engine.details.kernels) == (capability, "10.3.0", "bodies")
    assert engine.details.chosen.golden["features"]["range_relative_error"] <= 1e-5
    assert open_bundle(tiny).manifest.files[engine.file] == sha256(tiny / engine.file)
    assert behaviour.seen["cleared"] == "TF32"
    assert behaviour.seen["WORKSPACE"] == (8 << 30) // 4 * (3 if device else 2)
    images = image(3)
    with open_session(tiny) as session, open_session(tiny, "onnxruntime") as reference:
        wanted = reference.infer({"image": images})["features"]
        np.testing.assert_allclose(session.infer({"image": images})["features"], wanted, rtol=1e-5)
        described = session.description
        assert (session.inputs, session.outputs) == (reference.inputs, reference.outputs)
        assert session.compute_ms == 2.0
        assert check_golden(session, open_bundle(tiny))
    assert described.device == f"{device.get('name', 'Orin')} (compute capability {capability})"
    assert (described.why_no_graph, described.kernels) == (None, "function bodies")
    assert gpu.live() == {}


def test_an_engine_comes_before_the_processor_where_what_was_found_does_not_run(built):
    folder, gpu, _ = built
    remember_execution(folder, "tensorrt-rtx")
    with open_session(folder) as session:
        assert session.backend == "tensorrt"
        assert "intended for tensorrt-rtx: " in session.description.chosen
    with open_session(folder, kernels="portable") as session:
        assert session.backend == "onnxruntime"
    assert gpu.live() == {}


def test_batches_are_those_asked_for(tiny, machine):
    gpu, _ = machine(**CARD)
    (engine,) = build_engine(tiny, "tensorrt", batch=(2, 3, 4)).engines
    assert engine.batch == BatchRange(2, 3, 4)
    with open_session(tiny, "tensorrt") as session:
        assert check_golden(session, open_bundle(tiny))["features"]["range_relative_error"] < 1e-5  # repeated
        for size in (2, 4, 3):
            assert session.infer({"image": image(size)})["features"].shape == (size, 8)
        with pytest.raises(BackendError, match="'image' got 5 on axis 0; this engine takes 2 to 4"):
            session.infer({"image": image(5)})
        with pytest.raises(BackendError, match="got float32"):
            session.infer({"image": image(2).astype(np.float32)})
    assert gpu.live() == {}


def test_the_second_run_of_a_shape_is_a_graph(built):
    folder, gpu, behaviour = built
    with open_session(folder, "tensorrt") as session, open_session(folder, "onnxruntime") as reference:
        for seed, batch in enumerate((2, 2, 2, 2, 1, 2, 2)):
            images = {"image": image(batch, seed)}
            wanted = reference.infer(images)["features"]
            np.testing.assert_allclose(session.infer(images)["features"], wanted, rtol=1e-5)
            # It is invalid for another shape.
            assert gpu.live().get("executable graph", 0) == (seed in (1, 2, 3, 6))
    assert behaviour.seen["runs"] == 5  # the plain ones and those captured in a graph
    assert gpu.calls["cudaGraphLaunch"] == 4
    assert gpu.live() == {}


@pytest.mark.parametrize("refuses", ["enqueue to record", "cudaGraphLaunch"])
def test_runs_go_on_where_a_recording_is_refused(built, machine, refuses):
    gpu, _ = machine(integrated=False, fail={refuses: "cudaErrorInvalidValue"})
    with open_session(built[0], "tensorrt") as session:
        assert session.description.why_no_graph is None
        results = [session.infer({"image": image(batch)})["features"][0] for batch in (1, 1, 1, 2, 2)]
        assert "cudaErrorInvalidValue" in session.description.why_no_graph
        assert gpu.live().keys() == {"ICudaEngine", "IExecutionContext", "stream", "event", "host", "device"}
    for result in results[1:3]:
        np.testing.assert_array_equal(result, results[0])
    assert gpu.calls["cudaStreamBeginCapture"] == 1  # not tried again, for another shape neither
    assert gpu.live() == {}


@pytest.mark.parametrize("integrated", [True, False])
def test_pycuda_runs_without_graphs_and_in_one_thread(tiny, machine, monkeypatch, integrated):
    gpu, _ = machine(integrated=integrated)
    install_pycuda(monkeypatch, gpu)
    build_engine(tiny, "tensorrt")
    with open_session(tiny, "tensorrt") as session:
        assert check_golden(session, open_bundle(tiny))
        assert session.compute_ms == 2.0
        assert "pycuda has no cudaStreamBeginCapture" in session.description.why_no_graph
        with ThreadPoolExecutor(1) as pool, pytest.raises(BackendError, match="only in the thread that used it first"):
            pool.submit(session.infer, {"image": image()}).result()
    gpu.fail["cudaHostAlloc"] = "cudaErrorMemoryAllocation"
    with pytest.raises(BackendError, match=r"(?s)pycuda 2026.1.*end other programs on it"):
        open_session(tiny, "tensorrt")
    gc.collect()
    assert gpu.live() == {}


def test_an_engine_whose_recorded_runs_alone_give_something_else_is_not_kept(tiny, machine, monkeypatch):
    gpu, _ = machine()
    launch = gpu.launch

    def wrong(executable, stream):
        launch(executable, stream)
        for _, block in gpu.taken.values():
            ctypes.memset(block, 63, len(block))

    monkeypatch.setattr(gpu, "launch", wrong)
    with pytest.raises(GateError, match="differs from golden"):
        build_engine(tiny, "tensorrt")
    assert not (tiny / "engines").exists()
    assert gpu.live() == {}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"fail": {"context": "Cuda Runtime (out of memory)"}}, r"(?s)to prepare a run.*Close other pr"),
        ({"memory": 300}, "out of memory"),
        ({"fail": {"cudaStreamCreateWithFlags": "cudaErrorMemoryAllocation"}}, "out of memory"),
        ({"fail": {"cudaMalloc": "cudaErrorMemoryAllocation"}, "integrated": False}, "out of memory"),
    ],
)
def test_a_failure_while_opening_leaves_nothing(built, machine, change, said):
    gpu, _ = machine(**change)
    with pytest.raises(BackendError, match=said):
        open_session(built[0], "tensorrt")
    assert gpu.live() == {}


def test_closing_frees_all_even_when_one_step_fails(built):
    folder, gpu, _ = built
    session = open_session(folder, "tensorrt")
    gpu.fail["cudaEventDestroy"] = "cudaErrorLaunchFailure"
    with pytest.raises(BackendError, match="to free an event"):
        session.close()
    assert set(gpu.live()) == {"event"}  # which could not be released; everything else was


@pytest.mark.parametrize("at", ["first", "graph"])
def test_a_lost_device_is_a_message_and_all_is_let_go(built, at):
    folder, gpu, _ = built
    session = open_session(folder, "tensorrt")
    if at == "graph":
        for _ in range(3):
            session.infer({"image": image()})
    gpu.fail["cudaGraphLaunch" if at == "graph" else "enqueue"] = "cudaErrorIllegalAddress"
    with pytest.raises(BackendError, match=r"This process lost the device\. Restart the process"):
        session.infer({"image": image()})
    with pytest.raises(BackendError, match="This process lost the device"):
        session.close()
    session.close()


def test_a_run_that_fails_says_what_tensorrt_said(built):
    folder, gpu, _ = built
    with open_session(folder, "tensorrt") as session:
        gpu.fail["enqueue"] = "Error Code 3: API Usage Error (Neither address nor allocator is set)"
        with pytest.raises(BackendError, match=r"TensorRT fails to run .*Neither address nor allocator"):
            session.infer({"image": image()})
        gpu.fail.clear()
        assert check_golden(session, open_bundle(folder))
    session.close()
    with pytest.raises(BackendError, match="closed"):
        session.infer({"image": image()})
    assert gpu.live() == {}


def test_it_builds_for_this_gpu_alone(tiny, machine):
    machine()
    with pytest.raises(ConfigError, match=r"(?s)Orin, 8.7\), not for 8.9.*tensorrt-rtx, which builds ahead of time"):
        build_engine(tiny, "tensorrt", compute_capabilities=["8.7", "8.9"])


@pytest.mark.parametrize(
    ("error", "warnings", "message"),
    [
        ("No implementation for node", ["Device memory is insufficient memory to use tactic"], "ran out of memory"),
        ("Internal Error: assertion failed", [], "10.3.0 built no engine: Internal Error: assertion failed"),
        ("", [], "TensorRT gave no reason"),
    ],
)
def test_a_build_that_fails_is_translated_and_changes_nothing(tiny, machine, error, warnings, message):
    gpu, _ = machine(behaviour=Behaviour(warnings=warnings), fail={"build": error})
    before = snapshot(tiny)
    with pytest.raises(BackendError, match=message):
        build_engine(tiny, "tensorrt")
    assert snapshot(tiny) == before
    assert gpu.live() == {}


def test_the_timing_cache_is_kept_by_device_and_version(tiny, tmp_path, machine, monkeypatch):
    """A damaged cache is ignored, and a read-only disk does not fail the build."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    _, behaviour = machine()
    build_engine(tiny, "tensorrt")
    (cache,) = (tmp_path / "cache" / "sparsifiner-edge").iterdir()
    assert cache.name == "tensorrt-10.3.0-sm87-orin.cache"
    for content, used in ((cache.read_bytes(), b"times of a build"), (b"cut", b"times of nothing")):
        cache.write_bytes(content)
        build_engine(tiny, "tensorrt")
        assert behaviour.seen["timing cache"] == used
        assert cache.read_bytes() == b"times of a build"
    cache.unlink()
    cache.parent.rmdir()
    cache.parent.write_text("a file in the place of the folder")
    assert build_engine(tiny, "tensorrt").engines


def test_no_cuda_no_tensorrt_object(tiny, machine):
    gpu, _ = machine(count=0)
    with pytest.raises(BackendError, match="CUDA finds no device"):
        build_engine(tiny, "tensorrt")
    assert set(gpu.calls) <= {"cudaDriverGetVersion", "cudaGetDeviceCount"}


def test_bisecting_names_the_first_layer_that_an_engine_has_otherwise(tmp_path, machine, monkeypatch, capsys):
    """An engine with other weights in the third layer, and one that is right."""
    machine()
    folder = export_student(student(depth=4), tmp_path / "b", ExportOptions())
    monkeypatch.setattr(bisect, "start_child", lambda *_: contextlib.nullcontext(SimpleNamespace(ask=ask)))

    def ask(operation, timeout_s, form, **arguments):
        assert (operation, timeout_s) == ("bisect", 1800.0)
        return sent(bisect._bisect(**arguments), form)

    before, line = snapshot(folder), ("build", folder, "--backend", "tensorrt", "--bisect")
    out = call(capsys, *line)
    assert (out.code, out.out.splitlines()[-1]) == (0, "First layer beyond its tolerance: none"), out
    right = TensorRt.compile

    def wrong(self, model, engine, bundle):
        (node,) = [n for n in model.graph.node if n.name == "blocks.2.mlp.fc2.MatMul"]
        (weight,) = [t for t in model.graph.initializer if t.name == node.input[1]]
        weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) + 1, weight.name))
        return right(self, model, engine, bundle)

    monkeypatch.setattr(TensorRt, "compile", wrong)
    out = call(capsys, *line, "--json")
    layers = json.loads(out.out)["layers"]
    assert (out.code, [layer["beyond"] for layer in layers]) == (1, [False, False, True, True])
    assert call(capsys, *line).out.splitlines()[-1] == "First layer beyond its tolerance: blocks.2"
    assert snapshot(folder) == before
    line = ("build", folder, "--bisect", "--backend")
    assert_refused(call(capsys, *line, "onnxruntime"), "onnxruntime builds no engine")
    assert_refused(call(capsys, *line, "tensorrt", "--kernels", "native"), "cannot be combined with --kernels")
