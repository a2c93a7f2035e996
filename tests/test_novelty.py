"""The score novelty: what it is of, that every file agrees with NumPy, what a run says of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sparsifiner_edge as se
from sparsifiner_edge.artifacts import NOVELTY_FILE
from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.camera.answers import FrameRecord
from sparsifiner_edge.camera.overlay import text_lines
from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.errors import ArtifactError, ConfigError
from sparsifiner_edge.images import load_image
from sparsifiner_edge.novelty import COMPONENTS, LEAST_IMAGES, NOVELTY, fit_density, novelty, squared_distance
from sparsifiner_edge.runtime import open_session
from sparsifiner_edge.sparse.layer import riding
from sparsifiner_edge.sparse.novelty import layer_of, statistics, statistics_of, tokens_after
from sparsifiner_edge.sparse.student import load_student
from tests.commands import call, process
from tests.everything import first
from tests.models import TINY, images, student
from tests.novel import calibrated_student, novel_bundle, smooth_images
from tests.once import Once

MERGING = SparsityConfig(keep=0.2, cells=4, channels=8, merge=(12,))
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch's exporter, about its own calls


@pytest.fixture(scope="module")
def smooth(once: Once) -> Path:
    return smooth_images(once)


@pytest.fixture(scope="module")
def calibrated(once: Once, tiny_weights: Path) -> Path:
    return calibrated_student(once, tiny_weights)


@pytest.fixture(scope="module")
def bundle(once: Once, tiny_weights: Path) -> Path:
    return novel_bundle(once, tiny_weights)


def scores(folder: Path, paths: list[Path]) -> np.ndarray[Any, Any]:
    with open_session(folder) as session:
        return np.array([session.infer({"image": load_image(path, 160)[None]})[NOVELTY][0, 0] for path in paths])


def test_a_density_of_its_own_kind_of_data() -> None:
    """Of what it was fitted to hardly more than the stated share lies above 1; of what is elsewhere all."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(12, 60)) * 2
    usual = rng.normal(size=(900, 12)) @ mixing + rng.normal(size=(900, 60)) + 5
    density = fit_density(usual[:300], 0.05)
    above = float((novelty(density, usual[300:]) > 1).mean())
    assert 0.005 < above < 0.08
    assert (novelty(density, usual[300:] + 25 * rng.normal(size=60)) > 1).all()
    assert density.components.shape == (60, COMPONENTS)
    # Few images tell fewer directions; the others are zeros, so that files keep their shapes.
    few = fit_density(usual[:20])
    assert np.abs(few.components).sum(0).astype(bool).sum() == 5
    assert (few.variances[5:] == 0).all()


def test_the_distance_is_that_of_the_covariance() -> None:
    """Against numpy.linalg: each component has its variance, and what is left one for all."""
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(400, 5))
    density = fit_density(rows)
    z = (rows - density.mean) * density.scale
    axes = density.components[:, :4]
    assert np.allclose(axes.T @ axes, np.eye(4), atol=1e-6)
    assert not density.components[:, 4:].any()
    left = np.eye(5) - axes @ axes.T
    covariance = axes @ np.diag(1 / (density.variances[:4] + density.rest)) @ axes.T + left / density.rest
    wanted = np.einsum("ni,ij,nj->n", z, np.linalg.inv(covariance), z)
    assert squared_distance(density, rows) == pytest.approx(wanted, rel=1e-4)


def test_what_is_emptier_than_everything_is_novel() -> None:
    """A covered lens lies near the middle of all statistics but the contrast."""
    rng = np.random.default_rng(2)
    means, logs = rng.normal(size=(200, 30)), rng.normal(size=(200, 1)) + rng.normal(size=(200, 30)) / 4
    density = fit_density(np.concatenate([means, logs], 1))
    empty = np.concatenate([np.zeros(30), np.full(30, -9.0)])[None]
    assert novelty(density, empty)[0] > 1


@pytest.mark.parametrize("order", ["day, day, night", "night, day, day", "in turns"])
def test_days_and_nights_may_come_in_any_order(order: str) -> None:
    """A third of another kind does not widen the limit until nothing is unlike them."""
    rng = np.random.default_rng(3)
    day, night = np.zeros((60, 80)), np.full((30, 80), 12.0)
    rows = np.concatenate([day, night]) + rng.normal(size=(90, 80))
    others = rng.normal(size=(20, 80)) * 40
    ordered = {"day, day, night": rows, "night, day, day": rows[::-1], "in turns": rng.permutation(rows)}[order]
    density = fit_density(ordered)
    assert novelty(density, rows).max() < 1
    assert novelty(density, others).min() > 1


