"""A guard: where it answers, what stays the model's own, which bundles are none; and a score that is no number."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import sparsifiner_edge as se
from sparsifiner_edge.bundle.sign import sign_bundle
from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.camera.model import Model
from tests.camera.conftest import encode
from tests.camera.test_not_finite import strict
from tests.camera.test_service import events_of, get, records_of
from tests.commands import assert_refused, process
from tests.models import TINY
from tests.novel import smooth_images
from tests.once import Once
from tests.package.reseal import reseal
from tests.tiny import make_bundle

SIZE = 8
USUAL, UNLIKE, NO_NUMBER = 60, 200, 10
"""Greys, whose novelty is sqrt(grey - 50) / 5."""


def spec(name: str, *shape: int | str, dtype: str = "float32") -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": ["batch", *shape]}


def made(
    folder: Path, *, factor: float = 1, output: str = "features", scored: bool = True, usual: float = 50,
    tokens: bool = False, mask: bool = False, **manifest: Any,
) -> Path:  # fmt: skip
    """A bundle whose novelty is of the image's brightness; `factor` makes it another one of the same model."""
    bundle = make_bundle(folder, size=SIZE, preprocessing={"size": SIZE})
    model = onnx.load(bundle / "model.onnx")
    graph, outputs = model.graph, [spec(output, SIZE)]
    weights = next(t for t in graph.initializer if t.name == "w0")
    weights.CopyFrom(numpy_helper.from_array(np.float32(factor) * numpy_helper.to_array(weights), "w0"))
    graph.output[0].name = graph.node[-1].output[0] = output
    values = {
        "sides": np.array([1, 2, 3]), "column": np.array([-1, 1]), "usual": np.float32(usual), "five": np.float32(5),
        "factor": np.array([1, factor, 1], np.float32), "channel": np.array([3]), "bright": np.float32(255 * factor),
    }  # fmt: skip
    graph.initializer.extend(numpy_helper.from_array(np.asarray(value), name) for name, value in values.items())
    if scored:
        outputs.append(spec("novelty", 1))
        graph.node.extend([
            helper.make_node("ReduceMean", ["cast", "sides"], ["grey"], keepdims=0),
            helper.make_node("Sub", ["grey", "usual"], ["above"]),
            helper.make_node("Sqrt", ["above"], ["root"]),
            helper.make_node("Div", ["root", "five"], ["scaled"]),
            helper.make_node("Reshape", ["scaled", "column"], ["novelty"]),
        ])  # fmt: skip
    if tokens:
        outputs.append(spec("tokens", SIZE * SIZE, 3))
        graph.node.append(helper.make_node("Mul", ["pixels", "factor"], ["tokens"]))
    if mask:
        outputs.append(spec("mask", SIZE, SIZE))
        graph.node.append(helper.make_node("ReduceMean", ["cast", "channel"], ["light"], keepdims=0))
        graph.node.append(helper.make_node("Div", ["light", "bright"], ["mask"]))
    for one in outputs[1:]:
        graph.output.append(helper.make_tensor_value_info(one["name"], TensorProto.FLOAT, one["shape"]))
    onnx.save(model, bundle / "model.onnx")
    fitted = {"novelty": {"images": 40, "false_alarms": 0.01}} if scored else {}
    grid = {"tokens": {"prefix": 0, "grid": [SIZE, SIZE]}} if tokens else {}
    return reseal(bundle, **{"name": "m", "outputs": outputs} | fitted | grid | manifest)


def grey(value: int, size: int = SIZE) -> np.ndarray[Any, Any]:
    return np.full((size, size, 3), value, np.uint8)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return made(tmp_path / "own", tokens=True)


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """Without tokens and score, as a dense model is exported; its features point elsewhere."""
    return made(tmp_path / "dense", factor=-1, scored=False)


