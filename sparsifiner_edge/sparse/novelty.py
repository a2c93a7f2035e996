"""The score `novelty` in torch: which tokens it is made of, how it is fitted, and the module that is exported."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.numpy
import torch
from torch import Tensor, nn

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.artifacts import NOVELTY_FILE, sha256
from sparsifiner_edge.errors import ArtifactError, ConfigError, ImageError
from sparsifiner_edge.files import read_bytes
from sparsifiner_edge.images import evenly, load_image
from sparsifiner_edge.novelty import COMPONENTS, FALSE_ALARMS, Density, fit_density
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.sparse.hosts import Backbone
from sparsifiner_edge.sparse.layer import CarriedTokens, carried
from sparsifiner_edge.sparse.student_file import SPARSIFY_AGAIN, NoveltyConfig
from sparsifiner_edge.sparse.weights import normalise

if TYPE_CHECKING:
    from sparsifiner_edge.sparse.student import Student

FITTED_IMAGES = 500
_MOST_BYTES = 1 << 26


@dataclasses.dataclass(frozen=True)
class Novelty:
    """What a student knows of its calibration images.

    Attributes:
        layer: after which the patches are looked at. images: how many it was fitted to. false_alarms: share of them
            that may score above 1.
    """

    density: Density
    layer: int
    images: int
    false_alarms: float = FALSE_ALARMS


def layer_of(depth: int) -> int:
    """The last of the first quarter of the layers: later ones see subjects more and the image less."""
    return max(0, depth // 4 - 1)


class NoveltyScore(nn.Module):
    """Tokens after the layer -> the score [B,1], float32."""

    mean: Tensor
    scale: Tensor
    components: Tensor
    variances: Tensor
    rest: Tensor
    limit: Tensor
    usual: Tensor
    below: Tensor

    def __init__(self, density: Density) -> None:
        super().__init__()
        for name, value in density._asdict().items():
            self.register_buffer(name, torch.from_numpy(value))

    def forward(self, tokens: CarriedTokens) -> Tensor:
        """See `sparsifiner_edge.novelty.novelty`."""
        rows = statistics_of(tokens)
        z = (rows - self.mean) * self.scale
        along = z @ self.components
        total = (along * along * self.variances).sum(1, keepdim=True) + (z * z).sum(1, keepdim=True) * self.rest
        contrast = rows[:, rows.shape[1] // 2 :].mean(1, keepdim=True)
        emptier = ((self.usual - contrast) * self.below).relu()
        return torch.maximum((total * self.limit).sqrt(), emptier**4)


def statistics_of(tokens: CarriedTokens) -> Tensor:
    """Mean of each channel over the original patches, and the logarithm of its deviation: [B,2C], float32."""
    count = tokens.positions.shape[1]
    patches = tokens.values[:, -count:].float()
    if tokens.sizes is None:
        mean = patches.mean(1, keepdim=True)
        off = patches - mean
        variance = (off * off).mean(1, keepdim=True)
    else:
        sizes = tokens.sizes[:, None, -count:]
        shares = sizes / sizes.sum(2, keepdim=True)
        mean = shares @ patches
        off = patches - mean
        variance = shares @ (off * off)
    return torch.cat([mean, (variance + 1e-12).log() / 2], 2)[:, 0]


@contextlib.contextmanager
def tokens_after(backbone: Backbone, layer: int) -> Iterator[list[CarriedTokens]]:
    """What comes out of a layer while the model runs, one entry per run."""
    seen: list[CarriedTokens] = []

    def look(_module: Any, _inputs: Any, output: Any) -> None:
        seen.append(carried(output[0] if isinstance(output, tuple) else output, backbone.prefix))

    hook = backbone.layers[layer].register_forward_hook(look)
    try:
        yield seen
    finally:
        hook.remove()


class _SeenError(Exception):
    """Raised where the rest of a model is not needed."""


@torch.no_grad()
def statistics(student: Student, paths: Sequence[Path], layer: int, progress: Progress | None = None) -> Array:
    """Of images as the student sees them, but for those that cannot be read: [images,2C]."""
    model, backbone, rows = student.model.eval(), student.backbone, []

    def stop(*_: Any) -> None:
        raise _SeenError

    with tokens_after(backbone, layer) as seen:
        end = backbone.layers[layer].register_forward_hook(stop)
        try:
            for number, path in enumerate(paths):
                with contextlib.suppress(ImageError):
                    image = torch.from_numpy(load_image(path, student.img_size))[None]
                    with contextlib.suppress(_SeenError):
                        model(normalise(image, student.normalisation))
                    rows.append(statistics_of(seen.pop())[0].numpy())
                if progress:
                    progress("novelty", number + 1, len(paths))
        finally:
            end.remove()
    return np.stack(rows) if rows else np.zeros((0, 2 * backbone.width), np.float32)


def with_novelty(student: Student, paths: Sequence[Path], progress: Progress | None = None) -> Student:
    """The student with a density fitted to at most `FITTED_IMAGES` of these, evenly taken; without one where those that
    can be read are too few, or all the same.
    """
    layer = layer_of(len(student.backbone.layers))
    rows = statistics(student, evenly(sorted(paths), FITTED_IMAGES), layer, progress)
    try:
        found = Novelty(fit_density(rows), layer, len(rows))
    except ConfigError:
        found = None
    return dataclasses.replace(student, novelty=found)


def write_novelty(novelty: Novelty, folder: Path) -> NoveltyConfig:
    """A student's file of it, and what its configuration says."""
    path = folder / NOVELTY_FILE
    path.write_bytes(safetensors.numpy.save(novelty.density._asdict()))
    return NoveltyConfig(novelty.layer, novelty.images, novelty.false_alarms, sha256(path))


def read_novelty(config: NoveltyConfig, folder: Path, backbone: Backbone) -> Novelty:
    """What `write_novelty` wrote, for this backbone.

    Raises:
        ArtifactError: missing, altered, or of another model.
    """
    path, statistics_count = folder / NOVELTY_FILE, 2 * backbone.width
    content = read_bytes(path, _MOST_BYTES)
    if hashlib.sha256(content).hexdigest() != config.sha256:
        raise ArtifactError(f"{path} does not match its SHA-256.", SPARSIFY_AGAIN)
    try:
        density = Density(**safetensors.numpy.load(content))
    except (safetensors.SafetensorError, TypeError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}.", SPARSIFY_AGAIN) from error
    each = (statistics_count,)
    shapes = [each, each, (statistics_count, COMPONENTS), (COMPONENTS,), (1,), (1,), (1,), (1,)]
    fits = [x.shape for x in density] == shapes and all(x.dtype == np.float32 and np.isfinite(x).all() for x in density)
    if not fits or config.layer >= len(backbone.layers):
        raise ArtifactError(f"{path} is of another model.", SPARSIFY_AGAIN)
    return Novelty(density, config.layer, config.images, config.false_alarms)
