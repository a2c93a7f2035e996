"""Tests of the alignment of frames from a moving camera."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.fitting import Framing
from tests.camera.conftest import records_of
from tests.commands import process

cv2 = pytest.importorskip("cv2", reason="the extra camera is not installed")

from sparsifiner_edge.camera.align import Aligner  # noqa: E402

SIDE, PATCH = 160, 16
GRID = SIDE // PATCH, SIDE // PATCH


def world(seed: int = 0) -> Array:
    """Return a picture with corners everywhere, larger than the view."""
    random = np.random.default_rng(seed)
    coarse = random.integers(30, 220, (40, 60, 3)).astype(np.uint8)
    return np.asarray(cv2.GaussianBlur(cv2.resize(coarse, (600, 400), interpolation=cv2.INTER_NEAREST), (0, 0), 1.0))


def seen(picture: Array, x: float, y: float, degrees: float = 0.0, zoom: float = 1.0, noise: int = 0) -> Array:
    """Return the view of a camera at a place of the picture, uint8 [SIDE,SIDE,3]."""
    pose = cv2.getRotationMatrix2D((SIDE / 2, SIDE / 2), degrees, 1 / zoom)
    pose[:, 2] += 100 + x, 100 + y
    view = cv2.warpAffine(picture, pose, (SIDE, SIDE), flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP)
    random = np.random.default_rng(noise)
    return (view + random.normal(0, 2, view.shape)).clip(0, 255).astype(np.uint8)


def inner(image: Array, rows: int = 0, columns: int = 0) -> Array:
    """Return the middle of a view as float64, shifted by pixels."""
    return image[32 + rows : SIDE - 32 + rows, 32 + columns : SIDE - 32 + columns].astype(np.float64)


def test_a_fixed_camera_is_read_as_it_is() -> None:
    aligner, picture = Aligner((SIDE, SIDE), GRID), world()
    for number in range(8):
        image = seen(picture, 0, 0, noise=number)
        image[40:80, 10 * number : 10 * number + 40] = 255  # A thing passes.
        aligned = aligner.align(image)
        assert aligned.image is image
        assert (aligned.affine, aligned.moved, aligned.motion) == (None, (0, 0), "still")


@pytest.mark.parametrize(
    "pose",
    [
        lambda k: (1.3 * np.sin(k), 0.9 * np.cos(2 * k), 0.0, 1.0),
        lambda k: (0.0, 0.0, 1.2 * np.sin(k), 1.0),
        lambda k: (0.5 * k, 0.0, 0.0, 1.0 + 0.015 * np.sin(k)),
    ],
    ids=["shake", "turn", "zoom"],
)
def test_what_is_read_stays_where_it_was(pose: Callable[[int], tuple[float, float, float, float]]) -> None:
    """The error of the affine map is a fraction of a pixel, and what is read is like the first frame."""
    aligner, picture = Aligner((SIDE, SIDE), GRID), world()
    first = seen(picture, *pose(0))
    assert aligner.align(first).moved == (0, 0)
    motions = set()
    for number in range(1, 12):
        image = seen(picture, *pose(number), noise=number)
        aligned = aligner.align(image)
        motions.add(aligned.motion)
        assert aligned.moved == (0, 0)
        assert abs(inner(aligned.image) - inner(first)).mean() < 0.5 * abs(inner(image) - inner(first)).mean() + 2
        if aligned.affine is not None:  # A point of the view, through the frame, in the picture.
            assert np.allclose(aligned.image.shape, image.shape)
    assert motions <= {"still", "shaking"}
    assert "shaking" in motions


def test_a_pan_goes_on_by_whole_patches() -> None:
    aligner, picture = Aligner((SIDE, SIDE), GRID), world()
    first, total = seen(picture, 0, 0), np.zeros(2, int)
    aligner.align(first)
    for number in range(1, 30):
        aligned = aligner.align(seen(picture, 5.0 * number, -1.5 * number, noise=number))
        assert aligned.moved is not None
        total += aligned.moved
        where = seen(picture, PATCH * float(total[1]), PATCH * float(total[0]))
        assert abs(inner(aligned.image) - inner(where)).mean() < 4
        assert aligned.affine is None or abs(aligned.affine[:, 2]).max() < PATCH
    assert aligned.motion == "moving"
    assert abs(total - (-1.5 * 29 / PATCH, 5 * 29 / PATCH)).max() <= 1


def test_a_view_that_turns_far_or_is_lost_starts_anew() -> None:
    aligner, picture = Aligner((SIDE, SIDE), GRID), world()
    found = [aligner.align(seen(picture, 0, 0, 0.8 * number, noise=number)) for number in range(8)]
    anew = [one for one in found if one.moved is None]
    assert anew
    assert all(one.affine is None for one in anew)
    aligner.reset()
    aligner.align(seen(picture, 0, 0))
    others = [aligner.align(seen(world(1 + number), 0, 0, noise=number)) for number in range(3)]
    assert {one.motion for one in others} == {"too fast"}
    assert others[-1].moved is None
    # An empty picture has no corners: it is read as it is.
    aligner.reset()
    empty = np.full((SIDE, SIDE, 3), 128, np.uint8)
    assert [aligner.align(empty).motion for _ in range(3)] == ["still"] * 3


def test_points_of_an_aligned_frame_are_mapped_back() -> None:
    fitting = Framing(160).of(640, 320)
    assert fitting.read == fitting.box == (160, 0, 320, 320)
    shifted = type(fitting)(fitting.frame, fitting.box, fitting.size, fitting.inner, ((1, 0, 1.25), (0, 1, -2.0)))
    assert shifted.read == (162.5, -4.0, 320.0, 320.0)
    assert not shifted.is_turned
    assert shifted.to_frame(0, 0) == (162.5, -4.0)
    turned = type(fitting)(fitting.frame, fitting.box, fitting.size, fitting.inner, ((0, -1, 160), (1, 0, 0)))
    assert turned.is_turned
    assert turned.corners == [(480, 0), (480, 320), (160, 320), (160, 0)]


def test_run_says_what_the_camera_does_and_where_it_reads(stream_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("av", reason="the extra camera is not installed")
    from tests.camera.conftest import encode

    picture = world()
    shaking = [seen(picture, 0, 0, noise=k) for k in range(4)]
    shaking += [seen(picture, 1.5 * np.sin(k), 1.5 * np.cos(k), noise=k) for k in range(12)]
    video = encode(tmp_path / "camera.mp4", shaking)
    command = ["run", stream_bundle, "--source", video, "--backend", "onnxruntime"]
    done = process(*command, "--overlay", tmp_path / "overlay.mp4")
    boxes = [record["box"] for record in records_of(done)]
    assert boxes[1] == [0, 0, SIDE, SIDE]
    assert any(box[0] % 1 for box in boxes)
    assert all(abs(box[0]) < 8 for box in boxes)
    assert '"motion":"shaking"' in done.err.replace(" ", "")
    fixed = process(*command, "--stabilise", "off")
    assert {tuple(record["box"]) for record in records_of(fixed)} == {(0, 0, SIDE, SIDE)}
    assert '"camera"' not in fixed.err
    letterbox = process(*command, "--fit", "letterbox")
    assert "bars of --fit letterbox" in letterbox.err
