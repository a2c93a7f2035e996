"""Building with full TensorRT, against a fake of it: what it is told, and what comes of what goes wrong."""

from __future__ import annotations

import onnx
import pytest

from sparsifiner_edge.errors import BackendError, ConfigError, GateError, UnsupportedModelError
from sparsifiner_edge.runtime.build import build_engine
from tests.commands import snapshot
from tests.fakes.tensorrt import Behaviour
from tests.package.reseal import reseal
from tests.test_runtime import spoil_golden
from tests.tiny import make_bundle


def test_what_cannot_be_built_is_refused(tmp_path, machine):
    machine(behaviour=Behaviour(refuse=("ReduceMean", "Double")))
    folder = make_bundle(tmp_path / "b", function=True)
    with pytest.raises(ConfigError, match=r"(?s)Orin, 8.7\), not for 8.9.*tensorrt-rtx, which builds ahead of time"):
        build_engine(folder, "tensorrt", compute_capabilities=["8.7", "8.9"])
    with pytest.raises(UnsupportedModelError, match=r"\(Double\) in SparseAttention.*; node .*ReduceMean.*registered"):
        build_engine(folder, "tensorrt")
    machine()
    model = onnx.load(folder / "model.onnx")
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "height"
    onnx.save(model, folder / "model.onnx")
    reseal(folder)
    with pytest.raises(ConfigError, match=r"shape \[-1, -1, 4, 3\]: only the batch may be dynamic"):
        build_engine(folder, "tensorrt")


@pytest.mark.parametrize(
    ("errors", "warnings", "message"),
    [
        (
            ("Error Code 10: Could not find any implementation for node {ForeignNode[a...b]}.",),
            ("Tactic Device request: 3221225472 bytes. Device memory is insufficient memory to use tactic",),
            "ran out of memory while building",
        ),
        (("Error Code 2: OutOfMemory (Requested size was 524288000 bytes.)",), (), "ran out of memory while building"),
        (("Internal Error: assertion failed",), (), "TensorRT built no engine: Internal Error: assertion failed"),
        ((), (), "TensorRT gave no reason"),
    ],
)
def test_a_build_that_fails_is_translated_and_changes_nothing(tmp_path, machine, errors, warnings, message):
    gpu, _ = machine(behaviour=Behaviour(build=errors, warnings=warnings))
    folder = make_bundle(tmp_path / "b")
    before = snapshot(folder)
    with pytest.raises(BackendError, match=message):
        build_engine(folder, "tensorrt")
    assert snapshot(folder) == before
    assert gpu.live() == {}


def test_a_wrong_result_is_not_kept(tmp_path, machine):
    gpu, _ = machine()
    folder = make_bundle(tmp_path / "b")
    spoil_golden(folder, lambda features: features * 1.1)
    with pytest.raises(GateError, match="differs from golden"):
        build_engine(folder, "tensorrt")
    assert not (folder / "engines").exists()
    assert gpu.live() == {}


def test_the_timing_cache_is_kept_by_device_and_version(tmp_path, machine):
    """What is damaged counts as none, and a disk that refuses costs no build."""
    behaviour = Behaviour()
    machine(behaviour=behaviour)
    folder = make_bundle(tmp_path / "b")
    build_engine(folder, "tensorrt")
    (cache,) = (tmp_path / "cache" / "sparsifiner-edge").iterdir()
    assert cache.name == "tensorrt-10.3.0-sm87-orin.cache"
    for content, used in ((cache.read_bytes(), b"times of a build"), (b"cut", b"times of nothing")):
        cache.write_bytes(content)
        build_engine(folder, "tensorrt")
        assert behaviour.seen["timing cache"] == used
        assert cache.read_bytes() == b"times of a build"
    cache.unlink()
    cache.parent.rmdir()
    cache.parent.write_text("a file in the place of the folder")
    assert build_engine(folder, "tensorrt").engines


def test_no_cuda_no_tensorrt_object(tmp_path, machine):
    gpu, _ = machine(count=0)
    with pytest.raises(BackendError, match="CUDA finds no device"):
        build_engine(make_bundle(tmp_path / "b"), "tensorrt")
    assert set(gpu.calls) <= {"cudaDriverGetVersion", "cudaGetDeviceCount"}
