"""Running engines of full TensorRT, on fakes of each recorded version: results, graphs, and what is given back."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from sparsifiner_edge.artifacts import sha256
from sparsifiner_edge.bundle.engines import BatchRange, Engine
from sparsifiner_edge.bundle.golden import check_golden
from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.errors import BackendError, GateError
from sparsifiner_edge.runtime import open_session
from sparsifiner_edge.runtime.build import build_engine
from sparsifiner_edge.runtime.tensorrt.full import TensorRt
from tests.fakes.record_tensorrt import VERSIONS
from tests.fakes.tensorrt import Behaviour
from tests.tiny import make_bundle

CARD = {"name": "NVIDIA GeForce RTX 4060", "sm": (8, 9), "integrated": False}


def image(batch=1, size=4):
    return np.random.default_rng(5).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)


def built_engine(folder) -> Engine:
    build_engine(folder, "tensorrt")
    return open_bundle(folder).manifest.engines[0]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("package", ["cuda-python", "pycuda"])
def test_build_and_run(tmp_path, machine, version, package):
    behaviour = Behaviour()
    gpu, trt = machine(version, behaviour, package)
    folder = make_bundle(tmp_path / "b")
    steps = []
    result = build_engine(folder, "tensorrt", progress=lambda *step: steps.append(step))
    (engine,) = result.engines
    assert engine.compute_capability == "8.7"
    assert engine.version == trt.__version__
    assert engine.details.kernels == "bodies"
    assert engine.details.golden["features"]["range_relative_error"] <= 1e-5
    assert open_bundle(folder).manifest.files[engine.file] == sha256(folder / engine.file)
    assert behaviour.seen["cleared"] == {"TF32"}
    assert "flags" not in behaviour.seen
    assert behaviour.seen["WORKSPACE"] == engine.details.workspace_bytes == (8 << 30) // 2
    assert [step[1:] for step in steps if step[0].endswith(": Build")] == [(0, 2), (1, 2), (2, 2), (2, 2)]
    assert any("Tactics" in step[0] for step in steps)
    assert not any("One" in step[0] for step in steps)  # the third level
    images = image(3)
    with open_session(folder, "tensorrt") as session, open_session(folder) as reference:
        np.testing.assert_allclose(
            session.infer({"image": images})["features"], reference.infer({"image": images})["features"], rtol=1e-5
        )
        described = session.description
        assert session.inputs == reference.inputs
        assert session.outputs == reference.outputs
        assert session.last_times.compute_ms == 2.0
        assert check_golden(session, open_bundle(folder))
    assert described.device == "Orin (compute capability 8.7)"
    assert described.graph is (package == "cuda-python")
    assert (described.zero_copy, described.memory) == (True, "mapped")
    assert described.kernels == "function bodies"
    assert gpu.live() == {}


def test_batches_are_those_asked_for(tmp_path, machine):
    gpu, _ = machine(**CARD)
    folder = make_bundle(tmp_path / "b")
    (engine,) = build_engine(folder, "tensorrt", batch=(1, 3, 4)).engines
    assert engine.batch == BatchRange(1, 3, 4)
    with open_session(folder, "tensorrt") as session:
        for size in (1, 4, 3):
            assert session.infer({"image": image(size)})["features"].shape == (size, 8)
        with pytest.raises(BackendError, match="'image' got 5 on axis 0; this engine takes 1 to 4"):
            session.infer({"image": image(5)})
        with pytest.raises(BackendError, match="got type float32"):
            session.infer({"image": image(2).astype(np.float32)})
    assert gpu.live() == {}


def test_the_golden_pair_fills_the_least_batch(tmp_path, machine):
    machine(**CARD)
    folder = make_bundle(tmp_path / "b")
    (engine,) = build_engine(folder, "tensorrt", batch=(3, 3, 4)).engines
    assert engine.details.golden["features"]["range_relative_error"] < 1e-5
    with open_session(folder, "tensorrt") as session:
        assert check_golden(session, open_bundle(folder))["features"]["range_relative_error"] < 1e-5
        with pytest.raises(BackendError, match="'image' got 2 on axis 0; this engine takes 3 to 4"):
            session.infer({"image": image(2)})


def test_a_fixed_batch_needs_no_profile(tmp_path, machine):
    behaviour = Behaviour()
    machine(behaviour=behaviour)
    folder = make_bundle(tmp_path / "b", batch=1)
    build_engine(folder, "tensorrt")
    assert "profile" not in behaviour.seen
    with open_session(folder, "tensorrt") as session:
        assert session.infer({"image": image()})["features"].shape == (1, 8)


def test_the_second_run_of_a_shape_is_a_graph(tmp_path, machine):
    behaviour = Behaviour()
    gpu, _ = machine(behaviour=behaviour)
    folder = make_bundle(tmp_path / "b")
    build_engine(folder, "tensorrt")
    behaviour.seen.clear()
    with open_session(folder, "tensorrt") as session:
        results = [session.infer({"image": image(2)})["features"] for _ in range(5)]
        assert behaviour.seen["runs"] == 2  # the first, and the one that was recorded
        assert gpu.calls["cudaGraphLaunch"] >= 4
        session.infer({"image": image(1)})
        assert gpu.live().get("executable graph") is None  # of another shape, so no longer valid
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])
    assert gpu.live() == {}


def test_an_engine_that_cannot_be_recorded_runs_and_says_so(tmp_path, machine):
    behaviour = Behaviour(recordable=False)
    gpu, _ = machine(behaviour=behaviour)
    folder = make_bundle(tmp_path / "b")
    build_engine(folder, "tensorrt")
    with open_session(folder, "tensorrt") as session:
        assert session.description.graph is True
        results = [session.infer({"image": image()})["features"] for _ in range(4)]
        assert session.description.graph is False
        assert "not permitted while captured" in session.description.why_no_graph
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])
    assert gpu.calls["cudaGraphLaunch"] == 0
    assert gpu.live() == {}


def test_an_engine_whose_recorded_runs_give_something_else_is_not_kept(tmp_path, machine, monkeypatch):
    gpu, _ = machine()
    folder = make_bundle(tmp_path / "b")
    launch = gpu.launch

    def wrong(executable, stream):
        launch(executable, stream)
        for block, size, _ in gpu._blocks.values():
            ctypes.memset(block, 63, size)

    monkeypatch.setattr(gpu, "launch", wrong)
    with pytest.raises(GateError, match="differs from golden"):
        build_engine(folder, "tensorrt")
    assert open_bundle(folder).manifest.engines == ()


@pytest.mark.parametrize("version", VERSIONS)
def test_layers_tell_their_times(tmp_path, machine, version):
    behaviour = Behaviour()
    machine(version, behaviour)
    folder = make_bundle(tmp_path / "b")
    build_engine(folder, "tensorrt")
    with open_session(folder, "tensorrt") as session:
        before = [session.infer({"image": image()})["features"] for _ in range(3)]
        behaviour.seen.clear()
        rows = session.layer_times({"image": image()}, 4)
        assert behaviour.seen["runs"] == 4  # each by itself: a graph's launch tells nothing
        assert [row["ms"] for row in rows] == pytest.approx([0.5 + number for number in range(len(rows))])
        assert len({row["name"] for row in rows}) == len(rows) > 1
        np.testing.assert_array_equal(session.infer({"image": image()})["features"], before[0])


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ({"version": "10.7"}, "built by tensorrt 10.3.0, installed is 10.7.0"),
        ({"sm": (11, 0), "name": "Thor"}, "built for compute capability 8.7, Thor has 11.0"),
    ],
)
def test_an_engine_for_another_machine_is_refused_unopened(tmp_path, machine, now, message):
    machine()
    folder = make_bundle(tmp_path / "b")
    build_engine(folder, "tensorrt")
    behaviour = Behaviour()
    machine(behaviour=behaviour, **now)
    with pytest.raises(BackendError, match=f"(?s){message}.*sparsifiner-edge build"):
        open_session(folder, "tensorrt")
    assert behaviour.seen == {}  # nothing was deserialised


def test_a_version_compatible_engine_runs_on_a_later_version(tmp_path, machine):
    machine("10.3")
    folder = make_bundle(tmp_path / "b")
    build_engine(folder, "tensorrt", options={"version_compatible": True})
    machine("10.16")
    with open_session(folder, "tensorrt") as session:
        assert check_golden(session, open_bundle(folder))
    machine("11.4")
    with pytest.raises(BackendError, match=r"installed is 11\.4"):
        open_session(folder, "tensorrt")


def test_a_damaged_engine_is_a_message(tmp_path, machine):
    gpu, _ = machine()
    folder = make_bundle(tmp_path / "b")
    engine = built_engine(folder)
    path = tmp_path / "cut.engine"
    path.write_bytes((folder / engine.file).read_bytes()[:40])
    with pytest.raises(BackendError, match=r"(?s)was built by another version or is damaged.*build it again"):
        TensorRt().open_engine(path, engine, open_bundle(folder))
    assert gpu.live() == {}


def test_no_memory_for_a_context(tmp_path, machine):
    machine()
    folder = make_bundle(tmp_path / "b")
    build_engine(folder, "tensorrt")
    gpu, _ = machine(behaviour=Behaviour(context=("Error Code 1: Cuda Runtime (out of memory)",)))
    with pytest.raises(BackendError, match=r"(?s)fails to prepare a run.*MiB are free.*Close other programs"):
        open_session(folder, "tensorrt")
    assert gpu.live() == {}


def test_no_memory_for_buffers(tmp_path, machine):
    machine(**CARD)
    folder = make_bundle(tmp_path / "b")
    build_engine(folder, "tensorrt")
    gpu, _ = machine(**CARD, memory=300)
    with pytest.raises(BackendError, match="out of memory"):
        open_session(folder, "tensorrt")
    assert gpu.live() == {}


@pytest.mark.parametrize("at", ["first", "graph"])
def test_a_lost_device_is_a_message_and_all_is_let_go(tmp_path, machine, at):
    gpu, _ = machine()
    folder = make_bundle(tmp_path / "b")
    build_engine(folder, "tensorrt")
    session = open_session(folder, "tensorrt")
    if at == "graph":
        for _ in range(3):
            session.infer({"image": image()})
        gpu.fail["cudaGraphLaunch"] = "cudaErrorIllegalAddress"
    else:
        gpu.fail["enqueue"] = "cudaErrorIllegalAddress"
    with pytest.raises(BackendError, match="device is lost to this process: start it again"):
        session.infer({"image": image()})
    with pytest.raises(BackendError):
        session.infer({"image": image()})
    with pytest.raises(BackendError, match="lost to this process"):
        session.close()
    session.close()


def test_a_run_that_fails_says_what_tensorrt_said(tmp_path, machine):
    behaviour = Behaviour()
    gpu, _ = machine(behaviour=behaviour)
    folder = make_bundle(tmp_path / "b")
    build_engine(folder, "tensorrt")
    with open_session(folder, "tensorrt") as session:
        behaviour.enqueue = ("Error Code 3: API Usage Error (Neither address nor allocator is set)",)
        with pytest.raises(BackendError, match=r"TensorRT fails to run .*Neither address nor allocator"):
            session.infer({"image": image()})
        behaviour.enqueue = None
        assert check_golden(session, open_bundle(folder))
    assert gpu.live() == {}


def test_a_closed_session_refuses(tmp_path, machine):
    machine()
    folder = make_bundle(tmp_path / "b")
    build_engine(folder, "tensorrt")
    session = open_session(folder, "tensorrt")
    session.close()
    session.close()
    for call in (session.infer, lambda inputs: session.layer_times(inputs, 1)):
        with pytest.raises(BackendError, match="closed"):
            call({"image": image()})


def test_a_bundle_without_engines_says_how_to_build(tmp_path, machine):
    machine()
    with pytest.raises(BackendError, match=r"(?s)no engine for tensorrt.*build .* --backend tensorrt"):
        open_session(make_bundle(tmp_path / "b"), "tensorrt")
    with pytest.raises(BackendError, match="native kernels are the processor's"):
        open_session(make_bundle(tmp_path / "c"), "tensorrt", kernels="native")
