"""The page of an explanation: each image with what its layers read, merged and averaged, and what reached the output.

Arrays travel deflated in the page, which asks for nothing; its script is allowed by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import io
import zlib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparsifiner_edge.arrays import Array, Pixels
from sparsifiner_edge.explained import OURS, Explained, ExplainMethod, LayerMaps
from sparsifiner_edge.files import write_bytes, write_text
from sparsifiner_edge.report.rendering import PALETTE, templates
from sparsifiner_edge.report.texts import Texts
from sparsifiner_edge.report.values import clean
from sparsifiner_edge.text import dump_json

_QUALITY = 85
VIEWS = ("read", "reached", "dense", "merged", "cells")
WORDS = {
    "at": ("row", "column"), "stands": ("count",), "read": ("heads", "all"), "all": (),
    "score": ("score", "probe", "deviation"),
}  # fmt: skip
"""What the script says, and the fields that it fills in."""


class ByteRange(NamedTuple):
    """Bytes 0 to 255 stand for these."""

    low: float
    high: float


def write_explanation(images: Sequence[Explained], method: ExplainMethod, output: Path, language: str = "en") -> Path:
    """Write `index.html`.

    Args:
        images, method: as explained. output: the page. language: "en" or "ja".

    Raises:
        ConfigError: no such language. MissingExtraError: jinja2 is not installed. ArtifactError: the disk refuses.
    """
    texts = Texts(language)
    script = (importlib.resources.files("sparsifiner_edge.report") / "template" / "explain.js").read_text("utf-8")
    data = {
        "heads": method.heads,
        "words": {
            name: texts(f"explain.js.{name}", **{field: f"{{{field}}}" for field in fields})
            for name, fields in WORDS.items()
        },
        "images": [_image(image) for image in images],
    }
    text = templates().get_template("explain.html").render(
        t=texts, palette=PALETTE, what=method.explained, script=script, views=VIEWS,
        version=version("sparsifiner-edge"),
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        # Inside of <script> nothing but "</" could end it.
        data=dump_json(data, indent=None).strip().replace("</", "<\\/"),
        images=[(clean(image.path.name, 80), len(image.layers), image.summary) for image in images],
    )  # fmt: skip
    write_text(output, text)
    return output


def _image(image: Explained) -> dict[str, Any]:
    rows, columns = image.reached[OURS].shape
    return {
        "photo": f"data:image/jpeg;base64,{base64.b64encode(_jpeg(image.image)).decode()}",
        "rows": rows, "columns": columns, "width": image.image.shape[1], "height": image.image.shape[0],
        "reached": {name: _packed(_bytes(values)[0]) for name, values in image.reached.items()},
        "layers": [_layer(layer) for layer in image.layers],
    }  # fmt: skip


def _layer(layer: LayerMaps) -> dict[str, Any]:
    probe, probes = _bytes(layer.probe)
    deviation, deviations = _bytes(layer.deviation)
    cells = np.round(layer.cells.clip(0, 1) * 255).astype(np.uint8)
    parts = layer.token.astype("<u2"), layer.heads.astype(np.uint8), probe, deviation, cells
    return {
        "tokens": len(layer.cells), "tile": layer.tile, "tiles": len(layer.heads), "probe": probes,
        "deviation": deviations, "packed": _packed(*parts),
    }  # fmt: skip


def _bytes(values: Array) -> tuple[Array, ByteRange]:
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    scaled = (np.nan_to_num(values, nan=low, neginf=low, posinf=high) - low) / (high - low or 1)
    return np.round(scaled * 255).astype(np.uint8), ByteRange(round(low, 4), round(high, 4))


def _packed(*arrays: Array) -> str:
    content = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)
    return base64.b64encode(zlib.compress(content, 9)).decode()


def _jpeg(pixels: Pixels) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()


def write_overview(image: Explained, output: Path) -> Path:
    """One picture, for a report: the photograph; what its layers read, on average; what merged by the last layer; what
    reached the output.
    """
    from PIL import Image

    pixels = image.image
    rows, columns = image.reached[OURS].shape
    read = np.mean([_read_share(layer) for layer in image.layers], 0).reshape(rows, columns)
    panels = [pixels, _heat(pixels, read), _mosaic(pixels, image.layers[-1].token.reshape(rows, columns))]
    panels.append(_heat(pixels, image.reached[OURS]))
    gap = np.full((pixels.shape[0], 6, 3), 255, np.uint8)
    strip = np.concatenate([part for panel in panels for part in (panel, gap)][:-1], 1)
    buffer = io.BytesIO()
    Image.fromarray(strip).save(buffer, "PNG")
    write_bytes(output, buffer.getvalue())
    return output


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
