"""In-place patch of timm's VisionTransformer and Eva: sparse attention, patch tokens laid along the Hilbert curve."""

from __future__ import annotations

from typing import Any, TypeVar, cast

import numpy as np
import torch
from timm.layers.attention import Attention, AttentionRope
from timm.layers.patch_embed import PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva, EvaAttention, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.errors import ConfigError, UnsupportedModelError
from sparsifiner_edge.ops import torch as ops
from sparsifiner_edge.sparse.attention import SparseAttention, make_dense, make_sparse, restore_attention
from sparsifiner_edge.sparse.order import hilbert_order, inverse
from sparsifiner_edge.sparse.prune import PrunedBlock, make_pruned, make_whole

AnyModule = TypeVar("AnyModule", bound=nn.Module)
SUPPORTED = "timm's VisionTransformer (ViT, DeiT, DINOv2) and Eva (EVA-02, DINOv3, ViT with RoPE)"


class SparseViTMixin:
    """Modifications of timm's VisionTransformer and Eva.

    - `_pos_embed`: afterwards the patch tokens are laid along the curve, and with them the tables of rotary embeddings;
      all blocks are indifferent to order.
    - `forward_features`, `forward_intermediates`: patch tokens are returned in raster order, as timm returns them.
    - `forward_tokens`: where tokens are pruned, those that are left, and where they lie.
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
        if self.sparsity.token_keep:
            return self.forward_tokens(x)[0]
        tokens = super().forward_features(x, attn_mask=attn_mask, is_causal=is_causal)  # type: ignore[misc]
        return self._permuted(tokens, self.raster_order)

    def forward_tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B,3,H,W] -> tokens [B,N',C] as of `forward_features`, and the raster places [B,P'] of the patches."""
        model = cast(Any, self)
        x = model.norm_pre(self._pos_embed(model.patch_embed(x)))
        positions = self.token_order.expand(x.shape[0], -1)
        for block in model.blocks:
            if isinstance(block, PrunedBlock):
                x, positions = block(x, positions)
            else:
                x = block(x)
        x = model.norm(x)
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, x.shape[1] - positions.shape[1] :]
        positions, order = positions.sort()
        return torch.cat([prefix, ops.rows_at(patches, order)], 1), positions

    def forward_intermediates(self, x: Tensor, *args: Any, output_fmt: str = "NCHW", **options: Any) -> Any:
        """As timm's, with patches in raster order; `output_dict` is not supported."""
        if self.sparsity.token_keep:
            raise ConfigError("A model that prunes tokens has no maps of its layers.", "Use forward_tokens.")
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


