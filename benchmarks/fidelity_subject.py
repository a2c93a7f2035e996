"""Subject of `fidelity.py`: DINOv2 ViT-S/14 at one image size, its teacher's tokens, variations of the sparse model."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.demo import material, split
from sparsifiner_edge.images import load_image
from sparsifiner_edge.ops import torch as ops
from sparsifiner_edge.sparse import calibrate
from sparsifiner_edge.sparse.attention import KeySelector, SparseAttention
from sparsifiner_edge.sparse.hosts.timm import load_model, preprocessing
from sparsifiner_edge.sparse.student import Student, dense_twin, make_student
from sparsifiner_edge.sparse.weights import normalise

Chooser = Callable[[SparseAttention, Tensor], Tensor]
"""Alternative key selection: (layer, qkv [1,N,3C]) -> indices int32 [1,H,T,K]."""


ERROR_IMAGES = 3
"""Number of photographs for the errors per layer."""


def weights_file() -> Path:
    """Return the file of DINOv2 ViT-S/14 in timm's key names, unpacked once per machine."""
    path = Path(tempfile.gettempdir()) / "sparsifiner-edge-dinov2-vits14.safetensors"
    if not path.exists():
        scratch = path.with_suffix(".part")
        scratch.write_bytes(safetensors.numpy.save(material.dinov2_state()))
        scratch.rename(path)
    return path


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """Agreement with the dense teacher over the eight photographs.

    Attributes:
        features: Cosine of the class features per photograph.
        patches: Cosine of the patches per photograph.
        errors: Relative error of the attention output per layer, on the teacher's own activations, mean over the first
        three photographs.
    """

    features: list[float]
    patches: list[float]
    errors: list[float]


class Subject:
    """A sparse model whose settings can be changed in place; projections are cached per source."""

    def __init__(self, size: int, preset: str = "edge", photographs: Sequence[Path] | None = None) -> None:
        """Load the model. `photographs`: images to measure; None: the development set."""
        self.size, self.preset = size, preset
        model = load_model(material.DINOV2, weights_file(), size)
        start = SparsityConfig.for_preset(preset, keep=0.5, channels=32 if preset == "paper" else None)
        self.student = make_student(Student(model, material.DINOV2, preprocessing(model)), start)
        self.model: Any = self.student.model
        self.layers = calibrate.sparse_layers(self.model)
        self.patches = int(model.patch_embed.num_patches)
        pre = preprocessing(self.model)
        self.photographs, self.calibration = (
            [normalise(torch.from_numpy(load_image(path, size))[None], pre) for path in paths]
            for paths in (photographs or split.images("development"), split.images("calibration"))
        )
        teacher = dense_twin(self.student).model
        with torch.no_grad():
            self.teacher = [teacher.forward_features(x) for x in self.photographs]
        self._small: Subject | None = None
        self._projections: dict[tuple[Any, ...], list[dict[str, Tensor]]] = {}

    def configure(self, sparsity: SparsityConfig, source: str = "descent") -> None:
        """Set the sparsity, with projections from `source`.

        Args:
            source: "weights", "moments" (whitened singular vectors from images), "descent" (then refined), both at most
            at 224 px; "at size" (descent at this size); or "exact" (all channels).
        """
        for layer in self.layers:
            self._set(layer, sparsity)
        key = (source, sparsity.channels, sparsity.query_pool, sparsity.value_power > 0, sparsity.background_tokens > 0)
        if key not in self._projections:
            self._projections[key] = self._find(source, sparsity)
        for number, layer in enumerate(self.layers):
            layer.select.load_state_dict(self._projections[key][number])

    def _set(self, layer: SparseAttention, sparsity: SparsityConfig) -> None:
        layer.sparsity, layer.layout = sparsity, sparsity.layout(self.patches)
        if isinstance(layer.select, KeySelector) and layer.select.proj_q.shape[-1] != sparsity.channels:
            layer.select = KeySelector(layer.geometry.heads, layer.geometry.dim, sparsity.channels)

    def _find(self, source: str, sparsity: SparsityConfig) -> list[dict[str, Tensor]]:
        if source in ("moments", "descent") and self.size > 224 and self.preset == "edge":
            self._small = self._small or Subject(224)
            self._small.configure(
                dataclasses.replace(sparsity, background_tokens=min(sparsity.background_tokens, 16)), source
            )
            return [layer.select.state_dict() for layer in self._small.layers]
        if source == "weights":
            calibrate.calibrate_from_weights(self.model)
        elif source == "exact":
            for layer in self.layers:
                eye = torch.eye(layer.geometry.dim).expand(layer.geometry.heads, -1, -1)
                layer.select.load_state_dict({"proj_q": eye, "proj_k": eye})
        else:
            passes, calibrate.PASSES = calibrate.PASSES, 0 if source == "moments" else calibrate.PASSES
            calibrate.calibrate_from_images(self.model, self.calibration)
            calibrate.PASSES = passes
        return [{k: v.clone() for k, v in layer.select.state_dict().items()} for layer in self.layers]

    @torch.no_grad()
    def measure(self, choose: Chooser | None = None, attend: Any = None) -> Fidelity:
        """Run the photographs; `choose` and `attend` replace the layers' own selection and attention."""
        for layer in self.layers:
            if choose:
                layer.indices = lambda qkv, *_, layer=layer: choose(layer, qkv)
            if attend:
                layer.attend = lambda qkv, *_, layer=layer: attend(layer, qkv)
        try:
            cosines = [
                F.cosine_similarity(self.model.forward_features(x), t, dim=-1)[0]
                for x, t in zip(self.photographs, self.teacher, strict=True)
            ]
            found = self._layer_errors()
        finally:
            for layer in self.layers:
                layer.__dict__.pop("indices", None)
                layer.__dict__.pop("attend", None)
        return Fidelity([float(c[0]) for c in cosines], [float(c[1:].mean()) for c in cosines], found)

    def _layer_errors(self) -> list[float]:
        totals = np.zeros(len(self.layers))
        changed = [layer.__dict__.pop("attend", None) for layer in self.layers]
        for picture in self.photographs[:ERROR_IMAGES]:
            seen = list(calibrate._dense_pass(self.model, picture))
            for number, (layer, qkv) in enumerate(seen):
                dense = ops.dense_attention(qkv, num_heads=layer.geometry.heads, scale=layer.geometry.scale)
                ours = changed[number](qkv) if changed[number] else layer.attend(qkv)
                totals[number] += float((ours - dense).norm() / dense.norm())
        return list(totals / len(self.photographs[:ERROR_IMAGES]))


