"""Attention modules that replace those of a library, in the same objects and with the same weights."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsifiner_edge.config import BASIS_THRESHOLD, LANDMARK_FACTOR, TOP_COEFFICIENTS, Layout, SparsityConfig
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.ops import torch as ops
from sparsifiner_edge.ops import torch_landmarks
from sparsifiner_edge.ops.torch_triton import triton_layer


class KeySelector(nn.Module):
    """Connectivity predictor: low-rank projections of queries and keys, its only parameters.

    Attributes:
        proj_q: Projection of queries [H,d,c]. It does not depend on the image resolution.
        proj_k: Projection of keys [H,d,c]. It does not depend on the image resolution.
    """

    def __init__(self, num_heads: int, head_dim: int, channels: int) -> None:
        """Create zero projections."""
        super().__init__()
        self.proj_q = nn.Parameter(torch.zeros(num_heads, head_dim, channels))
        self.proj_k = nn.Parameter(torch.zeros(num_heads, head_dim, channels))


class LandmarkSelector(nn.Module):
    """Parameters of the published predictor (Sparsifiner, section 3.2), for a fixed number of tokens.

    Attributes:
        proj_q: Projection of queries [c,d], shared by the heads.
        bias_q: Its bias [c].
        proj_k: Projection of keys [c,d], shared by the heads.
        bias_k: Its bias [c].
        down: Down-projection from tokens to landmarks [N,L], class token included.
        up: Up-projection from landmarks to tokens [N,L], class token included.
    """

    def __init__(self, head_dim: int, channels: int, tokens: int, landmarks: int) -> None:
        """Create zero parameters."""
        super().__init__()
        self.proj_q = nn.Parameter(torch.zeros(channels, head_dim))
        self.bias_q = nn.Parameter(torch.zeros(channels))
        self.proj_k = nn.Parameter(torch.zeros(channels, head_dim))
        self.bias_k = nn.Parameter(torch.zeros(channels))
        self.down = nn.Parameter(torch.zeros(tokens, landmarks))
        self.up = nn.Parameter(torch.zeros(tokens, landmarks))

    def inputs(self) -> tuple[Tensor, ...]:
        """Return the inputs of LandmarkKeySelect after qkv, in the order of the operator's schema."""
        return self.proj_q, self.bias_q, self.proj_k, self.bias_k, self.down, self.up


class HeadGeometry(NamedTuple):
    """Sizes of the attention heads of a layer.

    Attributes:
        heads: Number of heads.
        dim: Channels of a head.
        scale: Factor of the products of queries and keys.
    """

    heads: int
    dim: int
    scale: float


def first(module: Any, *names: str) -> Any:
    """Return the first attribute of a module that exists under one of the names and is not None, else None.

    Libraries build the same kind of layer but name its parts differently.
    """
    return next((part for part in (getattr(module, name, None) for name in names) if part is not None), None)


def through(x: Tensor, *parts: Any) -> Tensor:
    """Apply the parts of a module to x one after another, skipping those that are None."""
    for part in parts:
        x = x if part is None else part(x)
    return x


def attention_of(layer: Any) -> Any:
    """Return the attention of a layer of any library."""
    return first(layer, "attn", "attention", "self_attn")


def geometry_of(attention: Any) -> HeadGeometry:
    """Return the head sizes of an attention of any library."""
    heads, scale = first(attention, "num_heads", "num_attention_heads"), first(attention, "scale", "scaling")
    return HeadGeometry(int(heads), int(attention.head_dim), float(scale))


def rotate(x: Tensor, table: Tensor, half: bool) -> Tensor:
    """Apply rotary position embeddings to heads x [B,P,H,d].

    Args:
        x: Queries or keys [B,P,H,d].
        table: Sines, then cosines: [P,2d], [H,P,2d] where heads differ, or [B,P,1 or H,2d] where images differ.
        half: Pair channel i with channel i + d/2 (DINOv3) instead of with its neighbour (EVA-02).
    """
    table = table if table.ndim == 4 else table.transpose(0, 1) if table.ndim == 3 else table[:, None]
    sines, cosines = table.chunk(2, -1)
    if half:
        low, high = x.chunk(2, -1)
        turned = torch.cat([-high, low], -1)
    else:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)
    return (x * cosines + turned * sines).type_as(x)


