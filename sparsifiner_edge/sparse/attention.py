"""Attention modules that take the place of timm's `Attention`, in the same object and with the same weights."""

from __future__ import annotations

from typing import cast

import torch
from timm.layers.attention import Attention
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


class _PackedAttention(Attention):  # type: ignore[misc]  # timm carries no types
    """What both attention modules share.

    Modifications of timm's `Attention`:
        - q, k and v stay packed as [B,N,3C] after bias and qk-norm, which is what the operators read.
        - attention masks are refused.
    """

    def attend(self, qkv: Tensor) -> Tensor:
        """qkv [B,N,3C] -> [B,N,C]."""
        raise NotImplementedError

    def packed(self, x: Tensor) -> Tensor:
        """x [B,N,D] -> qkv [B,N,3C], after bias and qk-norm."""
        qkv = cast(Tensor, self.qkv(x))
        if isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity):
            return qkv
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)
        return torch.stack([self.q_norm(q), self.k_norm(k), v], 2).flatten(2)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x [B,N,D] -> [B,N,D]."""
        if attn_mask is not None or is_causal:
            raise ConfigError("Sparse attention takes no attention mask.", "Call the model without attn_mask.")
        out = self.norm(self.attend(self.packed(x)))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return cast(Tensor, self.proj_drop(self.proj(out)))


class DenseAttention(_PackedAttention):
    """Plain attention as one operator: the dense layers of a student that has sparse ones."""

    def attend(self, qkv: Tensor) -> Tensor:
        """qkv [B,N,3C] -> [B,N,C]."""
        return ops.dense_attention(qkv, num_heads=self.num_heads, scale=self.scale)


class SparseAttention(_PackedAttention):
    """KeySelect and SparseAttention over the layer's own q, k and v.

    Attributes:
        select: the predictor.
        sparsity, layout, num_prefix: what is sparse, the sizes that follow, and the tokens that are no patches.
    """

    select: nn.Module
    sparsity: SparsityConfig
    layout: Layout
    num_prefix: int

    def indices(self, qkv: Tensor) -> Tensor:
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
        )

    def attend(self, qkv: Tensor) -> Tensor:
        """qkv [B,N,3C] -> [B,N,C]."""
        return ops.sparse_attention(
            qkv,
            self.indices(qkv),
            num_heads=self.num_heads,
            num_prefix=self.num_prefix,
            tile=self.sparsity.tile,
            cell=self.layout.cell,
            scale=self.scale,
        )


class LandmarkAttention(SparseAttention):
    """The published method: one list per query over all tokens, class token included; no cells."""

    def indices(self, qkv: Tensor) -> Tensor:
        """Tokens that each head and patch query reads: int32 [B,H,N-1,K]."""
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

    def attend(self, qkv: Tensor) -> Tensor:
        """qkv [B,N,3C] -> [B,N,C]."""
        return ops.sparse_attention(
            qkv,
            self.indices(qkv),
            num_heads=self.num_heads,
            num_prefix=self.num_prefix,
            tile=1,
            cell=0,
            scale=self.scale,
            prefix_keys=0,
        )


def make_dense(attention: Attention) -> None:
    """Turn a timm attention, in place, into `DenseAttention`."""
    attention.__class__ = DenseAttention


def make_sparse(attention: Attention, sparsity: SparsityConfig, layout: Layout, num_prefix: int) -> None:
    """Turn a timm attention, in place, into `SparseAttention` with zero projections (see `calibrate.py`)."""
    if sparsity.channels > attention.head_dim:
        raise ConfigError(
            f"channels {sparsity.channels} exceed the head dimension {attention.head_dim}.",
            f"Give at most {attention.head_dim} channels.",
        )
    if sparsity.preset == "paper":
        tokens = layout.patches + num_prefix
        landmarks = tokens // sparsity.landmark_factor
        if num_prefix != 1 or not 1 <= sparsity.top_coefficients <= landmarks:
            raise ConfigError(
                f"Preset 'paper' needs one class token and {sparsity.top_coefficients} landmarks; this model has "
                f"{num_prefix} prefix tokens and {landmarks} landmarks.",
                "Use the preset edge, or a larger image.",
            )
        attention.__class__ = LandmarkAttention
        attention.select = LandmarkSelector(attention.head_dim, sparsity.channels, tokens, landmarks)
    else:
        attention.__class__ = SparseAttention
        attention.select = KeySelector(attention.num_heads, attention.head_dim, sparsity.channels)
    attention.sparsity, attention.layout, attention.num_prefix = sparsity, layout, num_prefix
