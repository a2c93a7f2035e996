"""How much of what a student reads and merges changes when its image hardly does, beside dense attention's own change.

All is compared patch by patch, a flipped image's patches at the places that they come from:

- *lists*: of the keys that heads read for a patch, the share that is other (a half of the difference, over the mean);
- *merges*: of the pairs of patches that are one token at the end, the share that is in one of the two alone;
- *attention*, ours and dense: half of the summed difference of a patch's attention, mean of heads: 0 the same, 1
  nothing in common.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparsifiner_edge.arrays import Pixels
from sparsifiner_edge.evaluate.connections import SeenLayer, look, weights_of
from sparsifiner_edge.explained import Changed
from sparsifiner_edge.order import inverse
from sparsifiner_edge.sparse.attention import LandmarkAttention
from sparsifiner_edge.sparse.student import Student

LITTLE_NOISE = 2.0
"""Standard deviation, of 255."""


def noisy(image: Pixels, seed: int = 0) -> Pixels:
    """With a little Gaussian noise."""
    added = np.random.default_rng(seed).normal(0, LITTLE_NOISE, image.shape)
    return np.asarray((image + added).round().clip(0, 255), np.uint8)


def shifted(image: Pixels) -> Pixels:
    """By one pixel to the right, the left column repeated."""
    return np.ascontiguousarray(np.concatenate([image[:, :1], image[:, :-1]], 1))


def flipped(image: Pixels) -> Pixels:
    """Left and right exchanged."""
    return np.ascontiguousarray(image[:, ::-1])


PERTURBED: dict[str, Callable[[Pixels], Pixels]] = {"noise": noisy, "shift": shifted, "flip": flipped}


class PatchView(NamedTuple):
    """A layer, patch by patch in raster order: reads [P,P], share of heads, None of a dense one; attention [P,P]."""

    reads: Tensor | None
    attention: Tensor


@torch.no_grad()
def steadiness(student: Student, image: Pixels) -> dict[str, Changed]:
    """By perturbation what changes, mean of patches and layers.

    Args:
        image: uint8 [H,W,3].
    """
    backbone = student.backbone
    curve = torch.from_numpy(inverse(backbone.layers[0].curve.order.numpy()))
    raster = torch.arange(backbone.patches).reshape(backbone.grid)
    found = {}
    before = [look(student, image, densely) for densely in (False, True)]
    for name, perturb in PERTURBED.items():
        back = raster.flip(1).ravel() if name == "flip" else raster.ravel()
        after = [look(student, perturb(image), densely) for densely in (False, True)]
        pairs = [
            [(_view(a, curve), _view(b, curve, back)) for a, b in zip(*both, strict=True)]
            for both in zip(before, after, strict=True)
        ]
        lists = [_changed(a.reads, b.reads) for a, b in pairs[0] if a.reads is not None and b.reads is not None]
        ours, dense = ([_apart(a.attention, b.attention) for a, b in side] for side in pairs)
        found[name] = Changed(
            lists=_mean(lists), merges=_merges(before[0][-1], after[0][-1], curve, back), attention=_mean(ours),
            dense=_mean(dense),
        )  # fmt: skip
    return found


def _view(seen: SeenLayer, curve: Tensor, back: Tensor | None = None) -> PatchView:
    weights, token = weights_of(seen), _tokens(seen, curve, back)
    patches = weights.attention[:, seen.prefix :, seen.prefix :].mean(0)
    sizes = seen.sizes[seen.prefix :]
    attention = (patches / sizes)[token][:, token]
    if weights.read is None or seen.sparse is None:
        return PatchView(None, attention)
    tile = 1 if isinstance(seen.sparse, LandmarkAttention) else seen.sparse.sparsity.tile
    reads = weights.read.float().mean(0)[torch.arange(len(sizes)) // tile]
    return PatchView(reads[token][:, token], attention)


def _tokens(seen: SeenLayer, curve: Tensor, back: Tensor | None) -> Tensor:
    """The token of each patch on entry, by the place that the patch comes from."""
    places = torch.arange(len(curve)) if seen.tokens.places is None else seen.tokens.places[0]
    found = places[curve]
    return found if back is None else found[back]


def _changed(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().sum() / (a.sum() + b.sum()))


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().sum(1).mean() / 2)


def _merges(a: SeenLayer, b: SeenLayer, curve: Tensor, back: Tensor) -> float:
    """Of pairs of patches in one token."""
    one, other = _tokens(a, curve, None), _tokens(b, curve, back)
    first, second = ((x[:, None] == x[None]).triu(1) for x in (one, other))
    either = int((first | second).sum())
    return 1 - int((first & second).sum()) / either if either else 0.0


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else 0.0