class PackedAttention(nn.Module):
    """Dense attention as one operator, on the parts of a library's attention.

    It serves as the dense layers of a sparse model, and as the base of the sparse ones. q, k and v stay packed as
    [B,N,3C] after bias, normalisation and rotation, as the operators read them.

    Attributes:
        densely: True while a predictor is calibrated: attend to all keys and merge no tokens.
    """

    densely: bool = False

    @property
    def geometry(self) -> HeadGeometry:
        """Sizes of the attention heads."""
        return geometry_of(self)

    def projection(self) -> tuple[Tensor, Tensor | None]:
        """Return the weight [3C,D] and the bias [3C], or None, that compute q, k and v.

        A library may store them as one matrix or as three, and the biases together or separately.
        """
        packed, apart = first(self, "qkv"), first(self, "q_bias")
        if packed is not None and apart is None:
            return packed.weight, packed.bias
        if packed is not None:
            return packed.weight, torch.cat([apart, cast(Tensor, self.k_bias), cast(Tensor, self.v_bias)])
        parts = [cast(nn.Linear, part) for part in (self.q_proj, self.k_proj, self.v_proj)]
        weight = torch.cat(tuple(part.weight for part in parts))
        if all(part.bias is None for part in parts):
            return weight, None
        biases = (torch.zeros_like(part.weight[:, 0]) if part.bias is None else part.bias for part in parts)
        return weight, torch.cat(tuple(biases))

    @property
    def norms(self) -> tuple[nn.Module, nn.Module] | None:
        """Norms of the heads' queries and keys before rotation, or None without them."""
        norms = first(self, "q_norm"), first(self, "k_norm")
        return None if all(norm is None or isinstance(norm, nn.Identity) for norm in norms) else norms

    def rotate(self, x: Tensor, table: Tensor) -> Tensor:
        """Apply rotary position embeddings to the patches' heads [B,P,H,d]; see the function `rotate`.

        An attention of timm (with `qkv`) has an attribute that selects pairing by halves, by default off. transformers
        always pairs by halves.
        """
        return rotate(x, table, getattr(self, "rotate_half", not hasattr(self, "qkv")))

    def join(self, x: Tensor, attended: Tensor) -> Tensor:
        """Project the heads' results [B,N,C] to [B,N,D], gated by the layer's input x [B,N,D] if there is a gate."""
        attended, gate = through(attended, first(self, "norm")), first(self, "gate")
        if gate is not None:
            attended = attended * gate(x).sigmoid()
        return through(attended, first(self, "proj", "o_proj", "out_proj"), first(self, "proj_drop"))

    def attend(self, qkv: Tensor, sizes: Tensor | None = None) -> Tensor:
        """Return the attention output [B,N,C].

        Args:
            qkv: Packed queries, keys and values [B,N,3C].
            sizes: Number of patches in each token [B,N], where tokens are merged.
        """
        return ops.dense_attention(qkv, num_heads=self.geometry.heads, scale=self.geometry.scale, sizes=sizes)

    def forward(self, x: Tensor, table: Tensor | None = None, sizes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run the attention of a layer. Only the layer calls it, because only the layer knows the token order.

        Args:
            x: Tokens along the curve [B,N,D].
            table: Rotary table of the patches.
            sizes: Number of patches in each token [B,N], where tokens are merged.

        Returns:
            The output [B,N,D], and qkv [B,N,3C].
        """
        qkv = self.pack(x, table)
        return self.join(x, self.attend(qkv, sizes)), qkv

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v [B,N,H,d] of x [B,N,D], before rotation."""
        q, k, v = self.project(x).unflatten(-1, (3, self.geometry.heads, self.geometry.dim)).unbind(2)
        norms = self.norms
        return (q, k, v) if norms is None else (norms[0](q), norms[1](k), v)

    def project(self, x: Tensor) -> Tensor:
        """Return qkv [B,N,3C] of x [B,N,D], after bias."""
        return F.linear(x, *self.projection())

    def pack(self, x: Tensor, table: Tensor | None = None) -> Tensor:
        """Return qkv [B,N,3C] of x [B,N,D], after normalisation and rotation.

        Args:
            x: Tokens [B,N,D], patches last.
            table: Rotary table of the patches.
        """
        if table is None and self.norms is None:
            return self.project(x)
        q, k, v = self.heads(x)
        if table is not None:
            prefix = x.shape[1] - table.shape[-3 if table.ndim == 4 else -2]
            q, k = (torch.cat([y[:, :prefix], self.rotate(y[:, prefix:], table)], 1) for y in (q, k))
        return torch.stack([q, k, v], 2).flatten(2)


class SparseAttention(PackedAttention):
    """Sparse attention with key selection, on the layer's own q, k and v (operators KeySelect and SparseAttention).

    Attributes:
        select: Predictor.
        sparsity: Sparsity settings of this layer.
        layout: Sizes that follow from the settings.
        num_prefix: Number of tokens before the patches.
        prefix_keys: 1 if every query reads the prefix tokens in addition to the key lists, else 0.
    """

    select: nn.Module
    sparsity: SparsityConfig
    layout: Layout
    num_prefix: int
    prefix_keys = 1

    def attend(self, qkv: Tensor, sizes: Tensor | None = None) -> Tensor:
        """Return the sparse attention output [B,N,C]; see `PackedAttention.attend`."""
        if self.densely or self.sparsity.keep == 1:  # Dense in the current budget.
            return super().attend(qkv, sizes)
        fused = self.together(qkv, sizes)
        if fused is not None:
            return fused
        return ops.sparse_attention(
            qkv, self.indices(qkv, sizes), **self.shared, prefix_keys=self.prefix_keys, sizes=sizes
        )

    def together(self, qkv: Tensor, sizes: Tensor | None) -> Tensor | None:
        """Return the output of a fused kernel for selection and attention, or None if there is none.

        A subclass with its own `indices` has none.
        """
        if getattr(self.indices, "__func__", None) is not SparseAttention.indices:
            return None
        select = cast(KeySelector, self.select)
        return triton_layer(self.selection, qkv, sizes, select.proj_q, select.proj_k)

    @property
    def shared(self) -> dict[str, Any]:
        """Attributes that KeySelect and SparseAttention have in common."""
        return {
            "num_heads": self.geometry.heads,
            "num_prefix": self.num_prefix,
            "tile": self.sparsity.tile,
            "key_pool": self.layout.key_pool,
            "scale": self.geometry.scale,
        }

    @property
    def selection(self) -> dict[str, Any]:
        """Attributes of KeySelect."""
        more = {
            "query_pool": self.sparsity.query_pool,
            "keys": self.layout.keys,
            "value_power": self.sparsity.value_power,
        }
        return self.shared | more

    def indices(self, qkv: Tensor, sizes: Tensor | None = None) -> Tensor:
        """Return the patch keys that each head and query tile reads: int32 [B,H,T,K]."""
        select = cast(KeySelector, self.select)
        return ops.key_select(qkv, select.proj_q, select.proj_k, **self.selection, sizes=sizes)


class LandmarkAttention(SparseAttention):
    """Published method: one key list per query over all tokens, class token included, and no background tokens."""

    prefix_keys = 0

    def indices(self, qkv: Tensor, _: Tensor | None = None) -> Tensor:
        """Return the tokens that each head and patch query reads: int32 [B,H,N-1,K].

        Tokens never merge with this preset.
        """
        select = cast(LandmarkSelector, self.select)
        landmarks = select.down.shape[1]
        return torch_landmarks.landmark_key_select(
            qkv,
            *select.inputs(),
            num_heads=self.geometry.heads,
            keys=self.layout.keys,
            # The published code scales by the number of heads, not by the head dimension.
            scale=self.geometry.heads**-0.5,
            top_coefficients=min(TOP_COEFFICIENTS, landmarks),
            basis_threshold=BASIS_THRESHOLD,
        )


_MIXED: dict[tuple[Any, Any], Any] = {}
"""Cache of the classes that `mix` creates."""


def mix(name: str, ours: Any, before: Any) -> Any:
    """Return a class with our behaviour for an object of a library's class `before`."""
    if (ours, before) not in _MIXED:
        _MIXED[ours, before] = type(name, (ours, before), {"__doc__": ours.__doc__})
    return _MIXED[ours, before]


def restore(part: Any, ours: Any, *names: str) -> None:
    """Give an object back the library's class that it had before `mix`, and remove the named attributes, in place."""
    if isinstance(part, ours):
        for name in names:
            if hasattr(part, name):
                delattr(part, name)
        part.__class__ = type(part).__bases__[-1]


def make_dense(attention: Any) -> None:
    """Turn a library's attention into a `PackedAttention` in place."""
    attention.__class__ = mix("PackedAttention", PackedAttention, type(attention))


def restore_attention(attention: Any) -> None:
    """Turn an attention back into the library's own in place."""
    restore(attention, PackedAttention, "select", "sparsity", "layout", "num_prefix")


def make_sparse(attention: Any, sparsity: SparsityConfig, patches: int, num_prefix: int) -> None:
    """Turn a library's attention into a `SparseAttention` in place.

    The projections are zero (see `calibrate.py`). `patch.set_budget` sets the settings and the layout.

    Args:
        attention: Attention of a supported library.
        sparsity: Sparsity settings of this layer.
        patches: Number of patch tokens.
        num_prefix: Number of tokens before the patches.

    Raises:
        ConfigError: If the model's heads or tokens do not suit the settings.
    """
    before = type(attention)
    make_dense(attention)
    heads, head_dim, _ = attention.geometry
    if sparsity.channels > head_dim:
        raise ConfigError(
            f"channels {sparsity.channels} exceed the head dimension {head_dim}.",
            f"Give at most {head_dim} channels.",
        )
    if sparsity.preset == "paper":
        tokens = patches + num_prefix
        landmarks = tokens // LANDMARK_FACTOR
        if num_prefix != 1 or not landmarks:
            raise ConfigError(
                f"Preset 'paper' requires exactly one prefix token and at least {LANDMARK_FACTOR} tokens; this model "
                f"has {num_prefix} prefix tokens and {tokens} tokens.",
                "Use the preset edge, or a larger image.",
            )
        kind: type[SparseAttention] = LandmarkAttention
        select: nn.Module = LandmarkSelector(head_dim, sparsity.channels, tokens, landmarks)
    else:
        kind, select = SparseAttention, KeySelector(heads, head_dim, sparsity.channels)
    weight = attention.projection()[0]
    attention.__class__ = mix(kind.__name__, kind, before)
    attention.select = select.to(weight)
