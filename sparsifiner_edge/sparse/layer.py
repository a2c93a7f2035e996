"""In-place sparse version of a library's transformer layer.

The layer keeps the interface of its library: it takes and returns all tokens in raster order. Hooks, loops over layers
and decoders that read intermediate layers therefore work unchanged. The state for the next layer is attached to the
output tensor: the tokens in Hilbert-curve order, merged or pruned, and their bookkeeping. In an exported file the
conversion to raster order exists only where something reads it.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.ops import torch as ops
from sparsifiner_edge.sparse.attention import PackedAttention, attention_of, first, mix, restore, through

_RIDER = "_sparsifiner_tokens"
"""Attribute of a layer's output tensor that holds its `CarriedTokens` and the tensor's version."""


class CarriedTokens(NamedTuple):
    """Tokens between two layers, with their bookkeeping.

    Attributes:
        values: Tokens [B,N',C]: the prefix, then the patches in curve order.
        sizes: Number of patches in each token, float32 [B,N']. None before the first merge.
        places: Index of the token that contains each original patch, counted from the first patch token: int64 [B,P],
            in curve order. None before the first merge.
        positions: Raster position of each patch token, int64 [B,P']. A merged token has the position of its larger
            source.
    """

    values: Tensor
    sizes: Tensor | None
    places: Tensor | None
    positions: Tensor


class TokenOrder(nn.Module):
    """Token order of a model, shared by its layers.

    Attributes:
        order: Raster position of each patch along the curve, int64 [P].
        raster: Inverse of `order`, int64 [P].
        prefix: Number of tokens before the patches.
    """

    order: Tensor
    raster: Tensor

    def __init__(self, order: Tensor, raster: Tensor, prefix: int) -> None:
        """Register both permutations as buffers that are not saved."""
        super().__init__()
        self.prefix = prefix
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("raster", raster, persistent=False)


class SparseLayer(nn.Module):
    """Mixin for a library's transformer layer.

    Attributes:
        curve: Token order of the model.
        entering: Number of patch tokens that enter this layer.
        merging: Module that merges tokens between attention and MLP, or None. A layer merges or prunes, never both.
        pruning: Module that prunes tokens between attention and MLP, or None.
    """

    curve: TokenOrder
    entering: int
    merging: nn.Module | None
    pruning: nn.Module | None

    @property
    def packed_attention(self) -> PackedAttention:
        """Attention of the layer."""
        return cast(PackedAttention, attention_of(self))

    def rotary_table(self, *masks: Any, **options: Any) -> Tensor | None:
        """Return the table of rotary embeddings from the arguments with which the library calls the layer.

        Args:
            masks: Positional arguments after the tokens. Each must be None.
            options: Keyword arguments of the layer.

        Returns:
            Sines, then cosines, with the patches in raster order: [P,2d], or [H,P,2d] where heads differ. None if the
            layer has no rotary embeddings.

        Raises:
            ConfigError: If an attention mask is given, or the attention weights are requested as an output.
        """
        masks = (*masks, *map(options.get, ("attn_mask", "attention_mask")), options.get("is_causal") or None)
        if any(mask is not None for mask in masks):
            raise ConfigError("Sparse attention takes no attention mask.", "Call the model without one.")
        if options.get("output_attentions"):
            raise ConfigError("Sparse attention cannot return its attention weights.", "Leave output_attentions out.")
        turns = options.get("position_embeddings")
        if turns is None:
            return options.get("rope")
        cosines, sines = turns
        return torch.cat([sines, cosines], -1)

    @property
    def entry_norm(self) -> nn.Module:
        """Norm before the attention."""
        return cast(nn.Module, first(self, "norm1", "layernorm_before", "layer_norm1"))

    def after_attention(self, x: Tensor) -> Tensor:
        """Return the residual branch of the attention, scaled and dropped out as the library does."""
        return self._branch(1, x)

    def after_mlp(self, x: Tensor) -> Tensor:
        """Return the residual branch of the MLP, norm included."""
        norm = first(self, "norm2", "layernorm_after", "layer_norm2")
        return self._branch(2, cast(nn.Module, self.mlp)(norm(x)))

    def _branch(self, number: int, x: Tensor) -> Tensor:
        """Apply the layer scale and the dropout of residual branch 1 or 2."""
        scale, factor = scale_of(self, number), getattr(self, f"gamma_{number}", None)
        x = through(x if factor is None else factor * x, scale)
        return through(x, first(self, f"drop_path{number}", "drop_path", "dropout"))

    def forward(self, x: Tensor, *masks: Any, **options: Any) -> Tensor:
        """Run the layer on tokens [B,N,C] in the library's order and return them in the same form."""
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
        """Return the tokens attached to the input, or arrange the input itself along the curve.

        Raises:
            ConfigError: If the layer follows merged or pruned tokens and its input carries none, or if the number of
                tokens is wrong.
        """
        known, version = getattr(x, _RIDER, (None, None))
        if known is not None and version == _version(x):
            return cast(CarriedTokens, known)
        order, prefix = self.curve.order, self.curve.prefix
        if self.entering != len(order) and not self.packed_attention.densely:
            raise ConfigError(
                "A layer after merging or pruning was called with tokens that the previous layer did not return, or "
                "that were changed since.",
                "Call the whole model, and do not change tokens between its layers.",
            )
        if x.shape[1] != prefix + len(order):
            raise ConfigError(
                f"The model was made sparse for {len(order)} patches and {prefix} prefix tokens, but received "
                f"{x.shape[1]} tokens.",
                "Give images of the model's size, or set img_size when making it sparse.",
            )
        values = torch.cat([x[:, :prefix], x[:, prefix:].index_select(1, order)], 1)
        return CarriedTokens(values, None, None, order.expand(x.shape[0], -1))

    def _at(self, table: Tensor, positions: Tensor) -> Tensor:
        """Return rotary table rows for the raster positions [B,P']: [P,2d], [H,P,2d] or [B,P',1 or H,2d]."""
        if self.entering == len(self.curve.order) or self.packed_attention.densely:
            return table.index_select(-2, self.curve.order)
        rows = table[..., positions, :]
        return rows.permute(1, 2, 0, 3) if table.ndim == 3 else rows[:, :, None]

    def _leaving(self, tokens: CarriedTokens) -> Tensor:
        """Return all original patches in raster order behind the prefix, or the patches left after pruning."""
        raster, values, prefix = self.curve.raster, tokens.values, self.curve.prefix
        patches = values[:, prefix:]
        if tokens.places is not None:
            patches = ops.rows_at(patches, tokens.places.index_select(1, raster))
        elif patches.shape[1] == len(raster):
            patches = patches.index_select(1, raster)
        else:
            patches = ops.rows_at(patches, tokens.positions.argsort(1))
        output = torch.cat([values[:, :prefix], patches], 1)
        setattr(output, _RIDER, (tokens, _version(output)))
        return output


def riding(x: Tensor) -> CarriedTokens:
    """Return the tokens attached to the output of a `SparseLayer`.

    Raises:
        ConfigError: If the tensor carries none, for instance because a hook on the layer returned another tensor.
    """
    known, _ = getattr(x, _RIDER, (None, None))
    if known is None:
        raise ConfigError(
            "The output of a layer was replaced, so the positions of its pruned tokens are unknown.",
            "Remove the hook that replaces it.",
        )
    return cast(CarriedTokens, known)


def _version(x: Tensor) -> int | None:
    """Return how often a tensor was changed in place, or None for an inference tensor, which has no such counter."""
    return None if x.is_inference() else x._version


def scale_of(layer: Any, number: int) -> nn.Module | None:
    """Return the layer-scale module of a layer's first or second residual branch, or None without one."""
    return cast("nn.Module | None", first(layer, f"ls{number}", f"layer_scale{number}"))


def make_layer(layer: Any, curve: TokenOrder) -> None:
    """Turn a library's layer into a `SparseLayer` in place."""
    layer.__class__ = mix(f"Sparse{type(layer).__name__}", SparseLayer, type(layer))
    layer.curve, layer.merging, layer.pruning = curve, None, None


def restore_layer(layer: Any) -> None:
    """Undo `make_layer`."""
    restore(layer, SparseLayer, "curve", "entering", "merging", "pruning")
