"""Token merging along the curve (ToMe, ICLR 2023, section 3, with partners within a window, and smaller tokens first):
after a layer's attention and before its MLP, pairs of patches that are alike become one token each, which counts as
many as it stands for.

Every later layer sees fewer tokens. The order of the curve is kept, so that runs of tokens remain compact, and the
place of every original patch is carried along, so that outputs are whole again.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from sparsifiner_edge.ops import torch_merge as ops


class MergedTokens(NamedTuple):
    """What is known of tokens that may stand for several patches.

    Attributes:
        sizes: patches that each token stands for, float32 [B,N]; None before the first merge.
        places: token, counted from the first patch, that each original patch is in now: int64 [B,P], curve's order.
        origins: original patch whose rotary angle each patch token has: int64 [B,P']; None without rotary embeddings.
    """

    sizes: Tensor | None
    places: Tensor
    origins: Tensor | None


class Merging(nn.Module):
    """What happens between attention and MLP; it has no parameters.

    Attributes:
        merged: pairs that become one token. prefix: tokens before the patches. window: see MatchTokens.
    """

    def __init__(self, merged: int, prefix: int, window: int) -> None:
        super().__init__()
        self.merged, self.prefix, self.window = merged, prefix, window

    def forward(self, x: Tensor, qkv: Tensor, num_heads: int, state: MergedTokens) -> tuple[Tensor, MergedTokens]:
        """Tokens x [B,N,C] and their qkv [B,N,3C] -> [B,N-merged,C], and what is known of those."""
        sizes = torch.ones_like(x[:, :, 0], dtype=torch.float32) if state.sizes is None else state.sizes
        pairs = self.pairs(qkv, sizes, num_heads)
        first, second = pairs.long().unbind(-1)
        alone = first == second
        a, b = sizes.gather(1, first), sizes.gather(1, second)
        origins = state.origins
        if origins is not None:
            here, there = first[:, self.prefix :] - self.prefix, second[:, self.prefix :] - self.prefix
            larger = torch.where((b > a)[:, self.prefix :], there, here)
            origins = origins.gather(1, larger)
        return ops.merge_tokens(x, sizes, pairs), MergedTokens(
            torch.where(alone, a, a + b), self._carried(first, second, state.places), origins
        )

    def pairs(self, qkv: Tensor, sizes: Tensor, num_heads: int) -> Tensor:
        """Which tokens become one: int32 [B,N-merged,2], see the operator MatchTokens."""
        return ops.match_tokens(
            qkv, sizes, num_heads=num_heads, num_prefix=self.prefix, window=self.window, merged=self.merged
        )

    def _carried(self, first: Tensor, second: Tensor, places: Tensor) -> Tensor:
        """Places of the original patches after the pairs."""
        first, second = (x[:, self.prefix :] - self.prefix for x in (first, second))
        new = torch.arange(first.shape[1], device=first.device).expand_as(first)
        room = torch.zeros(first.shape[0], first.shape[1] + self.merged, dtype=torch.long, device=first.device)
        return room.scatter(1, first, new).scatter(1, second, new).gather(1, places)


class MergingBlock(nn.Module):
    """Modifications of timm's `Block` and `EvaBlock`, mixed into the class of the object:

    - called with what is known of the tokens, it attends by their sizes and merges some of them before the MLP;
    - called as timm calls it, it is timm's.

    Attributes:
        merging: how many, and how; None where this layer only sees what others merged.
    """

    merging: Merging | None

    def forward(self, x: Tensor, *given: Any, state: MergedTokens | None = None, **options: Any) -> Any:
        """x [B,N,C] and `state` -> x [B,N',C] and its state; `rope`: a table [B,P,1 or H,2d], or None."""
        if state is None:
            return super().forward(x, *given, **options)
        block = cast(Any, self)
        attention = block.attn
        normed = block.norm1(x)
        qkv = attention.packed(normed, options.get("rope"))
        attended = attention.joined(normed, attention.attend(qkv, state.sizes))
        x = x + block.drop_path1(_scaled(block, 1, attended))
        if self.merging is not None:
            x, state = self.merging(x, qkv, attention.num_heads, state)
        x = x + block.drop_path2(_scaled(block, 2, block.mlp(block.norm2(x))))
        return x, state


def _scaled(block: Any, branch: int, x: Tensor) -> Tensor:
    """A residual branch times its layer scale, as `Block` (a module) or `EvaBlock` (a parameter or None) has it."""
    scale = getattr(block, f"ls{branch}", None)
    if scale is not None:
        return cast(Tensor, scale(x))
    factor = getattr(block, f"gamma_{branch}", None)
    return x if factor is None else factor * x


@functools.cache
def _merging(kind: type) -> Any:
    return type(f"Merging{kind.__name__}", (MergingBlock, kind), {"__doc__": MergingBlock.__doc__})


def make_merging(block: Any, merging: Merging | None) -> None:
    """Turn a block of timm, in place, into a `MergingBlock`."""
    if not isinstance(block, MergingBlock):
        block.__class__ = _merging(block.__class__)
    block.merging = merging


def stop_merging(block: Any) -> None:
    """Undo `make_merging`."""
    if isinstance(block, MergingBlock):
        del block.merging
        block.__class__ = type(block).__bases__[1]
