"""In-place patch of timm's VisionTransformer and Eva: sparse attention, patch tokens laid along the Hilbert curve."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from timm.layers.attention import Attention, AttentionRope
from timm.layers.patch_embed import PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva, EvaAttention, EvaBlockPostNorm
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import Tensor, nn

from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.errors import ConfigError, UnsupportedModelError
from sparsifiner_edge.sparse.attention import make_dense, make_sparse
from sparsifiner_edge.sparse.order import hilbert_order, inverse

SUPPORTED = "timm's VisionTransformer (ViT, DeiT, DINOv2) and Eva (EVA-02, DINOv3, ViT with RoPE)"


class SparseViTMixin:
    """Modifications of timm's VisionTransformer and Eva.

    - `_pos_embed`: afterwards the patch tokens are laid along the curve, and with them the tables of rotary embeddings;
      all blocks are indifferent to order.
    - `forward_features`, `forward_intermediates`: patch tokens are returned in raster order, as timm returns them.
    - `sparsity`: the SparsityConfig; `token_order`, `raster_order`: int64 [P] permutations.
    """

    sparsity: SparsityConfig
    num_prefix_tokens: int
    token_order: Tensor
    raster_order: Tensor

    def _permuted(self, x: Tensor, order: Tensor) -> Tensor:
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        return torch.cat([prefix, patches.index_select(1, order)], 1)

    def _pos_embed(self, x: Tensor) -> Any:
        placed = super()._pos_embed(x)  # type: ignore[misc]
        if not isinstance(placed, tuple):
            return self._permuted(placed, self.token_order)
        tokens, rope = placed
        return self._permuted(tokens, self.token_order), None if rope is None else rope.index_select(
            -2, self.token_order
        )

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Images [B,3,H,W] -> tokens [B,N,C] after the final norm: prefix, then patches in raster order."""
        tokens = super().forward_features(x, attn_mask=attn_mask, is_causal=is_causal)  # type: ignore[misc]
        return self._permuted(tokens, self.raster_order)

    def forward_intermediates(self, x: Tensor, *args: Any, output_fmt: str = "NCHW", **options: Any) -> Any:
        """As timm's, with patches in raster order; `output_dict` is not supported."""
        if options.get("output_dict"):
            raise ConfigError("forward_intermediates of a sparse model takes no output_dict.", "Leave it out.")
        result = super().forward_intermediates(x, *args, output_fmt="NLC", **options)  # type: ignore[misc]
        grid = cast(Any, self).patch_embed.grid_size if output_fmt == "NCHW" else None
        if options.get("intermediates_only"):
            return [self._raster(item, grid) for item in result]
        final, items = result
        return self._permuted(final, self.raster_order), [self._raster(item, grid) for item in items]

    def _raster(self, item: Any, grid: tuple[int, int] | None) -> Any:
        """One intermediate, patches [B,P,C] or (patches, prefix): raster order, as a map [B,C,h,w] if `grid`."""
        if isinstance(item, tuple):
            return self._raster(item[0], grid), item[1]
        item = item.index_select(1, self.raster_order)
        return item.transpose(1, 2).unflatten(2, grid).contiguous() if grid else item


def token_order(sparsity: SparsityConfig, grid: tuple[int, int]) -> npt.NDArray[np.int64]:
    """Raster indices in the order of the tokens: the Hilbert curve; the published method knows raster order alone."""
    return np.arange(grid[0] * grid[1]) if sparsity.preset == "paper" else hilbert_order(*grid)


def support_refusals(model: nn.Module) -> list[str]:
    """Reasons why a model cannot be made sparse; empty when it can."""
    if isinstance(model, SparseViTMixin):
        return ["it is sparse already"]
    if type(model) not in (VisionTransformer, VisionTransformerDistilled, Eva):
        return [f"it is a {type(model).__name__}; supported are {SUPPORTED}"]
    checks = [
        (type(model.patch_embed) is PatchEmbed, f"patch embedding {type(model.patch_embed).__name__}"),
        (not model.dynamic_img_size, "dynamic image size (the token order is fixed): create it with img_size"),
        (model.patch_drop is None or isinstance(model.patch_drop, nn.Identity), "patch dropout"),
    ]
    reasons = [reason for fine, reason in checks if not fine]
    layers: dict[str, list[int]] = {}
    for number, block in enumerate(cast(Any, model).blocks):
        for reason in _block_refusals(block):
            layers.setdefault(reason, []).append(number)
    return reasons + [f"layer {', '.join(map(str, numbers))}: {reason}" for reason, numbers in layers.items()]


def _block_refusals(block: nn.Module) -> list[str]:
    attention: Any = getattr(block, "attn", None)
    if type(attention) not in (Attention, AttentionRope, EvaAttention):
        return [f"{type(block).__name__} with {type(attention).__name__} in place of timm's Attention"]
    if getattr(attention, "num_kv_groups", 1) > 1:
        return [f"grouped-query attention, {attention.num_kv_groups} query heads to a key head"]
    if isinstance(block, (ResPostBlock, EvaBlockPostNorm)):
        return [f"{type(block).__name__} normalises after attention"]
    dropout = attention.attn_drop.p
    return [f"attention dropout {dropout}"] if dropout else []


def make_model_sparse(model: nn.Module, sparsity: SparsityConfig) -> nn.Module:
    """Make a timm model sparse, in place; projections are zero until calibrated or loaded.

    Args:
        model: a VisionTransformer or Eva of timm with a fixed image size.
        sparsity: what is sparse; with nothing sparse the model is left untouched.

    Returns:
        The same object.

    Raises:
        UnsupportedModelError: with every reason.
        ConfigError: tile, cells or dense layers do not fit this model.
    """
    reasons = support_refusals(model)
    if reasons:
        raise UnsupportedModelError(
            f"This model cannot be made sparse: {'; '.join(reasons)}.", f"Choose one of {SUPPORTED}."
        )
    vit = cast(Any, model)
    grid = cast("tuple[int, int]", tuple(vit.patch_embed.grid_size))
    sparse_layers = sparsity.sparse_layers(len(vit.blocks))
    if not sparse_layers:
        return model
    layout = sparsity.layout(grid[0] * grid[1], vit.num_prefix_tokens)
    order = token_order(sparsity, grid)
    for number, block in enumerate(vit.blocks):
        if number in sparse_layers:
            make_sparse(block.attn, sparsity, layout, vit.num_prefix_tokens)
        else:
            make_dense(block.attn)
    vit.register_buffer("token_order", torch.from_numpy(order), persistent=False)
    vit.register_buffer("raster_order", torch.from_numpy(inverse(order)), persistent=False)
    vit.sparsity = sparsity
    vit.__class__ = type(f"Sparse{type(model).__name__}", (SparseViTMixin, type(model)), {})
    return model
