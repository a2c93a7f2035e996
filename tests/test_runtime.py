"""Tests of the session contract on ONNX Runtime with a bundle made without torch, and of another package's backend."""

from __future__ import annotations

import dataclasses
import os
import sys

import numpy as np
import onnx
import onnx.inliner
import onnx.parser
import pytest

from sparsifiner_edge.bundle.manifest import TensorSpec
from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.errors import ArtifactError, BackendError, GateError
from sparsifiner_edge.execution import Execution
from sparsifiner_edge.ops import native
from sparsifiner_edge.runtime.golden import check_golden
from sparsifiner_edge.runtime.open import session_on
from tests import flat
from tests.made import install_plugin
from tests.seal import reseal
from tests.tiny import make_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("runtime") / "tiny", depth=2)


def image(batch=1, size=4):
    return np.random.default_rng(5).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)


def test_images_may_lie_anyhow_in_memory(bundle):
    images = image(3)
    with flat.open_session(bundle) as session:
        features = session.infer({"image": images})["features"]
        strided = session.infer({"image": np.repeat(images, 2, axis=0)[::2]})["features"]
    np.testing.assert_array_equal(strided, features)


def test_native_kernels_that_are_not_there_are_refused_where_they_are_asked_for(bundle, monkeypatch):
    monkeypatch.setattr(native, "_FILE", "no-such.so")
    with flat.open_session(bundle) as session:
        assert session.description.kernels == "none (standard operators)"
    with pytest.raises(BackendError, match=r"(?s)The native library is not built: install .* leave --kernels native"):
        flat.open_session(bundle, kernels="native")


def test_a_session_says_what_really_runs(tmp_path, bundle):
    with flat.open_session(bundle, threads=1) as session:
        assert session.backend == "onnxruntime"
        assert session.inputs == [TensorSpec("image", "uint8", ("batch", 4, 4, 3))]
        assert session.outputs == [TensorSpec("features", "float32", ("batch", 8))]
        assert session.load_ms > 0
        described = session.description
    assert described.provider == "CPUExecutionProvider"
    assert described.kernels == "none (standard operators)"
    assert (described.precision, described.threads) == ("fp32", 1)
    with flat.open_session(make_bundle(tmp_path / "f", function=True)) as session:
        assert session.description.kernels == "function bodies"  # an operator that the library lacks
        assert session.description.threads == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("inputs", "got", "expected"),
    [
        ({}, "'image' is missing", r"image \(uint8 \[batch, 4, 4, 3\]\)"),
        ({"image": image(), "mask": image()}, "Unknown input 'mask'", "image"),
        ({"image": image().astype(np.float32)}, "'image' got float32", "Expected uint8"),
        ({"image": image(size=5)}, r"'image' got uint8 \[., 5, 5, 3\]", "Expected uint8"),
        ({"image": image()[:0]}, r"'image' got uint8 \[0, ", "no axis is empty"),
    ],
)
def test_unfit_inputs_are_named(bundle, inputs, got, expected):
    with flat.open_session(bundle) as session:
        for check in (session.validate, session.infer):
            with pytest.raises(BackendError, match=got) as caught:
                check(inputs)
            caught.match(expected)


def test_a_closed_session_refuses(bundle):
    session = flat.open_session(bundle)
    session.close()
    session.close()
    with pytest.raises(BackendError, match="closed"):
        session.infer({"image": image()})