def test_what_is_compared_stays_the_models_own(own: Path, dense: Path, tmp_path: Path) -> None:
    """A change from one model to the other is none of the scene's."""
    video = encode(tmp_path / "v.mp4", [grey(value, 64) for value in [USUAL, UNLIKE] * 4])
    plain, guarded, other = (
        records_of(process("run", bundle, "--source", video, *more))
        for bundle, more in ((own, ()), (own, ("--guard", dense)), (dense, ()))
    )
    assert [record["guarded"] for record in guarded] == [False, True] * 4
    assert [record["novelty"] > 1 for record in plain] == [False, True] * 4
    for record, mine, theirs in zip(guarded, plain, other, strict=True):
        assert record["features"] == (theirs if record["guarded"] else mine)["features"]
        assert record["change"] == mine["change"] == pytest.approx(0, abs=1e-3)
    assert plain[1]["features"] != other[1]["features"]


@pytest.mark.parametrize("with_tokens", [False, True])
def test_a_map_of_changes_is_the_models_own(with_tokens: bool, own: Path, tmp_path: Path) -> None:
    guard = made(tmp_path / "guard", factor=-1, scored=False, tokens=with_tokens)
    with Model(own, "onnxruntime", 1, guard=guard) as model:
        found = [model.heat(model.guarded(model.infer(grey(value)), grey(value))) for value in (USUAL, UNLIKE, USUAL)]
    assert found[0] is None
    for changes in found[1:]:
        assert changes is not None
        assert changes == pytest.approx(np.zeros((SIZE, SIZE)), abs=1e-6)


def test_a_guards_map_is_drawn(tmp_path: Path) -> None:
    own, guard = (made(tmp_path / name, factor=f, mask=True) for name, f in (("own", 1), ("guard", 2)))
    with Model(own, "onnxruntime", 1, guard=guard) as model:
        for value, wanted in ((USUAL, USUAL / 255), (UNLIKE, UNLIKE / 2 / 255)):
            heat = model.heat(model.guarded(model.infer(grey(value)), grey(value)))
            assert heat is not None
            assert heat == pytest.approx(np.full((SIZE, SIZE), wanted), abs=1e-6)


@pytest.mark.parametrize("source", ["image", "video"])
def test_a_score_that_is_no_number_calls_it(source: str, own: Path, dense: Path, tmp_path: Path) -> None:
    values = [USUAL, NO_NUMBER]
    video = encode(tmp_path / "v.mp4", [grey(value, 64) for value in values])
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, value in enumerate(values):
        Image.fromarray(grey(value)).save(pictures / f"{number}.png")
    outcome = process("run", own, "--source", video if source == "video" else pictures, "--guard", dense)
    assert outcome.code == 0, outcome.err
    usual, unlike = (strict(line) for line in outcome.out.splitlines())
    assert (usual["guarded"], "not_finite" in usual) == (False, False)
    assert (unlike["guarded"], unlike["novelty"], unlike["not_finite"]) == (True, None, 1)
    assert None not in unlike["features"]
    if source == "video":
        done = events_of(outcome)[-1]
        assert (done["unlike"], done["guarded"], done["not_finite"], done["repeated"]) == (1, 1, 1, 0)


@pytest.mark.parametrize("usual", [50, 250])
def test_metrics_and_health_tell(usual: float, dense: Path, tmp_path: Path, service: Any) -> None:
    own = made(tmp_path / "bundle", usual=usual)
    run = service(own, "--source", "test", "--guard", dense, "--metrics", "0")
    address = run.event(event="metrics")["address"]
    assert run.event(event="guard")["backend"] == "onnxruntime"
    for _ in range(12):
        assert run.record()["guarded"]
    values = dict(re.findall(r"^sparsifiner_(\S+) (\S+)$", get(address)[1], re.MULTILINE))
    assert float(values["novelty"]) > 1
    assert math.isinf(float(values["novelty"])) == (usual == 250)  # The root of what is below zero.
    assert float(values["processed_total"]) >= 12
    assert float(values["unlike_total"]) == float(values["guarded_total"]) >= 12
    assert float(values["repeated_total"]) == 0
    code, text = get(address.replace("/metrics", "/healthz"))
    health = strict(text)
    assert (code, health["healthy"], health["unlike"]) == (200, True, True)
    assert re.fullmatch(r"(\d+) of the last \1 frames unlike what this model was calibrated on", health["novelty"])
    assert run.finish()[0] == 0


