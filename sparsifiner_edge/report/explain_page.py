"""Page of an explanation: what the layers read and merged of each image, and which patches the features depend on.

It is one file without scripts or requests.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np

from sparsifiner_edge.arrays import Array, Pixels
from sparsifiner_edge.files import write_text
from sparsifiner_edge.outcomes import Explained, ExplainMethod
from sparsifiner_edge.report.texts import Texts, templates
from sparsifiner_edge.report.values import clean


def write_explanation(images: Sequence[Explained], method: ExplainMethod, output: Path, language: str = "en") -> Path:
    """Write the page.

    Args:
        images: Explained images.
        method: How they were explained.
        output: The page.
        language: "en" or "ja".

    Raises:
        ConfigError: There is no such language.
        MissingExtraError: jinja2 is not installed.
        ArtifactError: The disk refuses.
    """
    shown = [(clean(image.path.name), base64.b64encode(_overview(image)).decode(), image.summary) for image in images]
    page = templates().get_template("explain.html")
    write_text(output, page.render(t=Texts(language), method=method, images=shown, version=version("sparsifiner-edge")))
    return output


def _overview(image: Explained) -> bytes:
    """Return a JPEG of the photograph, the layers' mean reads, the last layer's merges, and the patches' importance."""
    from PIL import Image

    pixels, importance = image.image, image.importance
    shares = [
        (read / max(float(read.max()), 1e-9))[token] for token, read in zip(image.merged, image.read, strict=True)
    ]
    read, merged = np.mean(shares, 0), _mosaic(pixels, image.merged[-1].reshape(importance.shape))
    panels = [pixels, _heat(pixels, read.reshape(importance.shape)), merged, _heat(pixels, importance)]
    gap, buffer = np.full((pixels.shape[0], 6, 3), 255, np.uint8), io.BytesIO()
    drawn = np.concatenate([part for panel in panels for part in (panel, gap)][:-1], 1)
    Image.fromarray(drawn).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _heat(pixels: Pixels, values: Array) -> Pixels:
    """Draw high values bright and low values dark."""
    ranked = np.argsort(np.argsort(values.ravel())).reshape(values.shape) / max(values.size - 1, 1)
    strength = _blown(ranked, pixels.shape)[..., None]
    warm = np.array([255, 120, 0])
    return np.asarray((pixels * (0.25 + 0.45 * strength) + warm * 0.3 * strength).clip(0, 255), np.uint8)


def _mosaic(pixels: Pixels, token: Array) -> Pixels:
    """Draw each token in the mean colour of its patches; tokens of several patches are outlined."""
    owner = _blown(token, pixels.shape)
    count = np.maximum(np.bincount(owner.ravel()), 1)
    means = [np.bincount(owner.ravel(), pixels[..., channel].ravel()) / count for channel in range(3)]
    mosaic = np.stack([mean[owner] for mean in means], -1)
    edges = np.zeros(owner.shape, bool)
    edges[1:] |= owner[1:] != owner[:-1]
    edges[:, 1:] |= owner[:, 1:] != owner[:, :-1]
    return np.asarray(np.where(edges[..., None], 255, mosaic), np.uint8)


def _blown(values: Array, shape: tuple[int, ...]) -> Array:
    """Repeat values of patches for every pixel."""
    return values.repeat(shape[0] // values.shape[0], 0).repeat(shape[1] // values.shape[1], 1)
