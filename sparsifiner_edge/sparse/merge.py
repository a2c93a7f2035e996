"""Token reduction between a layer's attention and its MLP, by merging or pruning.

The remaining tokens keep their order, so that runs of consecutive tokens remain compact.

Merging follows ToMe (ICLR 2023, section 3), with partners within a window along the curve and smaller tokens first.
Pairs of similar patches become one token each, which counts as many patches as it contains. The location of every
original patch is kept, so that outputs have all patches again.

Pruning follows EViT (ICLR 2022, section 3). It removes the patch tokens with the least attention from the class token.
In an exported file it consists of standard operators.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsifiner_edge.ops import torch as ops
from sparsifiner_edge.ops import torch_merge
from sparsifiner_edge.ops.torch_native import single_sizes
from sparsifiner_edge.sparse.attention import HeadGeometry
from sparsifiner_edge.sparse.layer import CarriedTokens


class Merging(nn.Module):
    """Token merging between attention and MLP, without parameters.

    Attributes:
        merged: Number of pairs that become one token.
        prefix: Number of tokens before the patches.
        window: Window of partners along the curve; see the operator MatchTokens.
    """

    def __init__(self, merged: int, prefix: int, window: int) -> None:
        super().__init__()
        self.merged, self.prefix, self.window = merged, prefix, window

    def forward(self, tokens: CarriedTokens, qkv: Tensor, num_heads: int) -> CarriedTokens:
        """Merge `merged` pairs of tokens.

        Args:
            tokens: Tokens that enter the merge.
            qkv: Their packed queries, keys and values [B,N,3C].
            num_heads: Number of attention heads.

        Returns:
            The merged tokens, `merged` fewer than before.
        """
        x = tokens.values
        sizes = single_sizes(x) if tokens.sizes is None else tokens.sizes
        pairs = self.pairs(qkv, sizes, num_heads)
        first, second = pairs.long().unbind(-1)
        a, b = sizes.gather(1, first), sizes.gather(1, second)
        # Indices of the patches only, counted from the first patch.
        here, there = (side[:, self.prefix :] - self.prefix for side in (first, second))
        larger = torch.where((b > a)[:, self.prefix :], there, here)
        return CarriedTokens(
            torch_merge.merge_tokens(x, sizes, pairs),
            torch.where(first == second, a, a + b),
            self._carry(here, there, tokens.places),
            tokens.positions.gather(1, larger),
        )

    def pairs(self, qkv: Tensor, sizes: Tensor, num_heads: int) -> Tensor:
        """Return the pairs that become one token, int32 [B,N-merged,2]; see the operator MatchTokens."""
        return torch_merge.match_tokens(
            qkv, sizes, num_heads=num_heads, num_prefix=self.prefix, window=self.window, merged=self.merged
        )

    def _carry(self, here: Tensor, there: Tensor, places: Tensor | None) -> Tensor:
        """Return the token index of each original patch after the merge."""
        new = torch.arange(here.shape[1], device=here.device).expand_as(here)
        unset = torch.zeros(here.shape[0], here.shape[1] + self.merged, dtype=torch.long, device=here.device)
        after = unset.scatter(1, here, new).scatter(1, there, new)
        return after if places is None else after.gather(1, places)


class Pruning(nn.Module):
    """Token pruning between attention and MLP, without parameters.

    Attributes:
        remaining: Number of patch tokens that are kept.
        prefix: Number of tokens before the patches, the class token first.
    """

    def __init__(self, remaining: int, prefix: int) -> None:
        super().__init__()
        self.remaining, self.prefix = remaining, prefix

    def forward(self, tokens: CarriedTokens, qkv: Tensor, geometry: HeadGeometry) -> CarriedTokens:
        """Keep the `remaining` patch tokens with the highest scores, in their order.

        Args:
            tokens: Tokens that enter the pruning.
            qkv: Their packed queries, keys and values [B,N,3C].
            geometry: Sizes of the attention heads.

        Returns:
            Tokens [B, prefix + remaining, C].
        """
        x = tokens.values
        winners = ops.top_tokens(self.scores(qkv, geometry), self.remaining)
        rows = ops.rows_at(x[:, self.prefix :], winners)
        return tokens._replace(
            values=torch.cat([x[:, : self.prefix], rows], 1), positions=ops.rows_at(tokens.positions, winners)
        )

    def scores(self, qkv: Tensor, geometry: HeadGeometry) -> Tensor:
        """Return the attention of the class token to each patch, mean over the heads: float32 [B,P].

        A single query needs no matrix product. The logits and the softmax are float32 even for float16 qkv, because
        float16 probabilities would tie. No gradient flows through the scores.

        Args:
            qkv: Packed queries, keys and values [B,N,3C].
            geometry: Sizes of the attention heads.
        """
        with torch.autocast(qkv.device.type, enabled=False):
            q, k, _ = qkv.detach().float().unflatten(-1, (3, geometry.heads, geometry.dim)).unbind(2)
            logits = (geometry.scale * q[:, :1] * k).sum(-1)
            scores: Tensor = logits.softmax(1)[:, self.prefix :].mean(2)
            return scores