def test_a_failure_inside_the_model_is_a_message(tmp_path):
    folder = make_bundle(tmp_path / "b")
    model = onnx.load(folder / "model.onnx")
    shape = next(t for t in model.graph.initializer if t.name == "shape")
    shape.CopyFrom(onnx.numpy_helper.from_array(np.array([7, -1, 3], np.int64), "shape"))  # 48 values, none of them 7
    onnx.save(model, folder / "model.onnx")
    reseal(folder)
    with flat.open_session(folder) as session, pytest.raises(BackendError, match="onnxruntime failed"):
        session.infer({"image": image()})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"backend": "opencv"}, r"'opencv'.*\n.*onnxruntime"),
        ({"threads": 0}, "threads is 0"),
        ({"kernels": "fast"}, r"(?s)kernels is 'fast'.*auto, native, portable"),
        ({"backend": "openvino", "provider": "cuda"}, r"openvino has no provider cuda.*\n.*--backend onnxruntime"),
        (
            {"backend": "onnxruntime", "compute_precision": "fp16"},
            r"computes in the file's precision, fp32.*\n.*--precision fp16",
        ),
    ],
)
def test_a_choice_that_cannot_be_is_refused(bundle, wrong, message):
    with pytest.raises(BackendError, match=message):
        flat.open_session(bundle, **wrong)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: f + 0.01 * np.ptp(f) * (np.arange(f.size).reshape(f.shape) == 3), r"differs .*worst at \[0, 3\]"),
        (lambda f: f * np.nan, "differs from golden by inf"),
        (lambda f: f[:, :-1], "has shape"),
    ],
)
def test_golden_refuses_what_differs(tmp_path, spoil, message):
    folder = make_bundle(tmp_path / "b")
    with np.load(folder / "golden.npz") as file:
        arrays = dict(file)
    np.savez(folder / "golden.npz", **arrays | {"output.features": spoil(arrays["output.features"])})
    reseal(folder)
    with flat.open_session(folder) as session, pytest.raises(GateError, match=message):
        check_golden(session, open_bundle(folder))


def test_golden_without_tolerance_or_file_is_refused(tmp_path):
    folder = make_bundle(tmp_path / "b", tolerances={})
    with flat.open_session(folder) as session:
        with pytest.raises(ArtifactError, match="the tolerance of 'features' is missing"):
            check_golden(session, open_bundle(folder))
        (folder / "golden.npz").write_bytes(b"PK\x03\x04 cut")
        reseal(folder)
        with pytest.raises(ArtifactError, match=r"golden.npz cannot be read"):
            check_golden(session, open_bundle(folder))


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """Another package's backend, installed, which runs ours under its own name."""
    points = {"foreign": "foreign:Foreign", "broken": "foreign:Missing", "no-backend": "foreign:NUMBER"}
    points |= {"module": "foreign", "malformed": "for-eign:Foreign", "gone": "gone:Foreign"}
    install_plugin(tmp_path / "site", monkeypatch, "backends", **points)
    (tmp_path / "site" / "foreign.py").write_text(
        "from sparsifiner_edge.runtime.onnxruntime import OnnxRuntime\n"
        "NUMBER = 1\n"
        "class Foreign(OnnxRuntime):\n"
        "    name = 'foreign'\n"
    )
    yield
    sys.modules.pop("foreign", None)


def test_what_another_package_names_and_is_no_backend_is_refused(bundle, foreign):
    for name, message in (
        ("broken", "has no 'Missing'"),
        ("no-backend", "is not a subclass of Backend"),
        ("module", "foreign is not a subclass of Backend"),
        ("malformed", "^for-eign cannot be imported"),
        ("gone", "no module 'gone' in the installed packages.\n  Reinstall gone"),
    ):
        with pytest.raises(BackendError, match=message):
            flat.open_session(bundle, name)
    with pytest.raises(BackendError, match="tensorrt-rtx, foreign, broken"):
        flat.open_session(bundle, "none")


def test_no_other_package_runs_where_a_signature_is_required(bundle, foreign):
    """It is not even imported."""
    signed = dataclasses.replace(open_bundle(bundle), signed=True)
    session_on(signed).close()
    with pytest.raises(BackendError, match=r"foreign is not a backend of sparsifiner-edge.*signature.*\n.*onnxrun"):
        session_on(signed, Execution(backend="foreign"))
    assert "foreign" not in sys.modules
