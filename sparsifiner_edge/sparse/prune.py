"""Token pruning in the way of EViT (ICLR 2022, section 3): after a layer's attention and before its MLP, the patch
tokens that the class token attends to least are removed, or fused into one that joins the prefix.

Tokens are really removed: every later layer sees fewer. The order of those that stay is kept, so that runs of
consecutive tokens remain compact.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from sparsifiner_edge.ops import torch as ops


class Pruning(nn.Module):
    """What a pruned block does between attention and MLP; it has no parameters.

    Attributes:
        kept: patch tokens that go on. prefix: tokens before the patches on entry.
        fuse: add the mean of what is dropped, weighted by its scores, to the end of the prefix.
    """

    def __init__(self, kept: int, prefix: int, fuse: bool) -> None:
        super().__init__()
        self.kept, self.prefix, self.fuse = kept, prefix, fuse

    def forward(self, x: Tensor, scores: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the `kept` patches with the highest scores, in their order.

        Args:
            x: tokens [B,N,C]. scores: [B,N], see `ops.token_score`. positions: places of the patches, [B,P].

        Returns:
            Tokens [B, prefix (+ 1) + kept, C] and places [B,kept].
        """
        patches, weights = x[:, self.prefix :], scores[:, self.prefix :]
        winners = ops.top_tokens(weights, self.kept)
        left, parts = ops.rows_at(patches, winners), [x[:, : self.prefix]]
        if self.fuse:
            rest = _rest(weights, winners)[:, None]
            with torch.autocast(x.device.type, enabled=False):
                dropped = rest @ patches.float() / rest.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
            parts.append(dropped.to(x.dtype))
        return torch.cat([*parts, left], 1), ops.rows_at(positions, winners)


class PrunedBlock(Block):  # type: ignore[misc]  # timm carries no types
    """Modifications of timm's `Block`: tokens are removed between attention and MLP.

    Attributes:
        pruning: how many, and how.
    """

    pruning: Pruning

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """x [B,N,C] and the patches' places [B,P] -> x [B,N',C] and the places [B,P'] of those that are left."""
        attention = cast(Any, self.attn)
        normed = self.norm1(x)
        qkv = attention.packed(normed)
        x = x + self.drop_path1(self.ls1(attention.joined(normed, attention.attend(qkv))))
        x, positions = self.pruning(x, self.scores(qkv), positions)
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x, positions

    def scores(self, qkv: Tensor) -> Tensor:
        """What the class token attends to: qkv [B,N,3C] -> float32 [B,N]."""
        attention = cast(Any, self.attn)
        return ops.token_score(qkv, num_heads=attention.num_heads, scale=attention.scale)


def _rest(weights: Tensor, winners: Tensor) -> Tensor:
    """Weights [B,P] of what is dropped; of the winners [B,K] 0, not their sum taken off: it may be a millionth of all.

    By the least score that wins: comparing every place with every winner costs more than a layer of attention. What
    equals it shares what is dropped of that.
    """
    least = ops.rows_at(weights[:, :, None], winners).amin(1)
    tied = (weights == least).float()
    above = (weights > least).float().sum(-1, keepdim=True)
    dropped = 1 - (winners.shape[1] - above) / tied.sum(-1, keepdim=True)
    return torch.where(weights < least, weights, tied * dropped * least)


def make_pruned(block: Any, kept: int, prefix: int, fuse: bool) -> None:
    """Turn a `Block` of timm, in place, into a `PrunedBlock`."""
    block.__class__ = PrunedBlock
    block.pruning = Pruning(kept, prefix, fuse)


def make_whole(block: Any) -> None:
    """Undo `make_pruned`."""
    if isinstance(block, PrunedBlock):
        del block.pruning
        block.__class__ = Block