def final_tokens(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Images [B,3,H,W] -> tokens [B,N,C] after the final norm, and where tokens are pruned the raster places [B,P] of
    the patches that are left.
    """
    if isinstance(model, SparseViTMixin) and model.sparsity.token_keep:
        return model.forward_tokens(images)
    return cast(Any, model).forward_features(images), None


def require_supported(model: nn.Module) -> None:
    """Refuse a model that cannot be made sparse.

    Raises:
        UnsupportedModelError: with the first reason.
    """
    reason = _refusal(model)
    if reason is not None:
        raise UnsupportedModelError(f"This model cannot be made sparse: {reason}.", f"Choose one of {SUPPORTED}.")


def _refusal(model: Any) -> str | None:
    if isinstance(model, SparseViTMixin):
        return "it is sparse already"
    if type(model) not in (VisionTransformer, VisionTransformerDistilled, Eva):
        return f"it is a {type(model).__name__}"
    if type(model.patch_embed) is not PatchEmbed:
        return f"patch embedding {type(model.patch_embed).__name__}"
    if model.dynamic_img_size:
        return "dynamic image size (the token order is fixed): create it with img_size"
    if not (model.patch_drop is None or isinstance(model.patch_drop, nn.Identity)):
        return "patch dropout"
    reasons = [(number, _block_refusal(block)) for number, block in enumerate(model.blocks)]
    return next((f"layer {number}: {reason}" for number, reason in reasons if reason), None)


def _block_refusal(block: nn.Module) -> str | None:
    attention: Any = getattr(block, "attn", None)
    if type(attention) not in (Attention, AttentionRope, EvaAttention):
        return f"{type(block).__name__} with {type(attention).__name__} instead of timm's Attention"
    if getattr(attention, "num_kv_groups", 1) > 1:
        return f"grouped-query attention, {attention.num_kv_groups} query heads per key head"
    if isinstance(block, (ResPostBlock, EvaBlockPostNorm)):
        return f"{type(block).__name__} normalises after attention"
    return f"attention dropout {attention.attn_drop.p}" if attention.attn_drop.p else None


def make_model_sparse(model: nn.Module, sparsity: SparsityConfig) -> nn.Module:
    """Make a timm model sparse, in place; projections are zero until calibrated or loaded.

    Args:
        model: a VisionTransformer or Eva of timm with a fixed image size.
        sparsity: what is sparse; with nothing sparse and nothing pruned the model is left untouched.

    Returns:
        The same object.

    Raises:
        UnsupportedModelError: with the reason.
        ConfigError: tile, cells or dense layers do not fit this model; it is unchanged then.
    """
    require_supported(model)
    if sparsity.is_dense:
        return model
    try:
        _make_sparse(cast(Any, model), sparsity)
    except ConfigError:
        restore_backbone(model)
        raise
    return model


def _make_sparse(vit: Any, sparsity: SparsityConfig) -> None:
    counts = sparsity.layer_tokens(len(vit.blocks), vit.patch_embed.num_patches, vit.num_prefix_tokens)
    sparse_layers = sparsity.sparse_layers(len(vit.blocks))
    # The published method knows raster order alone.
    grid: tuple[int, int] = vit.patch_embed.grid_size
    order = np.arange(grid[0] * grid[1]) if sparsity.preset == "paper" else hilbert_order(*grid)
    vit.__class__ = type(f"Sparse{type(vit).__name__}", (SparseViTMixin, type(vit)), {})
    for number, block in enumerate(vit.blocks):
        if number in sparse_layers:
            make_sparse(block.attn, sparsity, *counts[number])
        else:
            make_dense(block.attn)
    device = vit.patch_embed.proj.weight.device
    vit.register_buffer("token_order", torch.from_numpy(order).to(device), persistent=False)
    vit.register_buffer("raster_order", torch.from_numpy(inverse(order)).to(device), persistent=False)
    vit.sparsity = sparsity
    set_budget(vit, sparsity)


def restore_backbone(model: AnyModule) -> AnyModule:
    """Undo `make_model_sparse`, in place; a model that is not sparse is left as it is."""
    if not isinstance(model, SparseViTMixin):
        return model
    vit = cast(Any, model)
    for block in vit.blocks:
        make_whole(block)
        restore_attention(block.attn)
    for name in ("token_order", "raster_order", "sparsity"):
        if hasattr(vit, name):
            delattr(vit, name)
    vit.__class__ = type(vit).__bases__[1]
    return model


def set_budget(model: nn.Module, sparsity: SparsityConfig) -> None:
    """Give a sparse model, in place, another share of keys or tokens to keep; its parameters stay.

    Args:
        model: made by `make_model_sparse`.
        sparsity: as the model's own but for `keep`, `token_keep` and `fuse_tokens`.

    Raises:
        ConfigError: the model cannot do that, or tile or cells exceed the patches that are left.
    """
    vit = cast(Any, model)
    prunable = vit.cls_token is not None and all(type(block) in (Block, PrunedBlock) for block in vit.blocks)
    if sparsity.token_keep and not prunable:
        raise ConfigError(
            "Token pruning requires the blocks of a plain ViT (Eva has others) and a class token.",
            "Leave --token-keep out, or choose a ViT with a class token.",
        )
    counts = sparsity.layer_tokens(len(vit.blocks), vit.patch_embed.num_patches, vit.num_prefix_tokens)
    if sparsity.preset == "paper" and counts != vit.sparsity.layer_tokens(len(vit.blocks), *counts[0]):
        raise ConfigError("The published predictor is tied to its tokens.", "Give --token-keep to sparsify.")
    layouts = {
        number: sparsity.layout(*counts[number])
        for number, block in enumerate(vit.blocks)
        if isinstance(block.attn, SparseAttention)
    }
    for number, block in enumerate(vit.blocks):
        if number in layouts:
            block.attn.sparsity, block.attn.layout = sparsity, layouts[number]
            block.attn.num_prefix = counts[number][1]
        if counts[number + 1] == counts[number]:
            make_whole(block)
        else:
            make_pruned(block, counts[number + 1][0], counts[number][1], sparsity.fuse_tokens)
    vit.sparsity = sparsity
