"""In-place patch of timm's VisionTransformer and Eva: sparse attention, patch tokens laid along the Hilbert curve."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar, cast

import numpy as np
import torch
from timm.layers.attention import Attention, AttentionRope
from timm.layers.patch_embed import PatchEmbed
from timm.models._features import feature_take_indices
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.errors import ConfigError, UnsupportedModelError
from sparsifiner_edge.ops import torch as ops
from sparsifiner_edge.sparse.attention import SparseAttention, make_dense, make_sparse, restore_attention
from sparsifiner_edge.sparse.merge import MergedTokens, Merging, MergingBlock, make_merging, stop_merging
from sparsifiner_edge.sparse.order import hilbert_order, inverse
from sparsifiner_edge.sparse.prune import PrunedBlock, make_pruned, make_whole

AnyModule = TypeVar("AnyModule", bound=nn.Module)
SUPPORTED = "timm's VisionTransformer (ViT, DeiT, DINOv2) and Eva (EVA-02, DINOv3, ViT with RoPE)"


class SparseViTMixin:
    """Modifications of timm's VisionTransformer and Eva.

    - `_pos_embed`: afterwards the patch tokens are laid along the curve, and with them the tables of rotary embeddings;
      all blocks are indifferent to order.
    - `forward_features`, `forward_intermediates`: patch tokens are returned in raster order, as timm returns them.
      Where tokens are merged, each patch gets those of the token that it went into.
    - `forward_tokens`: where tokens are pruned, those that are left, and where they lie.
    - `unmerged`: while a predictor learns: merge nothing.
    - `sparsity`: the SparsityConfig; `token_order`, `raster_order`: int64 [P] permutations.
    """

    sparsity: SparsityConfig
    num_prefix_tokens: int
    token_order: Tensor
    raster_order: Tensor
    unmerged: bool = False

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
        if self._merges:
            *_, (x, state) = self._merged_layers(x)
            return self._whole(cast(Any, self).norm(x), state)
        tokens = super().forward_features(x, attn_mask=attn_mask, is_causal=is_causal)  # type: ignore[misc]
        return self._permuted(tokens, self.raster_order)

    @property
    def _merges(self) -> bool:
        return bool(self.sparsity.merge) and not self.unmerged

    def _merged_layers(self, x: Tensor) -> Iterator[tuple[Tensor, MergedTokens]]:
        """Images [B,3,H,W] -> tokens after each layer, and what is known of them."""
        model = cast(Any, self)
        placed = self._pos_embed(model.patch_embed(x))
        tokens, rope = placed if isinstance(placed, tuple) else (placed, None)
        tokens = model.norm_pre(tokens)
        places = torch.arange(len(self.token_order), device=tokens.device).expand(tokens.shape[0], -1)
        state = MergedTokens(None, places, None if rope is None else places)
        for number, block in enumerate(model.blocks):
            # Tables of their own, where layers have them.
            table = rope[number] if rope is not None and rope.ndim == 4 else rope
            if isinstance(block, MergingBlock):
                given = {} if table is None else {"rope": _at(table, cast(Tensor, state.origins))}
                tokens, state = block(tokens, state=state, **given)
            else:
                tokens = block(tokens) if table is None else block(tokens, rope=table)
            yield tokens, state

    def _whole(self, x: Tensor, state: MergedTokens) -> Tensor:
        """Tokens [B,N',C] -> [B,N,C]: prefix, then every original patch in raster order."""
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        return torch.cat([prefix, ops.rows_at(patches, state.places.index_select(1, self.raster_order))], 1)

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

    def forward_intermediates(
        self, x: Tensor, indices: int | list[int] | None = None, *, output_fmt: str = "NCHW", **options: Any
    ) -> Any:
        """As timm's, with patches in raster order; `output_dict` is not supported."""
        if self.sparsity.token_keep:
            raise ConfigError("A model that prunes tokens has no maps of its layers.", "Use forward_tokens.")
        if options.get("output_dict"):
            raise ConfigError("forward_intermediates of a sparse model takes no output_dict.", "Leave it out.")
        if self._merges:
            return self._merged_intermediates(x, indices, output_fmt, **options)
        result = super().forward_intermediates(x, indices, output_fmt="NLC", **options)  # type: ignore[misc]
        grid = cast(Any, self).patch_embed.grid_size if output_fmt == "NCHW" else None
        if options.get("intermediates_only"):
            return [self._raster(item, grid) for item in result]
        final, items = result
        return self._permuted(final, self.raster_order), [self._raster(item, grid) for item in items]

    def _merged_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None,
        output_fmt: str,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        intermediates_only: bool = False,
        **_: Any,
    ) -> Any:
        """`forward_intermediates` where tokens are merged."""
        model = cast(Any, self)
        taken, last = feature_take_indices(len(model.blocks), indices)
        items: list[Any] = []
        for number, (tokens, state) in enumerate(self._merged_layers(x)):
            if number in taken:
                whole = self._whole(model.norm(tokens) if norm else tokens, state)
                prefix, patches = whole[:, : self.num_prefix_tokens], whole[:, self.num_prefix_tokens :]
                if output_fmt == "NCHW":
                    patches = patches.transpose(1, 2).unflatten(2, model.patch_embed.grid_size).contiguous()
                items.append((patches, prefix) if return_prefix_tokens else patches)
            if stop_early and number == last:
                break
        if intermediates_only:
            return items
        return self._whole(model.norm(tokens), state), items

    def _raster(self, item: Any, grid: tuple[int, int] | None) -> Any:
        """One intermediate, patches [B,P,C] or (patches, prefix): raster order, as a map [B,C,h,w] if `grid`."""
        if isinstance(item, tuple):
            return self._raster(item[0], grid), item[1]
        item = item.index_select(1, self.raster_order)
        return item.transpose(1, 2).unflatten(2, grid).contiguous() if grid else item


