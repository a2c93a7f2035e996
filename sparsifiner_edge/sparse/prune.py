"""Token pruning in the way of EViT (ICLR 2022, section 3): after a layer's attention and before its MLP, the patch
tokens that the class token attends to least are removed, or fused into one that joins the prefix.

Tokens are really removed: every later layer sees fewer. The order of those that stay is kept, so that runs of
consecutive tokens remain compact.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsifiner_edge.ops import torch as ops
from sparsifiner_edge.sparse.layer import CarriedTokens


class Pruning(nn.Module):
    """What a pruned block does between attention and MLP; it has no parameters.

    Attributes:
        kept: patch tokens that go on. prefix: tokens before the patches on entry.
        fuse: add the mean of what is dropped, weighted by its scores, to the end of the prefix.
    """

    def __init__(self, kept: int, prefix: int, fuse: bool) -> None:
        super().__init__()
        self.kept, self.prefix, self.fuse = kept, prefix, fuse

    def forward(self, tokens: CarriedTokens, scores: Tensor) -> CarriedTokens:
        """Keep the `kept` patches with the highest scores [B,N] (see `ops.token_score`), in their order: tokens
        [B, prefix (+ 1) + kept, C].
        """
        x = tokens.values
        patches, weights = x[:, self.prefix :], scores[:, self.prefix :]
        winners = ops.top_tokens(weights, self.kept)
        left, parts = ops.rows_at(patches, winners), [x[:, : self.prefix]]
        if self.fuse:
            rest = _rest(weights, winners)[:, None]
            with torch.autocast(x.device.type, enabled=False):
                dropped = rest @ patches.float() / rest.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
            parts.append(dropped.to(x.dtype))
        return tokens._replace(values=torch.cat([*parts, left], 1), positions=ops.rows_at(tokens.positions, winners))


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