def from_scores(layer: SparseAttention, scores: Tensor) -> Tensor:
    """Return the top keys of scores [1,H,T,P]."""
    return ops.top_keys(scores, layer.layout.keys)


def random_keys(layer: SparseAttention, _: Tensor) -> Tensor:
    """Return random keys for each head and tile."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, layer.geometry.heads, layer.layout.tiles, layer.layout.patches)
    return from_scores(layer, torch.rand(shape, generator=generator))


def local_window(model: Any) -> Chooser:
    """Return the keys nearest to the tile's centre, the same for every image and head."""
    width = model.patch_embed.grid_size[1]

    def choose(layer: SparseAttention, _: Tensor) -> Tensor:
        order = model.blocks[0].curve.order
        place = torch.stack([order // width, order % width], -1).float()
        centres = ops.run_means(place, layer.sparsity.tile)
        scores = -torch.cdist(centres, place)
        return from_scores(layer, scores.expand(1, layer.geometry.heads, -1, -1))

    return choose


def cell_means(layer: SparseAttention, qkv: Tensor) -> Tensor:
    """Compute attention whose background tokens average all their tokens, not only those not selected."""
    first, layout, tile, scale = layer.num_prefix, layer.layout, layer.sparsity.tile, layer.geometry.scale
    all_q, all_k, all_v = ops.split_heads(qkv, layer.geometry.heads)
    q, k, v = (x[:, :, first:] for x in (all_q, all_k, all_v))
    mask = torch.zeros(1, layer.geometry.heads, layout.tiles, layout.patches)
    mask.scatter_(3, layer.indices(qkv).long(), 1.0)
    listed = mask.repeat_interleave(tile, 2)[:, :, : q.shape[2]] > 0
    logits = (scale * q @ k.mT).masked_fill(~listed, -math.inf)
    member = F.one_hot(torch.arange(layout.patches) // layout.key_pool, layout.background_tokens).float()
    keys, values = (ops.run_means(x, layout.key_pool) for x in (k, v))
    left = ((1 - mask) @ member).log().repeat_interleave(tile, 2)[:, :, : q.shape[2]]
    parts = [scale * q @ all_k[:, :, :first].mT, logits, scale * q @ keys.mT + left]
    shares = torch.cat(parts, -1).softmax(-1).split([part.shape[-1] for part in parts], -1)
    out = shares[0] @ all_v[:, :, :first] + shares[1] @ v + shares[2] @ values
    prefix = F.scaled_dot_product_attention(all_q[:, :, :first], all_k, all_v, scale=scale)
    return torch.cat([prefix, out], 2).transpose(1, 2).flatten(2)