def _at(table: Tensor, origins: Tensor) -> Tensor:
    """A rotary table [P,2d] or [H,P,2d] at the patches' origins [B,P'] -> [B,P',1 or H,2d]."""
    rows = table[..., origins, :]
    return rows.permute(1, 2, 0, 3) if table.ndim == 3 else rows[:, :, None]


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
            make_sparse(block.attn, sparsity.of_layer(number, len(vit.blocks)), *counts[number])
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
        stop_merging(block)
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
        sparsity: as the model's own but for `keep`, `token_keep`, `fuse_tokens`, `merge` and `merge_window`.

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
    kinds = {type(block).__name__ for block in vit.blocks if not isinstance(block, (Block, EvaBlock))}
    if sparsity.merge and kinds:
        raise ConfigError(
            f"Tokens cannot be merged in {' and '.join(sorted(kinds))}.", "Leave --merge out, or choose another model."
        )
    counts = sparsity.layer_tokens(len(vit.blocks), vit.patch_embed.num_patches, vit.num_prefix_tokens)
    if sparsity.preset == "paper" and counts != vit.sparsity.layer_tokens(len(vit.blocks), *counts[0]):
        raise ConfigError("The published predictor is tied to its tokens.", "Give --token-keep to sparsify.")
    merged = sparsity.layer_merges(len(vit.blocks), vit.patch_embed.num_patches)
    sparse = {number: sparsity.of_layer(number, len(vit.blocks)) for number in sparsity.sparse_layers(len(vit.blocks))}
    layouts = {number: of_layer.layout(*counts[number]) for number, of_layer in sparse.items()}
    for number, block in enumerate(vit.blocks):
        if number in sparse and not isinstance(block.attn, SparseAttention):
            raise ConfigError(
                f"layer {number} is dense: it has no predictor.", "Give it a share of 1, or sparsify again."
            )
    for number, block in enumerate(vit.blocks):
        if number in sparse:
            block.attn.sparsity, block.attn.layout = sparse[number], layouts[number]
            block.attn.num_prefix = counts[number][1]
        elif isinstance(block.attn, SparseAttention):
            restore_attention(block.attn)
            make_dense(block.attn)
        make_whole(block)
        stop_merging(block)
        if any(merged[: number + 1]):
            here = Merging(merged[number], counts[number][1], sparsity.merge_window) if merged[number] else None
            make_merging(block, here)
        elif counts[number + 1] != counts[number]:
            make_pruned(block, counts[number + 1][0], counts[number][1], sparsity.fuse_tokens)
    vit.sparsity = sparsity
