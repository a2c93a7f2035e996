"""Full TensorRT, against a fake of each recorded version: what it is told, and what comes of what goes wrong."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import onnx
import pytest

from sparsifiner_edge.artifacts import open_bundle, sha256
from sparsifiner_edge.errors import BackendError, ConfigError, GateError, MissingExtraError, UnsupportedModelError
from sparsifiner_edge.runtime import build as build_module
from sparsifiner_edge.runtime import check_golden, open_session
from sparsifiner_edge.runtime.build import build_engine
from sparsifiner_edge.runtime.engines import AMPERE_PLUS, VERSION_COMPATIBLE
from sparsifiner_edge.runtime.tensorrt import full as tensorrt
from sparsifiner_edge.runtime.tensorrt.build import TimingCache, timing_cache_path, workspace_bytes
from tests.fakes.gpu import Gpu
from tests.fakes.install import install_cuda, install_tensorrt
from tests.fakes.record_tensorrt import VERSIONS
from tests.fakes.tensorrt import Behaviour
from tests.test_runtime import spoil_golden
from tests.tiny import make_bundle

CARD = {"name": "NVIDIA GeForce RTX 4060", "sm": (8, 9), "integrated": False}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def machine(monkeypatch):
    """A function that makes a machine: fakes of CUDA and of a TensorRT version, and builds in this process."""

    def make(version="10.3", behaviour=None, package="cuda-python", **device):
        gpu = Gpu(**device)
        install_cuda(monkeypatch, gpu, package)
        trt = install_tensorrt(monkeypatch, gpu, version, behaviour)
        run = lambda job, timeout, progress=None: tensorrt.build(job, progress or (lambda *_: None))  # noqa: E731
        monkeypatch.setattr(build_module, "run_job", run)
        return gpu, trt

    return make


def image(batch=1, size=4):
    return np.random.default_rng(5).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("package", ["cuda-python", "pycuda"])
def test_build_and_run(tmp_path, machine, version, package):
    behaviour = Behaviour()
    gpu, trt = machine(version, behaviour, package)
    folder = make_bundle(tmp_path / "b")
    told = []
    result = build_engine(folder, "tensorrt", progress=lambda *step: told.append(step))
    (engine,) = result["engines"]
    assert engine["compute_capability"] == "8.7"
    assert engine["version"] == trt.__version__
    assert engine["details"]["kernels"] == "bodies"
    assert engine["details"]["golden"]["features"]["range_relative_error"] <= 1e-5
    assert open_bundle(folder)["files"][engine["file"]] == sha256(folder / engine["file"])
    assert behaviour.seen["cleared"] == {"TF32"}
    assert "flags" not in behaviour.seen
    assert behaviour.seen["WORKSPACE"] == engine["details"]["workspace_bytes"] == (8 << 30) // 2
    assert [step[1:] for step in told if step[0].endswith(": Build")] == [(0, 2), (1, 2), (2, 2), (2, 2)]
    assert any("Tactics" in step[0] for step in told)
    assert not any("One" in step[0] for step in told)  # the third level
    pictures = image(3)
    with open_session(folder, "tensorrt") as session, open_session(folder) as reference:
        np.testing.assert_allclose(
            session.infer({"image": pictures})["features"], reference.infer({"image": pictures})["features"], rtol=1e-5
        )
        described = session.description
        assert session.inputs == reference.inputs
        assert session.outputs == reference.outputs
        assert session.last_times.compute_ms == 2.0
        assert session.layers()["Layers"][0] == "Cast"
        assert check_golden(session, folder)
    assert described["device"] == "Orin (compute capability 8.7)"
    assert described["graph"] is (package == "cuda-python")
    assert described["zero_copy"] is True
    assert described["kernels"] == "function bodies"
    assert gpu.live() == {}


def test_batches_are_those_asked_for(tmp_path, machine):
    gpu, _ = machine(**CARD)
    folder = make_bundle(tmp_path / "b")
    (engine,) = build_engine(folder, "tensorrt", batch=(1, 3, 4))["engines"]
    assert engine["batch"] == {"least": 1, "best": 3, "most": 4}
    with open_session(folder, "tensorrt") as session:
        for size in (1, 4, 3):
            assert session.infer({"image": image(size)})["features"].shape == (size, 8)
        with pytest.raises(BackendError, match="'image' got 5 on axis 0; this engine takes 1 to 4"):
            session.infer({"image": image(5)})
        with pytest.raises(BackendError, match="got type float32"):
            session.infer({"image": image(2).astype(np.float32)})
    assert gpu.live() == {}


def test_a_fixed_batch_needs_no_profile(tmp_path, machine):
    behaviour = Behaviour()
    machine(behaviour=behaviour)
    folder = make_bundle(tmp_path / "b", batch=1)
    build_engine(folder, "tensorrt")
    assert "profile" not in behaviour.seen
    with open_session(folder, "tensorrt") as session:
        assert session.infer({"image": image()})["features"].shape == (1, 8)


def test_only_the_batch_may_be_dynamic(tmp_path, machine):
    machine()
    folder = make_bundle(tmp_path / "b")
    model = onnx.load(folder / "model.onnx")
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "height"
    onnx.save(model, folder / "model.onnx")
    from tests.test_runtime import reseal

    reseal(folder)
    with pytest.raises(ConfigError, match=r"shape \[-1, -1, 4, 3\]: only the batch may be dynamic"):
        build_engine(folder, "tensorrt")


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


def test_options_reach_the_builder(tmp_path, machine):
    behaviour = Behaviour()
    _, trt = machine("10.16", behaviour, **CARD)
    folder = make_bundle(tmp_path / "b")
    options = {
        "optimisation_level": 5, "workspace_mib": 64, "version_compatible": True, "hardware_compatible": True,
        "timing_cache": False, "detailed": True,
    }  # fmt: skip
    (engine,) = build_engine(folder, "tensorrt", options=options)["engines"]
    assert behaviour.seen["builder_optimization_level"] == 5
    assert behaviour.seen["WORKSPACE"] == 64 << 20
    assert behaviour.seen["flags"] == {"VERSION_COMPATIBLE"}
    assert behaviour.seen["hardware_compatibility_level"] == trt.HardwareCompatibilityLevel.AMPERE_PLUS
    assert behaviour.seen["profiling_verbosity"] == trt.ProfilingVerbosity.DETAILED
    assert engine["compatible"] == [VERSION_COMPATIBLE, AMPERE_PLUS]
    assert engine["details"]["timing_cache"] == "not used"
    assert not (tmp_path / "cache").exists()
    with open_session(folder, "tensorrt"):
        assert behaviour.seen["host code"] is True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speed": 1}, "no option 'speed'"),
        ({"detailed": 1}, "option detailed is 1"),
        ({"optimisation_level": 6}, "optimisation_level is 6"),
        ({"workspace_mib": 0}, "workspace_mib is 0"),
        ({"kernels": "fast"}, "kernels is 'fast'"),
        ({"hardware_compatible": True}, "Orin is a Jetson's"),
    ],
)
def test_options_are_checked_before_anything_is_built(tmp_path, machine, options, message):
    behaviour = Behaviour()
    machine(behaviour=behaviour)
    with pytest.raises(ConfigError, match=message):
        build_engine(make_bundle(tmp_path / "b"), "tensorrt", options=options)
    assert behaviour.seen == {}


def test_an_older_card_has_no_hardware_compatibility(tmp_path, machine):
    machine(name="Tesla T4", sm=(7, 5), integrated=False)
    with pytest.raises(ConfigError, match="Tesla T4 is an older"):
        build_engine(make_bundle(tmp_path / "b"), "tensorrt", options={"hardware_compatible": True})


def test_another_gpu_is_refused(tmp_path, machine):
    machine()
    with pytest.raises(ConfigError, match=r"(?s)Orin, 8.7\), not for 8.9.*tensorrt-rtx, which builds ahead of time"):
        build_engine(make_bundle(tmp_path / "b"), "tensorrt", compute_capabilities=["8.7", "8.9"])


BUILD_FAILURES = [
    (
        ("Error Code 10: Could not find any implementation for node {ForeignNode[a...b]}.",),
        ("Tactic Device request: 3221225472 bytes Available: 100. Device memory is insufficient memory to use tactic",),
        "ran out of memory while building",
    ),
    (
        ("[virtualMemoryBuffer.cpp] Error Code 2: OutOfMemory (Requested size was 524288000 bytes.)",),
        (),
        "wanted 500 MiB",
    ),
    (
        ("Error Code 10: Internal Error (Could not find any implementation for node /blocks.0/MatMul.)",),
        (),
        "has no implementation for node /blocks.0/MatMul",
    ),
    (("Internal Error: assertion failed",), (), r"TensorRT built no engine: Internal Error: assertion failed"),
    ((), (), "TensorRT gave no reason"),
]


@pytest.mark.parametrize(("errors", "warnings", "message"), BUILD_FAILURES)
def test_a_build_that_fails_is_translated_and_changes_nothing(tmp_path, machine, errors, warnings, message):
    gpu, _ = machine(behaviour=Behaviour(build=errors, warnings=warnings))
    folder = make_bundle(tmp_path / "b")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(BackendError, match=message):
        build_engine(folder, "tensorrt")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert gpu.live() == {}


def test_the_parser_names_the_nodes(tmp_path, machine):
    machine(behaviour=Behaviour(refuse=("ReduceMean", "Double")))
    with pytest.raises(UnsupportedModelError, match=r"\(Double\) in SparseAttention.*; node .*ReduceMean.*registered"):
        build_engine(make_bundle(tmp_path / "b", function=True), "tensorrt")


def test_nobody_listening_stops_the_build(tmp_path, machine, monkeypatch):
    machine()

    def gone(*_step):
        raise BrokenPipeError

    folder = make_bundle(tmp_path / "b")
    with pytest.raises(BackendError, match="The build was stopped"):
        build_engine(folder, "tensorrt", progress=gone)
    assert not (folder / "engines").exists()


def test_a_wrong_result_is_not_kept(tmp_path, machine):
    gpu, _ = machine()
    folder = make_bundle(tmp_path / "b")
    spoil_golden(folder, lambda features: features * 1.1)
    with pytest.raises(GateError, match="differs from golden"):
        build_engine(folder, "tensorrt")
    assert not (folder / "engines").exists()
    assert gpu.live() == {}


def test_the_timing_cache_is_kept_by_device_and_version(tmp_path, machine):
    machine()
    folder = make_bundle(tmp_path / "b")
    assert build_engine(folder, "tensorrt")["engines"][0]["details"]["timing_cache"] == "new"
    (cache,) = (tmp_path / "cache" / "sparsifiner-edge").iterdir()
    assert cache.name == "tensorrt-10.3.0-sm87-orin.cache"
    assert cache.read_bytes() == b"times of a build"
    assert build_engine(folder, "tensorrt")["engines"][0]["details"]["timing_cache"] == "reused"
    for content in (b"cut", b"times of an other device"):
        cache.write_bytes(content)
        assert build_engine(folder, "tensorrt")["engines"][0]["details"]["timing_cache"] == "new"
        assert cache.read_bytes() == b"times of a build"


def test_a_disk_that_refuses_costs_no_build(tmp_path, machine):
    machine()
    (tmp_path / "cache").write_text("a file in the place of the folder")
    assert build_engine(make_bundle(tmp_path / "b"), "tensorrt")["engines"]
    assert (
        TimingCache(tmp_path / "cache" / "x").load(type("Config", (), {"create_timing_cache": lambda *_: None}))
        is False
    )


def test_workspace_leaves_the_system_its_share():
    assert workspace_bytes(1000, integrated=True) == 500
    assert workspace_bytes(1000, integrated=False) == 750


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
        assert check_golden(session, folder)
    machine("11.4")
    with pytest.raises(BackendError, match=r"installed is 11\.4"):
        open_session(folder, "tensorrt")


def test_a_session_checks_the_machine_itself(tmp_path, machine):
    machine()
    folder = make_bundle(tmp_path / "b")
    engine = tensorrt.listed_engines(open_bundle_after_build(folder), folder)[0]
    wrong = dataclasses.replace(engine, compute_capability="8.9")
    with pytest.raises(BackendError, match=r"does not run here: built for compute capability 8\.9"):
        tensorrt.open_engine(folder / engine.file, wrong, {})


def open_bundle_after_build(folder):
    build_engine(folder, "tensorrt")
    return open_bundle(folder)


def test_a_damaged_engine_is_a_message(tmp_path, machine):
    gpu, _ = machine()
    folder = make_bundle(tmp_path / "b")
    engine = tensorrt.listed_engines(open_bundle_after_build(folder), folder)[0]
    path = tmp_path / "cut.engine"
    path.write_bytes((folder / engine.file).read_bytes()[:40])
    with pytest.raises(BackendError, match=r"(?s)was built by another version or is damaged.*Build it again"):
        tensorrt.open_engine(path, engine, {})
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
        assert check_golden(session, folder)
    assert gpu.live() == {}


def test_a_closed_session_refuses(tmp_path, machine):
    machine()
    folder = make_bundle(tmp_path / "b")
    build_engine(folder, "tensorrt")
    session = open_session(folder, "tensorrt")
    session.close()
    session.close()
    for call in (lambda: session.infer({"image": image()}), session.layers):
        with pytest.raises(BackendError, match="closed"):
            call()


def test_a_bundle_without_engines_says_how_to_build(tmp_path, machine):
    machine()
    with pytest.raises(BackendError, match=r"(?s)no engine for tensorrt.*build .* --backend tensorrt"):
        open_session(make_bundle(tmp_path / "b"), "tensorrt")
    with pytest.raises(BackendError, match="native kernels are the processor's"):
        open_session(make_bundle(tmp_path / "c"), "tensorrt", kernels="native")


def test_no_cuda_no_tensorrt_object(tmp_path, machine):
    gpu, _ = machine(count=0)
    folder = make_bundle(tmp_path / "b")
    with pytest.raises(BackendError, match="CUDA finds no device"):
        build_engine(folder, "tensorrt")
    assert set(gpu.calls) <= {"cudaDriverGetVersion", "cudaGetDeviceCount"}


def test_a_missing_or_old_or_broken_tensorrt(tmp_path, machine, monkeypatch):
    _, trt = machine()
    trt.__version__ = "8.5.2"
    with pytest.raises(BackendError, match=r"(?s)TensorRT 8.5.2 is older than 10.3.*JetPack 6"):
        tensorrt.load_backend()
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingExtraError, match=r"sparsifiner-edge\[tensorrt\]"):
        tensorrt.load_backend()
    monkeypatch.delitem(sys.modules, "tensorrt")
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(BackendError, match=r"(?s)libnvinfer.so.10.*JetPack"):
        tensorrt.load_backend()


def test_the_cache_of_a_device_has_a_plain_name(machine):
    machine(name="NVIDIA GeForce RTX 4060 Ti/16", sm=(8, 9))
    from sparsifiner_edge.runtime.cuda import probe

    assert timing_cache_path(probe(), "10.7.0").name == "tensorrt-10.7.0-sm89-nvidia-geforce-rtx-4060-ti-16.cache"