@pytest.mark.parametrize(
    ("bundle", "guard", "said"),
    [
        ({}, {"name": "other"}, "is of another model: other, not m. Export the guard from the model"),
        ({"output": "logits"}, {}, "gives no 'logits', by which"),
        ({"mask": True}, {}, "gives no 'mask', by which"),
        ({}, {"outputs": [spec("features", 9)]}, "gives another 'features' than"),
        ({}, {"preprocessing": {"size": 9}}, "takes other images than"),
        ({"scored": False}, {}, "gives no score 'novelty' that could call a guard"),
    ],
)
def test_no_guard(bundle: dict[str, Any], guard: dict[str, Any], said: str, tmp_path: Path) -> None:
    own = made(tmp_path / "own", **bundle)
    other = made(tmp_path / "guard", **{"scored": False} | guard)
    assert_refused(process("run", own, "--source", "test", "--frames", 1, "--guard", other), said)


def labelled(bundle: Path, *labels: str) -> Path:
    (bundle / "labels.txt").write_text("".join(f"{label}\n" for label in labels))
    return reseal(bundle)


def test_labels_count_where_a_class_is_the_answer(tmp_path: Path) -> None:
    for output, code in (("features", 0), ("logits", 2)):
        own = labelled(made(tmp_path / output, output=output), *"abcdefgh")
        other = labelled(made(tmp_path / f"{output} guard", output=output, scored=False), *"hgfedcba")
        done = process("run", own, "--source", "test", "--frames", 1, "--guard", other)
        assert done.code == code, done.err
        assert ("has other labels than" in done.err) == (output == "logits")
    same = labelled(made(tmp_path / "same", output="logits", scored=False), *"abcdefgh")
    assert process("run", own, "--source", "test", "--frames", 1, "--guard", same).code == 0


@pytest.mark.everything
def test_a_guard_is_signed_too(own: Path, dense: Path, keys: Path, tmp_path: Path) -> None:
    pytest.importorskip("cryptography", reason="the extra sign is not installed")
    video = encode(tmp_path / "v.mp4", [grey(UNLIKE, 64)] * 2)
    sign_bundle(own, keys / "key.pem")
    line = ("run", own, "--source", video, "--guard", dense, "--require-signature", keys / "key.pub")
    assert_refused(process(*line), f"{dense} is not signed")
    sign_bundle(dense, keys / "other.pem")
    assert_refused(process(*line), "signed by another key")
    sign_bundle(dense, keys / "key.pem")
    assert [record["guarded"] for record in records_of(process(*line))] == [True, True]


@pytest.mark.everything
def test_a_dense_model_as_it_is_exported_guards_a_student_that_prunes(
    once: Once, tiny_weights: Path, tmp_path: Path
) -> None:
    """The student's tokens are fewer, and have positions; the guard gives none."""
    smooth, keep = smooth_images(once), ("--token-keep", "3:.7")
    done = process(
        "sparsify", TINY, "--weights", tiny_weights, *keep, "--calibrate", smooth, "-o", tmp_path / "student"
    )
    assert done.code == 0, done.err
    own = se.export_bundle(tmp_path / "student", tmp_path / "own", tokens=True)
    guard = se.export_bundle(TINY, tmp_path / "guard", weights=tiny_weights)
    outputs = {output.name: output.shape for output in open_bundle(own).manifest.outputs}
    assert {"tokens", "token_positions"} <= set(outputs)
    noise = np.random.default_rng(0).integers(0, 256, (160, 160, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    guarded, alone = (
        records_of(process("run", bundle, "--source", tmp_path / "noise.png", *more))[0]
        for bundle, more in ((own, ("--guard", guard)), (guard, ()))
    )
    assert guarded["guarded"]
    assert guarded["top"] == alone["top"]
