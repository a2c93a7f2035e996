"""Attention modules that take the place of a library's, in the same object and with the same weights."""

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


class HeadGeometry(NamedTuple):
    """Sizes of a layer's heads: how many, channels of each, and the factor of a query's product with a key."""

    heads: int
    dim: int
    scale: float


def first(module: Any, *names: str) -> Any:
    """The first part that a module has under one of these names; None: none. Libraries build layers of one form, and
    name the parts differently.
    """
    return next((part for part in (getattr(module, name, None) for name in names) if part is not None), None)


def through(x: Tensor, *parts: Any) -> Tensor:
    """x after these parts of a module, one after the other, without those that it does not have (None)."""
    for part in parts:
        x = x if part is None else part(x)
    return x


def attention_of(layer: Any) -> Any:
    """The attention of a layer of any library."""
    return first(layer, "attn", "attention", "self_attn")


def geometry_of(attention: Any) -> HeadGeometry:
    """Of an attention of any library."""
    heads, scale = first(attention, "num_heads", "num_attention_heads"), first(attention, "scale", "scaling")
    return HeadGeometry(int(heads), int(attention.head_dim), float(scale))


def rotate(x: Tensor, table: Tensor, half: bool) -> Tensor:
    """Rotary position embedding of heads x [B,P,H,d].

    Args:
        table: sines, then cosines: [P,2d], [H,P,2d] where heads differ, or [B,P,1 or H,2d] where images do.
        half: whether channel i turns with channel i + d/2 (DINOv3) or with its neighbour (EVA-02).
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
    """Plain attention as one operator, of the parts that a library's attention has: the dense layers of a student that
    has sparse ones, and what the sparse ones share with them.

    q, k and v stay packed as [B,N,3C] after bias, normalisation and rotation, which is what the operators read.

    Attributes:
        densely: while a predictor learns: attend to all, and merge nothing.
    """

    densely: bool = False

    @property
    def geometry(self) -> HeadGeometry:
        """Of the heads."""
        return geometry_of(self)

    def projection(self) -> tuple[Tensor, Tensor | None]:
        """Weight [3C,D] and bias [3C] (None: without) that make q, k and v, stored as one matrix or as three, their
        biases together or apart.
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
        """What normalises the heads' queries and keys before rotation; None: nothing does."""
        norms = first(self, "q_norm"), first(self, "k_norm")
        return None if all(norm is None or isinstance(norm, nn.Identity) for norm in norms) else norms

    def rotate(self, x: Tensor, table: Tensor) -> Tensor:
        """Heads [B,P,H,d] of the patches turned to their places; see the function `rotate`.

        timm's attention, which has `qkv`, says whether by halves (not, where it says nothing); transformers' always is.
        """
        return rotate(x, table, getattr(self, "rotate_half", not hasattr(self, "qkv")))

    def join(self, x: Tensor, attended: Tensor) -> Tensor:
        """The layer's input x [B,N,D] and heads' results [B,N,C] -> [B,N,D]."""
        attended, gate = through(attended, first(self, "norm")), first(self, "gate")
        if gate is not None:
            attended = attended * gate(x).sigmoid()
        return through(attended, first(self, "proj", "o_proj", "out_proj"), first(self, "proj_drop"))

    def attend(self, qkv: Tensor, sizes: Tensor | None = None) -> Tensor:
        """qkv [B,N,3C], and the tokens' sizes [B,N] where they are merged -> [B,N,C]."""
        return ops.dense_attention(qkv, num_heads=self.geometry.heads, scale=self.geometry.scale, sizes=sizes)

    def forward(self, x: Tensor, table: Tensor | None = None, sizes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """For the layer alone, which knows how its tokens lie: x [B,N,D] along the curve, the patches' rotary table and
        the tokens' sizes [B,N] -> [B,N,D], and qkv [B,N,3C].
        """
        qkv = self.pack(x, table)
        return self.join(x, self.attend(qkv, sizes)), qkv

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B,N,D] -> q, k, v [B,N,H,d], before rotation."""
        q, k, v = self.project(x).unflatten(-1, (3, self.geometry.heads, self.geometry.dim)).unbind(2)
        norms = self.norms
        return (q, k, v) if norms is None else (norms[0](q), norms[1](k), v)

    def project(self, x: Tensor) -> Tensor:
        """x [B,N,D] -> qkv [B,N,3C], after bias."""
        return F.linear(x, *self.projection())

    def pack(self, x: Tensor, table: Tensor | None = None) -> Tensor:
        """x [B,N,D], and a rotary table for the patches, which come last -> qkv [B,N,3C]."""
        if table is None and self.norms is None:
            return self.project(x)
        q, k, v = self.heads(x)
        if table is not None:
            prefix = x.shape[1] - table.shape[-3 if table.ndim == 4 else -2]
            q, k = (torch.cat([y[:, :prefix], self.rotate(y[:, prefix:], table)], 1) for y in (q, k))
        return torch.stack([q, k, v], 2).flatten(2)


class SparseAttention(PackedAttention):
    """KeySelect and SparseAttention over the layer's own q, k and v.

    Attributes:
        select: the predictor.
        sparsity, layout, num_prefix: what is sparse, the sizes that follow, and the tokens that are no patches.
        prefix_keys: whether every query reads the prefix tokens without listing them (1 or 0).
    """

    select: nn.Module
    sparsity: SparsityConfig
    layout: Layout
    num_prefix: int
    prefix_keys = 1

    def attend(self, qkv: Tensor, sizes: Tensor | None = None) -> Tensor:
        """See `PackedAttention`."""
        if self.densely or self.sparsity.keep == 1:  # in the current budget
            return super().attend(qkv, sizes)
        together = self.together(qkv, sizes)
        if together is not None:
            return together
        return ops.sparse_attention(
            qkv, self.indices(qkv, sizes), **self.shared, prefix_keys=self.prefix_keys, sizes=sizes
        )

    def together(self, qkv: Tensor, sizes: Tensor | None) -> Tensor | None:
        """Selection and attention at once where kernels do that and `indices` are these, else None."""
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
            "cell": self.layout.cell,
            "scale": self.geometry.scale,
        }

    @property
    def selection(self) -> dict[str, Any]:
        """Attributes of KeySelect."""
        more = {"probe": self.sparsity.probe, "keys": self.layout.keys, "value_power": self.sparsity.value_power}
        return self.shared | more

    def indices(self, qkv: Tensor, sizes: Tensor | None = None) -> Tensor:
        """Patch keys that each head and tile reads: int32 [B,H,T,K]."""
        select = cast(KeySelector, self.select)
        return ops.key_select(qkv, select.proj_q, select.proj_k, **self.selection, sizes=sizes)


class LandmarkAttention(SparseAttention):
    """The published method: one list per query over all tokens, class token included; no cells."""

    prefix_keys = 0

    def indices(self, qkv: Tensor, _: Tensor | None = None) -> Tensor:
        """Tokens that each head and patch query reads: int32 [B,H,N-1,K]. They are never merged here."""
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


def mix(name: str, ours: Any, before: Any) -> Any:
    """The class of an object of a library (of class `before`) that has become one of ours as well."""
    if (ours, before) not in _MIXED:
        _MIXED[ours, before] = type(name, (ours, before), {"__doc__": ours.__doc__})
    return _MIXED[ours, before]


def restore(part: Any, ours: Any, *names: str) -> None:
    """Turn an object of a class made by `mix`, in place, into the library's own again, without these attributes."""
    if isinstance(part, ours):
        for name in names:
            if hasattr(part, name):
                delattr(part, name)
        part.__class__ = type(part).__bases__[-1]


