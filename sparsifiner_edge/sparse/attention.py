"""Attention modules that take the place of a host's, in the same object and with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsifiner_edge.config import Layout, SparsityConfig
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


def rotated(x: Tensor, table: Tensor, half: bool) -> Tensor:
    """Rotary position embedding of heads x [B,P,H,d].

    Args:
        table: sines, then cosines: [P,2d], [H,P,2d] where heads differ, or [B,P,1 or H,2d] where images do.
        half: whether channel i turns with channel i + d/2 (DINOv3) or with its neighbour (EVA-02).
    """
    table = table if table.ndim == 4 else table.transpose(0, 1) if table.ndim == 3 else table[:, None]
    sines, cosines = table.chunk(2, -1)
    if half:
        left, right = x.chunk(2, -1)
        turned = torch.cat([-right, left], -1)
    else:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)
    return (x * cosines + turned * sines).type_as(x)


class PackedAttention(nn.Module):
    """What both kinds of attention share; each host adds how it stores a layer's weights (`hosts`).

    q, k and v stay packed as [B,N,3C] after bias, normalisation and rotation, which is what the operators read.
    """

    @property
    def geometry(self) -> HeadGeometry:
        """Of the host's heads."""
        raise NotImplementedError

    def projection(self) -> tuple[Tensor, Tensor | None]:
        """Weight [3C,D] and bias [3C] (None: without) that make q, k and v, however the host stores them."""
        raise NotImplementedError

    @property
    def norms(self) -> tuple[nn.Module, nn.Module] | None:
        """What normalises the heads' queries and keys before rotation; None: nothing does."""
        return None

    def rotated(self, x: Tensor, table: Tensor) -> Tensor:
        """Heads [B,P,H,d] of the patches turned to their places; see the function `rotated`."""
        raise NotImplementedError

    def joined(self, x: Tensor, attended: Tensor) -> Tensor:
        """The layer's input x [B,N,D] and heads' results [B,N,C] -> [B,N,D]."""
        raise NotImplementedError

    def attend(self, qkv: Tensor, sizes: Tensor | None = None) -> Tensor:
        """qkv [B,N,3C], and the tokens' sizes [B,N] where they are merged -> [B,N,C]."""
        raise NotImplementedError

    def forward(self, x: Tensor, table: Tensor | None = None, sizes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """For the layer alone, which knows how its tokens lie: x [B,N,D] along the curve, the patches' rotary table and
        the tokens' sizes [B,N] -> [B,N,D], and qkv [B,N,3C].
        """
        qkv = self.packed(x, table)
        return self.joined(x, self.attend(qkv, sizes)), qkv

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B,N,D] -> q, k, v [B,N,H,d], before rotation."""
        q, k, v = self.projected(x).unflatten(-1, (3, self.geometry.heads, self.geometry.dim)).unbind(2)
        norms = self.norms
        return (q, k, v) if norms is None else (norms[0](q), norms[1](k), v)

    def projected(self, x: Tensor) -> Tensor:
        """x [B,N,D] -> qkv [B,N,3C], after bias."""
        return F.linear(x, *self.projection())

    def packed(self, x: Tensor, table: Tensor | None = None) -> Tensor:
        """x [B,N,D], and a rotary table for the patches, which come last -> qkv [B,N,3C]."""
        if table is None and self.norms is None:
            return self.projected(x)
        q, k, v = self.heads(x)
        if table is not None:
            prefix = x.shape[1] - table.shape[-3 if table.ndim == 4 else -2]
            q, k = (torch.cat([y[:, :prefix], self.rotated(y[:, prefix:], table)], 1) for y in (q, k))
        return torch.stack([q, k, v], 2).flatten(2)


class DenseAttention(PackedAttention):
    """Plain attention as one operator: the dense layers of a student that has sparse ones."""

    def attend(self, qkv: Tensor, sizes: Tensor | None = None) -> Tensor:
        """See `PackedAttention`."""
        return ops.dense_attention(qkv, num_heads=self.geometry.heads, scale=self.geometry.scale, sizes=sizes)


Observer = Callable[["SparseAttention", Tensor, "Tensor | None"], None]
"""Called with a sparse layer, its qkv [B,N,3C], and the sizes [B,N] of its tokens where they are merged."""


class SparseAttention(PackedAttention):
    """KeySelect and SparseAttention over the layer's own q, k and v.

    Attributes:
        select: the predictor.
        sparsity, layout, num_prefix: what is sparse, the sizes that follow, and the tokens that are no patches.
        prefix_keys: whether every query reads the prefix tokens without listing them (1 or 0).
        observer: while a predictor learns: see `Observer`.
        densely: while a predictor learns: attend to all.
    """

    select: nn.Module
    sparsity: SparsityConfig
    layout: Layout
    num_prefix: int
    prefix_keys = 1
    observer: Observer | None = None
    densely: bool = False

    def attend(self, qkv: Tensor, sizes: Tensor | None = None) -> Tensor:
        """See `PackedAttention`."""
        dense = self.sparsity.keep == 1  # in the budget of now
        if self.observer is not None and not dense:
            self.observer(self, qkv, sizes)
        if self.densely or dense:
            return ops.dense_attention(qkv, num_heads=self.geometry.heads, scale=self.geometry.scale, sizes=sizes)
        found = self.together(qkv, sizes)
        if found is not None:
            return found
        return ops.sparse_attention(
            qkv,
            self.indices(qkv, sizes),
            num_heads=self.geometry.heads,
            num_prefix=self.num_prefix,
            tile=self.sparsity.tile,
            cell=self.layout.cell,
            scale=self.geometry.scale,
            prefix_keys=self.prefix_keys,
            sizes=sizes,
        )

    def together(self, qkv: Tensor, sizes: Tensor | None) -> Tensor | None:
        """Selection and attention at once where kernels do that and `indices` are these, else None."""
        if getattr(self.indices, "__func__", None) is not SparseAttention.indices:
            return None
        select = cast(KeySelector, self.select)
        return triton_layer(self.selection, qkv, sizes, select.proj_q, select.proj_k)

    @property
    def selection(self) -> dict[str, Any]:
        """Attributes of KeySelect."""
        return {
            "num_heads": self.geometry.heads,
            "num_prefix": self.num_prefix,
            "probe": self.sparsity.probe,
            "tile": self.sparsity.tile,
            "cell": self.layout.cell,
            "keys": self.layout.keys,
            "scale": self.geometry.scale,
            "value_power": self.sparsity.value_power,
        }

    def indices(self, qkv: Tensor, sizes: Tensor | None = None) -> Tensor:
        """Patch keys that each head and tile reads: int32 [B,H,T,K]."""
        select = cast(KeySelector, self.select)
        return ops.key_select(
            qkv,
            select.proj_q,
            select.proj_k,
            **self.selection,
            sizes=sizes,
        )


class LandmarkAttention(SparseAttention):
    """The published method: one list per query over all tokens, class token included; no cells."""

    prefix_keys = 0

    def indices(self, qkv: Tensor, _: Tensor | None = None) -> Tensor:
        """Tokens that each head and patch query reads: int32 [B,H,N-1,K]. They are never merged here."""
        select = cast(LandmarkSelector, self.select)
        return torch_landmarks.landmark_key_select(
            qkv,
            *select.inputs(),
            num_heads=self.geometry.heads,
            keys=self.layout.keys,
            # The published code scales by the number of heads, not by the head dimension.
            scale=self.geometry.heads**-0.5,
            top_coefficients=self.sparsity.top_coefficients,
            basis_threshold=self.sparsity.basis_threshold,
        )


_MIXED: dict[tuple[Any, ...], Any] = {}


def mixed(name: str, *kinds: Any) -> Any:
    """The class of an object of a host (the last kind) that has become something else as well (the first ones)."""
    if kinds not in _MIXED:
        _MIXED[kinds] = type(name, kinds, {"__doc__": kinds[0].__doc__})
    return _MIXED[kinds]


def unmixed(part: Any) -> None:
    """Turn an object of a class made by `mixed`, in place, into the host's own again."""
    part.__class__ = type(part).__bases__[-1]


