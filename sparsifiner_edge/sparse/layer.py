"""A layer of a library made sparse, in place: what happens between its first norm and its residual after the MLP.

To its library such a layer is what it was: tokens go in and come out whole and in raster order, so that hooks, loops
over layers and decoders that read some of them never notice. What the next layer needs rides along on the tensor that
comes out: the tokens as they lie along the curve, merged or pruned, and what is known of them. In an exported file the
way back to raster order is there only where something reads it.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.ops import torch as ops
from sparsifiner_edge.sparse.attention import PackedAttention, attention_of, first, mix, restore, through

_RIDER = "_sparsifiner_tokens"


class CarriedTokens(NamedTuple):
    """Tokens between two layers, and what is known of them.

    Attributes:
        values: [B,N',C]: prefix, then patches along the curve.
        sizes: patches that each token stands for, float32 [B,N']; None before the first merge.
        places: token, counted from the first patch, that each original patch is in now: int64 [B,P], curve's order;
            None before the first merge.
        positions: raster place of each patch token, merged ones where their larger source was: int64 [B,P'].
    """

    values: Tensor
    sizes: Tensor | None
    places: Tensor | None
    positions: Tensor


class TokenOrder(nn.Module):
    """How the tokens of a model lie, shared by its layers.

    Attributes:
        order: raster place of each patch along the curve, int64 [P]. raster: its inverse.
        prefix: tokens before the patches.
    """

    order: Tensor
    raster: Tensor

    def __init__(self, order: Tensor, raster: Tensor, prefix: int) -> None:
        super().__init__()
        self.prefix = prefix
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("raster", raster, persistent=False)


class SparseLayer(nn.Module):
    """Mixed into the class of a library's layer.

    Attributes:
        curve: see `TokenOrder`. entering: patches that this layer sees.
        merging, pruning: what happens to tokens between attention and MLP; at most one of them.
    """

    curve: TokenOrder
    entering: int
    merging: nn.Module | None
    pruning: nn.Module | None

    @property
    def packed_attention(self) -> PackedAttention:
        """The layer's attention."""
        return cast(PackedAttention, attention_of(self))

    def rotary_table(self, *masks: Any, **options: Any) -> Tensor | None:
        """Of what the library calls the layer with, the table of rotary embeddings: sines, then cosines, patches in
        raster order: [P,2d], or [H,P,2d] where heads differ.

        Raises:
            ConfigError: an attention mask, or a wish for a map of all weights.
        """
        masks = (*masks, *map(options.get, ("attn_mask", "attention_mask")), options.get("is_causal") or None)
        if any(mask is not None for mask in masks):
            raise ConfigError("Sparse attention takes no attention mask.", "Call the model without one.")
        if options.get("output_attentions"):
            raise ConfigError("Sparse attention has no map of all its weights.", "Leave output_attentions out.")
        turns = options.get("position_embeddings")
        if turns is None:
            return options.get("rope")
        cosines, sines = turns
        return torch.cat([sines, cosines], -1)

    @property
    def entry_norm(self) -> nn.Module:
        """The norm before attention."""
        return cast(nn.Module, first(self, "norm1", "layernorm_before", "layer_norm1"))

    def after_attention(self, x: Tensor) -> Tensor:
        """What is added to the tokens: the residual branch of attention, scaled and dropped as the library does."""
        return self._branch(1, x)

    def after_mlp(self, x: Tensor) -> Tensor:
        """The other branch, from its norm on."""
        norm = first(self, "norm2", "layernorm_after", "layer_norm2")
        return self._branch(2, cast(nn.Module, self.mlp)(norm(x)))

    def _branch(self, number: int, x: Tensor) -> Tensor:
        scale, factor = scale_of(self, number), getattr(self, f"gamma_{number}", None)
        x = through(x if factor is None else factor * x, scale)
        return through(x, first(self, f"drop_path{number}", "drop_path", "dropout"))

    def forward(self, x: Tensor, *masks: Any, **options: Any) -> Tensor:
        """x [B,N,C] as the library has it -> the same."""
        tokens, attention = self.receive(x), self.packed_attention
        table = self.rotary_table(*masks, **options)
        turns = None if table is None else self._at(table, tokens.positions)
        attended, qkv = attention(self.entry_norm(tokens.values), turns, tokens.sizes)
        tokens = tokens._replace(values=tokens.values + self.after_attention(attended))
        if self.pruning is not None:
            tokens = self.pruning(tokens, qkv, attention.geometry)
        elif self.merging is not None and not attention.densely:
            tokens = self.merging(tokens, qkv, attention.geometry.heads)
        return self._leaving(tokens._replace(values=tokens.values + self.after_mlp(tokens.values)))

    def receive(self, x: Tensor) -> CarriedTokens:
        """What rides along on what the layer gets, or the tokens laid along the curve."""
        known, version = getattr(x, _RIDER, (None, None))
        if known is not None and version == _version(x):
            return cast(CarriedTokens, known)
        order, prefix = self.curve.order, self.curve.prefix
        if self.entering != len(order) and not self.packed_attention.densely:
            raise ConfigError(
                "A layer behind merged or pruned tokens was called with tokens that no layer of the model returned, or "
                "that were changed since.",
                "Call the model as a whole, and change nothing between its layers.",
            )
        if x.shape[1] != prefix + len(order):
            raise ConfigError(
                f"The model was made sparse for {len(order)} patches and {prefix} tokens before them; it got "
                f"{x.shape[1]} tokens.",
                "Give images of that size, or make it sparse for this one: img_size.",
            )
        values = torch.cat([x[:, :prefix], x[:, prefix:].index_select(1, order)], 1)
        return CarriedTokens(values, None, None, order.expand(x.shape[0], -1))

    def _at(self, table: Tensor, positions: Tensor) -> Tensor:
        """Rows of a rotary table at the raster places [B,P'] of the patches: [P,2d], [H,P,2d] or [B,P',1 or H,2d]."""
        if self.entering == len(self.curve.order) or self.packed_attention.densely:
            return table.index_select(-2, self.curve.order)
        rows = table[..., positions, :]
        return rows.permute(1, 2, 0, 3) if table.ndim == 3 else rows[:, :, None]

    def _leaving(self, tokens: CarriedTokens) -> Tensor:
        """Tokens as the library knows them: prefix, then every original patch in raster order; where some were pruned,
        those that are left.
        """
        raster, values, prefix = self.curve.raster, tokens.values, self.curve.prefix
        patches = values[:, prefix:]
        if tokens.places is not None:
            patches = ops.rows_at(patches, tokens.places.index_select(1, raster))
        elif patches.shape[1] == len(raster):
            patches = patches.index_select(1, raster)
        else:
            patches = ops.rows_at(patches, tokens.positions.argsort(1))
        whole = torch.cat([values[:, :prefix], patches], 1)
        setattr(whole, _RIDER, (tokens, _version(whole)))
        return whole


def riding(x: Tensor) -> CarriedTokens:
    """What rides along on the output of a `SparseLayer`.

    Raises:
        ConfigError: it is another tensor, as a hook on the layer may return one.
    """
    known, _ = getattr(x, _RIDER, (None, None))
    if known is None:
        raise ConfigError(
            "A layer of a model that prunes tokens returned other tokens than its own.", "Let no hook change them."
        )
    return cast(CarriedTokens, known)


def _version(x: Tensor) -> int | None:
    """How often a tensor was changed in place; nobody counts that of inference tensors."""
    return None if x.is_inference() else x._version


def scale_of(layer: Any, number: int) -> nn.Module | None:
    """The module that scales what a layer's first or second branch adds; None: there is none."""
    return cast("nn.Module | None", first(layer, f"ls{number}", f"layer_scale{number}"))


def make_layer(layer: Any, curve: TokenOrder) -> None:
    """Turn a layer of a library, in place, into a `SparseLayer`."""
    layer.__class__ = mix(f"Sparse{type(layer).__name__}", SparseLayer, type(layer))
    layer.curve, layer.merging, layer.pruning = curve, None, None


def restore_layer(layer: Any) -> None:
    """Undo `make_layer`."""
    restore(layer, SparseLayer, "curve", "entering", "merging", "pruning")