def make_dense(attention: Any) -> None:
    """Turn an attention of a library, in place, into `PackedAttention`."""
    attention.__class__ = mix("PackedAttention", PackedAttention, type(attention))


def restore_attention(attention: Any) -> None:
    """Turn an attention, in place, into the library's own again."""
    restore(attention, PackedAttention, "select", "sparsity", "layout", "num_prefix")


def make_sparse(attention: Any, sparsity: SparsityConfig, patches: int, num_prefix: int) -> None:
    """Turn an attention of a library, in place, into `SparseAttention`.

    Its projections are zero (see `calibrate.py`); its sizes are given by `patch.set_budget`.

    Raises:
        ConfigError: the model's heads or tokens do not suit the settings.
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
                f"Preset 'paper' requires one class token and {LANDMARK_FACTOR} tokens; this model has {num_prefix} "
                f"prefix tokens of {tokens}.",
                "Use the preset edge, or a larger image.",
            )
        kind: type[SparseAttention] = LandmarkAttention
        select: nn.Module = LandmarkSelector(head_dim, sparsity.channels, tokens, landmarks)
    else:
        kind, select = SparseAttention, KeySelector(heads, head_dim, sparsity.channels)
    weight = attention.projection()[0]
    attention.__class__ = mix(kind.__name__, kind, before)
    attention.select = select.to(weight)
