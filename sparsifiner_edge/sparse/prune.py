"""Token pruning in the way of EViT (ICLR 2022, section 3): after a layer's attention and before its MLP, the patch
tokens that the class token attends to least are removed.

Tokens are really removed: every later layer sees fewer. The order of those that stay is kept, so that runs of
consecutive tokens remain compact. In an exported file all of this is standard operators.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsifiner_edge.ops import torch as ops
from sparsifiner_edge.sparse.attention import HeadGeometry
from sparsifiner_edge.sparse.layer import CarriedTokens


class Pruning(nn.Module):
    """What a pruned block does between attention and MLP; it has no parameters.

    Attributes:
        kept: patch tokens that go on. prefix: tokens before the patches, the class token first.
    """

    def __init__(self, kept: int, prefix: int) -> None:
        super().__init__()
        self.kept, self.prefix = kept, prefix

    def forward(self, tokens: CarriedTokens, qkv: Tensor, geometry: HeadGeometry) -> CarriedTokens:
        """Keep the `kept` patches that score highest by the layer's qkv [B,N,3C], in their order: tokens
        [B, prefix + kept, C].
        """
        x = tokens.values
        winners = ops.top_tokens(self.scores(qkv, geometry), self.kept)
        left = ops.rows_at(x[:, self.prefix :], winners)
        return tokens._replace(
            values=torch.cat([x[:, : self.prefix], left], 1), positions=ops.rows_at(tokens.positions, winners)
        )

    def scores(self, qkv: Tensor, geometry: HeadGeometry) -> Tensor:
        """What the class token attends to among the patches, mean over the heads: qkv [B,N,3C] -> float32 [B,P].

        One query needs no product of matrices. Of float16 products the sums and the softmax are float32 all the same:
        ranks of float16 probabilities would tie. No gradient flows through it.
        """
        with torch.autocast(qkv.device.type, enabled=False):
            q, k, _ = qkv.detach().float().unflatten(-1, (3, geometry.heads, geometry.dim)).unbind(2)
            logits = (geometry.scale * q[:, :1] * k).sum(-1)
            scores: Tensor = logits.softmax(1)[:, self.prefix :].mean(2)
            return scores