def make_dense(attention: Any, host: type[PackedAttention]) -> None:
    """Turn an attention of a host, in place, into `DenseAttention`; host: how it stores its weights."""
    attention.__class__ = mixed("DenseAttention", DenseAttention, host, type(attention))


def restore_attention(attention: Any) -> None:
    """Turn an attention, in place, into the host's own again."""
    if not isinstance(attention, PackedAttention):
        return
    for name in ("select", "sparsity", "layout", "num_prefix"):
        if hasattr(attention, name):
            delattr(attention, name)
    unmixed(attention)


def make_sparse(
    attention: Any, host: type[PackedAttention], sparsity: SparsityConfig, patches: int, num_prefix: int
) -> None:
    """Turn an attention of a host, in place, into `SparseAttention`; host: how it stores its weights.

    Its projections are zero (see `calibrate.py`); its sizes are given by `patch.set_budget`.

    Raises:
        ConfigError: the model's heads or tokens do not suit the settings.
    """
    own = type(attention)
    make_dense(attention, host)
    heads, head_dim, _ = attention.geometry
    if sparsity.channels > head_dim:
        raise ConfigError(
            f"channels {sparsity.channels} exceed the head dimension {head_dim}.",
            f"Give at most {head_dim} channels.",
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
        kind: type[SparseAttention] = LandmarkAttention
        select: nn.Module = LandmarkSelector(head_dim, sparsity.channels, tokens, landmarks)
    else:
        kind, select = SparseAttention, KeySelector(heads, head_dim, sparsity.channels)
    weight = attention.projection()[0]
    attention.__class__ = mixed(kind.__name__, kind, host, own)
    attention.select = select.to(weight)
