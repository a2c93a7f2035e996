"""Attention modules that take the place of timm's, in the same object and with the same weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from torch import Tensor, nn

from sparsifiner_edge.config import Layout, SparsityConfig
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.ops import torch as ops


class KeySelector(nn.Module):
    """The connectivity predictor: low-rank projections of queries and keys, its only parameters.

    Attributes:
        proj_q, proj_k: [H, d, c]; free of the image's resolution.
    """

    def __init__(self, num_heads: int, head_dim: int, channels: int) -> None:
        super().__init__()
        self.proj_q = nn.Parameter(torch.zeros(num_heads, head_dim, channels))
        self.proj_k = nn.Parameter(torch.zeros(num_heads, head_dim, channels))


class LandmarkSelector(nn.Module):
    """The published predictor's parameters (Sparsifiner, section 3.2); tied to the number of tokens.

    Attributes:
        proj_q, proj_k: [c, d] with biases [c], shared by the heads. down, up: [N, L], class token included.
    """

    def __init__(self, head_dim: int, channels: int, tokens: int, landmarks: int) -> None:
        super().__init__()
        self.proj_q = nn.Parameter(torch.zeros(channels, head_dim))
        self.bias_q = nn.Parameter(torch.zeros(channels))
        self.proj_k = nn.Parameter(torch.zeros(channels, head_dim))
        self.bias_k = nn.Parameter(torch.zeros(channels))
        self.down = nn.Parameter(torch.zeros(tokens, landmarks))
        self.up = nn.Parameter(torch.zeros(tokens, landmarks))

    def inputs(self) -> tuple[Tensor, ...]:
        """The inputs of LandmarkKeySelect after qkv, in the schema's order."""
        return self.proj_q, self.bias_q, self.proj_k, self.bias_k, self.down, self.up


def qkv_projection(attention: Any) -> tuple[Tensor, Tensor | None]:
    """Weight [3C,D] and bias [3C] (None: without) that make q, k and v, however timm stores them."""
    if attention.qkv is not None:
        apart = getattr(attention, "q_bias", None)
        separate = None if apart is None else torch.cat([apart, attention.k_bias, attention.v_bias])
        return attention.qkv.weight, attention.qkv.bias if separate is None else separate
    parts = (attention.q_proj, attention.k_proj, attention.v_proj)
    biases = [torch.zeros_like(x.weight[:, 0]) if x.bias is None else x.bias for x in parts]
    return torch.cat([x.weight for x in parts]), torch.cat(biases)


def rotated(attention: Any, x: Tensor, rope: Tensor) -> Tensor:
    """Rotary position embedding: heads [...,P,H,d] with a table (sin | cos) [P,2d], [H,P,2d] where heads differ, or
    [B,P,1 or H,2d] where images do.
    """
    table = rope if rope.ndim == 4 else rope.transpose(0, 1) if rope.ndim == 3 else rope[:, None]
    out: Tensor = apply_rot_embed_cat(x, table, half=attention.rotate_half)
    return out.type_as(x)