def test_frames_that_stood_still_make_no_limit_without_end() -> None:
    rng = np.random.default_rng(4)
    moving = rng.normal(size=(100, 80))
    density = fit_density(np.concatenate([np.repeat(moving[:1], 200, 0), moving]))
    assert novelty(density, rng.normal(size=(20, 80)) * 40).min() > 1
    assert np.isfinite(density.limit).all()


@pytest.mark.parametrize(
    ("rows", "share", "said"),
    [
        (np.random.default_rng(0).normal(size=(LEAST_IMAGES - 1, 4)), 0.01, "too few"),
        (np.ones((20, 4)), 0.01, "all the same"),
        (np.full((20, 4), np.nan), 0.01, "make NaN"),
        (np.random.default_rng(0).normal(size=(20, 4)), 0.0, "no share"),
        (np.random.default_rng(0).normal(size=(20, 4)), 0.5, "no share"),
    ],
)
def test_what_no_density_is_of(rows: Any, share: float, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        fit_density(rows, share)


@pytest.mark.parametrize("sparsity", [MERGING, SparsityConfig(keep=0.2, cells=4, channels=8), SparsityConfig(keep=1)])
@torch.no_grad()
def test_statistics_are_those_of_the_whole_tokens(sparsity: SparsityConfig) -> None:
    """Merged tokens count as often as they stand for patches."""
    made = student(sparsity=sparsity)
    backbone, whole = made.backbone, []
    hook = backbone.layers[2].register_forward_hook(lambda _, __, out: whole.append(out))
    with tokens_after(backbone, 2) as seen:
        made.model(images(made.model))
    hook.remove()
    patches = whole[0][:, backbone.prefix :].double()
    wanted = torch.cat([patches.mean(1), patches.var(1, correction=0).log() / 2], 1)
    assert torch.allclose(statistics_of(seen[0]).double(), wanted, atol=1e-5)
    assert (seen[0].sizes is not None) == bool(sparsity.merge)
    if sparsity.merge:
        assert riding(whole[0]).values.shape[1] < whole[0].shape[1]


def test_the_layer() -> None:
    assert [layer_of(depth) for depth in (1, 3, 6, 12, 24)] == [0, 0, 0, 2, 5]


def test_a_student_keeps_it(calibrated: Path, smooth: Path, tmp_path: Path) -> None:
    assert "novelty: fitted to 40 images" in (calibrated.parent / "said").read_text()
    found = load_student(calibrated)
    assert found.novelty is not None
    assert (found.novelty.images, found.novelty.layer) == (40, 0)
    rows = statistics(found, sorted(smooth.iterdir()), found.novelty.layer)
    assert novelty(found.novelty.density, rows).max() < 2
    assert load_student(calibrated, img_size=128, merge=(2,)).novelty is None, "fitted to images of another size"
    copy = shutil.copytree(calibrated, tmp_path / "copy")
    (copy / NOVELTY_FILE).write_bytes(b"\0" * 100)
    with pytest.raises(ArtifactError, match="does not match its SHA-256"):
        load_student(copy)
    (copy / NOVELTY_FILE).unlink()
    with pytest.raises(ArtifactError, match=NOVELTY_FILE):
        load_student(copy)


def test_few_images_make_none(smooth: Path, tiny_weights: Path, tmp_path: Path, capsys: Any) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted(smooth.iterdir())[: LEAST_IMAGES - 1]:
        shutil.copy(path, few)
    done = call(capsys, "sparsify", TINY, "--weights", tiny_weights, "--calibrate", few, "-o", tmp_path / "student")
    assert done.code == 0, done.err
    assert f"novelty: none, for want of {LEAST_IMAGES} images" in done.out
    assert not (tmp_path / "student" / NOVELTY_FILE).exists()


def test_students_without_predictors_have_it_too(smooth: Path, tiny_weights: Path, tmp_path: Path, capsys: Any) -> None:
    asked = ("sparsify", TINY, "--weights", tiny_weights, "--keep", 1, "--merge", 10, "--calibrate", smooth)
    done = call(capsys, *asked, "-o", tmp_path / "student")
    assert done.code == 0, done.err
    assert "novelty: fitted to 40 images" in done.out
    assert load_student(tmp_path / "student").novelty is not None


@pytest.mark.parametrize(
    ("precision", "near"), first([("fp32", 1e-4), ("fp16", 3e-2), ("int8", 0.15)])
)  # what a rounded layer before it changes
def test_every_file_gives_it(precision: str, near: float, calibrated: Path, smooth: Path, tmp_path: Path) -> None:
    options = {"calibrate": smooth} if precision == "int8" else {}
    made = se.export_bundle(calibrated, tmp_path / "bundle", precision=precision, **options)
    found, paths = load_student(calibrated), sorted(smooth.iterdir())[:6]
    assert found.novelty is not None
    wanted = novelty(found.novelty.density, statistics(found, paths, found.novelty.layer))
    assert scores(made, paths) == pytest.approx(wanted, rel=near)
    manifest = open_bundle(made).manifest
    assert manifest.outputs[-1].name == NOVELTY
    assert (manifest.outputs[-1].shape, manifest.outputs[-1].dtype) == ((1, 1), "float32")
    assert manifest.novelty is not None
    assert manifest.novelty.images == 40


@pytest.mark.everything
def test_it_can_be_left_out(calibrated: Path, tmp_path: Path, capsys: Any) -> None:
    done = call(capsys, "export", calibrated, "--no-novelty", "-o", tmp_path / "bundle")
    assert done.code == 0, done.err
    manifest = open_bundle(tmp_path / "bundle").manifest
    assert [output.name for output in manifest.outputs] == ["logits", "features"]
    assert manifest.novelty is None


@pytest.mark.parametrize("kernels", first(["native", "portable"]))
def test_every_image_of_a_batch_has_its_own(kernels: str, bundle: Path, smooth: Path) -> None:
    stack = np.stack([load_image(path, 160) for path in sorted(smooth.iterdir())[:3]])
    with open_session(bundle, kernels=kernels) as session:
        together = session.infer({"image": stack})[NOVELTY]
        alone = [session.infer({"image": image[None]})[NOVELTY] for image in stack]
    assert together.shape == (3, 1)
    assert together == pytest.approx(np.concatenate(alone), rel=1e-4)


@pytest.mark.parametrize("kernels", first(["native", "portable"]))
def test_openvino_gives_it(kernels: str, bundle: Path, smooth: Path) -> None:
    pytest.importorskip("openvino", reason="the extra openvino is not installed")
    image = load_image(next(iter(sorted(smooth.iterdir()))), 160)[None]
    with open_session(bundle) as ours, open_session(bundle, "openvino", kernels=kernels) as theirs:
        wanted, got = (session.infer({"image": image})[NOVELTY] for session in (ours, theirs))
    assert got == pytest.approx(wanted, rel=1e-3)


TIMES = ("capture_ms", "preprocess_ms", "wait_ms", "infer_ms", "postprocess_ms", "end_to_end_ms", "monotonic_s")


def record(score: float | None) -> FrameRecord:
    times: dict[str, Any] = dict.fromkeys(TIMES, 1.0)
    return FrameRecord(source="test", frame=0, skipped=0, pts_s=None, frame_age_ms=None, novelty=score, **times)


def test_an_overlay_shows_it() -> None:
    assert "novelty 0.25" in text_lines(record(0.25), 10)
    assert "novelty 1.25   UNLIKE THE CALIBRATION" in text_lines(record(1.25), 10)
    assert not any("novelty" in line for line in text_lines(record(None), 10))


def test_every_frame_has_its_line(bundle: Path, smooth: Path) -> None:
    done = process("run", bundle, "--source", smooth)
    lines = [json.loads(line) for line in done.out.splitlines()]
    assert done.code == 0, done.err
    assert len(lines) == 40
    assert [line["novelty"] for line in lines[:4]] == pytest.approx(
        scores(bundle, sorted(smooth.iterdir())[:4]).tolist(), abs=1e-5
    )


def test_servers_get_it_as_an_output(bundle: Path, tmp_path: Path, capsys: Any) -> None:
    done = call(capsys, "package", bundle, "--for", "triton", "-o", tmp_path / "triton")
    assert done.code == 0, done.err
    (config,) = (tmp_path / "triton" / "models").glob("*/config.pbtxt")
    text = " ".join(config.read_text().split())
    assert 'output { name: "novelty" data_type: TYPE_FP32 dims: [1] }' in text
    done = call(capsys, "package", bundle, "--for", "deepstream", "-o", tmp_path / "deepstream")
    assert done.code == 0, done.err
    assert "novelty is left out" in (tmp_path / "deepstream" / "README.md").read_text()
