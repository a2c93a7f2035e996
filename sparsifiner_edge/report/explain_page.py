"""The page of an explanation: each image with what its layers read, merged and averaged, and what reached the output.

One file without a script, which asks for nothing.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np

from sparsifiner_edge.arrays import Array, Pixels
from sparsifiner_edge.explained import OURS, Explained, ExplainMethod, LayerMaps
from sparsifiner_edge.files import write_bytes, write_text
from sparsifiner_edge.report.rendering import PALETTE, templates
from sparsifiner_edge.report.texts import Texts
from sparsifiner_edge.report.values import clean

_QUALITY = 85
_KEYS = 5
"""Of what a place reads, so many of each layer are on the page; the result file holds more."""


def write_explanation(images: Sequence[Explained], method: ExplainMethod, output: Path, language: str = "en") -> Path:
    """Write `index.html`.

    Args:
        images, method: as explained. output: the page. language: "en" or "ja".

    Raises:
        ConfigError: no such language. MissingExtraError: jinja2 is not installed. ArtifactError: the disk refuses.
    """
    text = templates().get_template("explain.html").render(
        t=Texts(language), palette=PALETTE, method=method, most=_KEYS, version=version("sparsifiner-edge"),
        images=[(clean(image.path.name, 80), _address(image), image.summary) for image in images],
    )  # fmt: skip
    write_text(output, text)
    return output


def _address(image: Explained) -> str:
    """Of its overview, as data."""
    return f"data:image/jpeg;base64,{base64.b64encode(_encoded(_overview(image), 'JPEG')).decode()}"


def _encoded(pixels: Pixels, form: str) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, quality=_QUALITY)
    return buffer.getvalue()


def write_overview(image: Explained, output: Path) -> Path:
    """One picture, for a report: the photograph; what its layers read, on average; what merged by the last layer; what
    reached the output.
    """
    write_bytes(output, _encoded(_overview(image), "PNG"))
    return output


def _overview(image: Explained) -> Pixels:
    pixels = image.image
    rows, columns = image.reached[OURS].shape
    read = np.mean([_read_share(layer) for layer in image.layers], 0).reshape(rows, columns)
    panels = [pixels, _heat(pixels, read), _mosaic(pixels, image.layers[-1].token.reshape(rows, columns))]
    panels.append(_heat(pixels, image.reached[OURS]))
    gap = np.full((pixels.shape[0], 6, 3), 255, np.uint8)
    return np.concatenate([part for panel in panels for part in (panel, gap)][:-1], 1)


def _read_share(layer: LayerMaps) -> Array:
    """Of each patch, how often tiles and heads read its token, of the most [P]."""
    share = layer.heads.mean(0)
    return np.asarray((share / max(float(share.max()), 1e-9))[layer.token])


def _heat(pixels: Pixels, values: Array) -> Pixels:
    """Bright where much is, dark where little is."""
    ranked = np.argsort(np.argsort(values.ravel())).reshape(values.shape) / max(values.size - 1, 1)
    strength = _blown(ranked, pixels.shape)[..., None]
    warm = np.array([255, 120, 0])
    return np.asarray((pixels * (0.25 + 0.45 * strength) + warm * 0.3 * strength).clip(0, 255), np.uint8)


def _mosaic(pixels: Pixels, token: Array) -> Pixels:
    """Each token in the mean colour of its patches, those that stand for several outlined."""
    owner = _blown(token, pixels.shape)
    count = np.maximum(np.bincount(owner.ravel()), 1)
    means = [np.bincount(owner.ravel(), pixels[..., channel].ravel()) / count for channel in range(3)]
    mosaic = np.stack([mean[owner] for mean in means], -1)
    edges = np.zeros(owner.shape, bool)
    edges[1:] |= owner[1:] != owner[:-1]
    edges[:, 1:] |= owner[:, 1:] != owner[:, :-1]
    return np.asarray(np.where(edges[..., None], 255, mosaic), np.uint8)


def _blown(values: Array, shape: tuple[int, ...]) -> Array:
    """Values of patches, for every pixel."""
    return values.repeat(shape[0] // values.shape[0], 0).repeat(shape[1] // values.shape[1], 1)
