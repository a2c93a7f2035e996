"""Corruptions of images, against the package that others use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage import data

from sparsifiner_edge.corruptions import COMMON, SEVERITIES, corrupt, moved, parse_corruptions
from sparsifiner_edge.errors import ConfigError

PUBLISHED = json.loads((Path(__file__).parent / "data" / "corruptions.json").read_text())
"""By "fog 3" the `figures` of what the package imagecorruptions-imaug makes of `CLEAN`, the mean of six seeds. It
replaces OpenCV by one that needs libGL, so it stays out of here.
"""
DRAWN, OTHER = "frost", "elastic_transform"
"""The one that is drawn here; the one to which that package gives parameters of its own."""
CLEAN = np.array(Image.fromarray(data.astronaut()).resize((224, 224), Image.Resampling.BICUBIC))


def figures(changed: Any) -> list[float]:
    """Mean difference to the clean image, mean, deviation, and mean difference of pixels above each other."""
    values = changed.astype(float)
    below = np.abs(np.diff(values, axis=0)).mean()
    return [float(x) for x in (np.abs(values - CLEAN).mean(), values.mean(), values.std(), below)]


@pytest.mark.parametrize("name", [name for name in COMMON if name != OTHER])
def test_images_change_as_published(name: str) -> None:
    """In the mean over seeds: difference to the clean image, mean, deviation, difference of neighbours."""
    for severity in SEVERITIES:
        found = np.mean([figures(corrupt(CLEAN, name, severity, seed)) for seed in range(6)], 0)
        tolerance = 0.2 if name == DRAWN else 0.12
        np.testing.assert_allclose(found, PUBLISHED[f"{name} {severity}"], rtol=tolerance, atol=1.2)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_elastic_displacements_are_as_large_as_published(severity: int) -> None:
    """Read from two ramps: their deviation is that of a filtered uniform field, and of the affine map's corners."""
    stretch, sigma, shear = (
        (488, 170.8, 24.4), (488, 19.52, 48.8), (12.2, 2.44, 4.88), (17.08, 2.44, 4.88), (29.28, 2.44, 4.88),
    )[severity - 1]  # fmt: skip
    ramp = np.arange(224, dtype=np.uint8)
    image = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], np.uint8(0)), -1)
    inner, smooth, rough = slice(90, 134), [], []
    for seed in range(12):
        found = corrupt(image, "elastic_transform", severity, seed).astype(float) - image
        for channel in (0, 1):
            field = found[inner, inner, channel]
            rows, columns = np.meshgrid(np.arange(44), np.arange(44), indexing="ij")
            plane = np.stack([rows.ravel(), columns.ravel(), np.ones(rows.size)], 1)
            left = field.ravel() - plane @ np.linalg.lstsq(plane, field.ravel(), rcond=None)[0]
            smooth.append(field.mean())
            rough.append(left.std())
    if severity > 2:  # Filtered widely the field is nearly a plane here.
        filtered = stretch * np.sqrt(1 / 3) / (2 * np.sqrt(np.pi) * sigma)
        assert np.mean(rough) == pytest.approx(filtered, rel=0.2)
    # The centre moves by a mean of the corners' moves: each uniform, and weights of 0, 1/2 and 1/2.
    assert np.std(smooth) == pytest.approx(shear * np.sqrt(1 / 3) * np.sqrt(1 / 2), rel=0.45)


@pytest.mark.parametrize("name", COMMON)
def test_what_is_drawn_follows_from_the_seed_and_more_severe_is_further_from_clean(name: str) -> None:
    found = {seed: corrupt(CLEAN, name, 3, seed) for seed in (7, 8, 9)}
    assert np.array_equal(found[7], corrupt(CLEAN, name, 3, 7))
    assert found[7].dtype == np.uint8
    fixed = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}
    assert all(np.array_equal(found[7], other) for other in found.values()) == (name in fixed)

    def distance(severity: int) -> float:
        changed = [corrupt(CLEAN, name, severity, seed).astype(float) for seed in range(4)]
        if name in ("frost", "fog"):  # They hide the scene; how far its pixels move saturates.
            return float(np.mean([1 - np.corrcoef(x.ravel(), CLEAN.ravel())[0, 1] for x in changed]))
        return float(np.mean([np.abs(x - CLEAN).mean() for x in changed]))

    # By its published parameters mild elastic distortions move more, severe ones tear more.
    assert name == "elastic_transform" or distance(1) < distance(3)
    assert distance(3) < distance(5)


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from(COMMON), st.sampled_from(SEVERITIES), st.integers(8, 70), st.integers(8, 70),
    st.integers(0, 2**31), st.sampled_from([0, 128, 255]),
)  # fmt: skip
def test_any_size_and_any_image(name: str, severity: int, height: int, width: int, seed: int, value: int) -> None:
    image = np.full((height, width, 3), value, np.uint8)
    found = corrupt(image, name, severity, seed)
    assert found.shape == image.shape
    assert found.dtype == np.uint8
    assert (image == value).all()
    mask = image[..., 0] > 100
    assert moved(mask, name, severity, seed).shape == mask.shape


@pytest.mark.parametrize("severity", [1, 3, 5])
def test_a_mask_moves_as_its_image(severity: int) -> None:
    mask, name = np.zeros((120, 160), bool), "elastic_transform"
    mask[40:90, 70:110] = True
    assert moved(mask, "fog", severity, 5) is mask
    image = np.repeat(255 * mask[..., None].astype(np.uint8), 3, -1)
    found = corrupt(image, name, severity, 5)[..., 0] > 127
    wanted = moved(mask, name, severity, 5)
    assert (found & wanted).sum() / (found | wanted).sum() > 0.98
    assert not np.array_equal(wanted, mask)


def test_names_and_severities() -> None:
    assert parse_corruptions("all") == COMMON
    assert parse_corruptions("snow, fog,fog") == ("snow", "fog")
    assert len(COMMON) == 15
    for text in ("", "mist", "fog,", "fog;snow", "fog,all"):
        with pytest.raises(ConfigError, match="is unknown"):
            parse_corruptions(text)
    with pytest.raises(ConfigError, match="severity is 6"):
        corrupt(CLEAN, "fog", 6, 0)