class PackedAttention(nn.Module):
    """What both kinds of attention share, mixed into the class that timm gave the object.

    Modifications of timm's `Attention`, `AttentionRope` and `EvaAttention`:
        - q, k and v stay packed as [B,N,3C] after bias, qk-norm and RoPE, which is what the operators read.
        - attention masks are refused.
    """

    def attend(self, qkv: Tensor, sizes: Tensor | None = None) -> Tensor:
        """qkv [B,N,3C], and the tokens' sizes [B,N] where they are merged -> [B,N,C]."""
        raise NotImplementedError

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B,N,D] -> q, k, v [B,N,H,d], after bias and qk-norm, before RoPE."""
        layer = cast(Any, self)
        q, k, v = self.projected(x).unflatten(-1, (3, layer.num_heads, layer.head_dim)).unbind(2)
        return layer.q_norm(q), layer.k_norm(k), v

    def projected(self, x: Tensor) -> Tensor:
        """x [B,N,D] -> qkv [B,N,3C], after bias."""
        return F.linear(x, *qkv_projection(self))

    def packed(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        """x [B,N,D] and a rotary table for the patches -> qkv [B,N,3C], after bias, qk-norm and RoPE."""
        layer = cast(Any, self)
        if rope is None and isinstance(layer.q_norm, nn.Identity) and isinstance(layer.k_norm, nn.Identity):
            return self.projected(x)
        q, k, v = self.heads(x)
        if rope is not None:
            prefix = layer.num_prefix_tokens
            q, k = (torch.cat([y[:, :prefix], rotated(self, y[:, prefix:], rope)], 1) for y in (q, k))
        return torch.stack([q, k, v], 2).flatten(2)

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """x [B,N,D] -> [B,N,D]."""
        if attn_mask is not None or is_causal:
            raise ConfigError("Sparse attention takes no attention mask.", "Call the model without attn_mask.")
        return self.joined(x, self.attend(self.packed(x, rope)))

    def joined(self, x: Tensor, attended: Tensor) -> Tensor:
        """The layer's input x [B,N,D] and heads' results [B,N,C] -> [B,N,D]."""
        layer = cast(Any, self)
        out = layer.norm(attended)
        if layer.gate is not None:
            out = out * layer.gate(x).sigmoid()
        return cast(Tensor, layer.proj_drop(layer.proj(out)))


class DenseAttention(PackedAttention):
    """Plain attention as one operator: the dense layers of a student that has sparse ones."""

    def attend(self, qkv: Tensor, sizes: Tensor | None = None) -> Tensor:
        """See `PackedAttention`."""
        layer = cast(Any, self)
        return ops.dense_attention(qkv, num_heads=layer.num_heads, scale=layer.scale, sizes=sizes)


Observer = Callable[["SparseAttention", Tensor, "Tensor | None"], None]
"""Called with a sparse layer, its qkv [B,N,3C], and the sizes [B,N] of its tokens where they are merged."""


class SparseAttention(PackedAttention):
    """KeySelect and SparseAttention over the layer's own q, k and v.

    Attributes:
        select: the predictor.
        sparsity, layout, num_prefix: what is sparse, the sizes that follow, and the tokens that are no patches.
        prefix_keys: whether every query reads the prefix tokens without listing them (1 or 0).
        observer: while a predictor learns: called with the layer, its qkv [B,N,3C] and the tokens' sizes [B,N] or None.
        densely: while a predictor learns: attend to all.
    """

    num_heads: int
    head_dim: int
    scale: float
    select: nn.Module
    sparsity: SparsityConfig
    layout: Layout
    num_prefix: int
    prefix_keys = 1
    observer: Observer | None = None
    densely: bool = False

    def attend(self, qkv: Tensor, sizes: Tensor | None = None) -> Tensor:
        """See `PackedAttention`."""
        if self.observer is not None:
            self.observer(self, qkv, sizes)
        if self.densely:
            return ops.dense_attention(qkv, num_heads=self.num_heads, scale=self.scale, sizes=sizes)
        return ops.sparse_attention(
            qkv,
            self.indices(qkv, sizes),
            num_heads=self.num_heads,
            num_prefix=self.num_prefix,
            tile=self.sparsity.tile,
            cell=self.layout.cell,
            scale=self.scale,
            prefix_keys=self.prefix_keys,
            sizes=sizes,
        )

    def indices(self, qkv: Tensor, sizes: Tensor | None = None) -> Tensor:
        """Patch keys that each head and tile reads: int32 [B,H,T,K]."""
        select = cast(KeySelector, self.select)
        return ops.key_select(
            qkv,
            select.proj_q,
            select.proj_k,
            num_heads=self.num_heads,
            num_prefix=self.num_prefix,
            probe=self.sparsity.probe,
            tile=self.sparsity.tile,
            cell=self.layout.cell,
            keys=self.layout.keys,
            scale=self.scale,
            value_power=self.sparsity.value_power,
            sizes=sizes,
        )


class LandmarkAttention(SparseAttention):
    """The published method: one list per query over all tokens, class token included; no cells."""

    prefix_keys = 0

    def indices(self, qkv: Tensor, _: Tensor | None = None) -> Tensor:
        """Tokens that each head and patch query reads: int32 [B,H,N-1,K]. They are never merged here."""
        return ops.landmark_key_select(
            qkv,
            *cast(LandmarkSelector, self.select).inputs(),
            num_heads=self.num_heads,
            keys=self.layout.keys,
            # The published code scales by the number of heads, not by the head dimension.
            scale=self.num_heads**-0.5,
            top_coefficients=self.sparsity.top_coefficients,
            basis_threshold=self.sparsity.basis_threshold,
        )


@functools.cache
def _mixed(kind: Any, timm_kind: Any) -> Any:
    """The class of an attention object of timm that has become `kind`."""
    return type(kind.__name__, (kind, timm_kind), {"__doc__": kind.__doc__})


def make_dense(attention: Any) -> None:
    """Turn an attention of timm, in place, into `DenseAttention`."""
    attention.__class__ = _mixed(DenseAttention, attention.__class__)


def restore_attention(attention: Any) -> None:
    """Turn an attention, in place, into timm's own again."""
    if not isinstance(attention, PackedAttention):
        return
    for name in ("select", "sparsity", "layout", "num_prefix"):
        if hasattr(attention, name):
            delattr(attention, name)
    attention.__class__ = type(attention).__bases__[1]


def make_sparse(attention: Any, sparsity: SparsityConfig, patches: int, num_prefix: int) -> None:
    """Turn an attention of timm, in place, into `SparseAttention`.

    Its projections are zero (see `calibrate.py`); its sizes are given by `patch.set_budget`.

    Raises:
        ConfigError: the model's heads or tokens do not suit the settings.
    """
    if sparsity.channels > attention.head_dim:
        raise ConfigError(
            f"channels {sparsity.channels} exceed the head dimension {attention.head_dim}.",
            f"Give at most {attention.head_dim} channels.",
        )
    if sparsity.preset == "paper":
        tokens = patches + num_prefix
        landmarks = tokens // sparsity.landmark_factor
        if num_prefix != 1 or not 1 <= sparsity.top_coefficients <= landmarks:
            raise ConfigError(
                f"Preset 'paper' requires one class token and {sparsity.top_coefficients} landmarks; this model has "
                f"{num_prefix} prefix tokens and {landmarks} landmarks.",
                "Use the preset edge, or a larger image.",
            )
        attention.__class__ = _mixed(LandmarkAttention, attention.__class__)
        select: nn.Module = LandmarkSelector(attention.head_dim, sparsity.channels, tokens, landmarks)
    else:
        attention.__class__ = _mixed(SparseAttention, attention.__class__)
        select = KeySelector(attention.num_heads, attention.head_dim, sparsity.channels)
    attention.select = select.to(attention.proj.weight)
