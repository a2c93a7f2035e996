"""Fewer tokens after a layer's attention and before its MLP, for every later layer: merged or pruned. The order of
those that stay is kept, so that runs of consecutive tokens remain compact.

Merging along the curve (ToMe, ICLR 2023, section 3, with partners within a window, and smaller tokens first): pairs of
patches that are alike become one token each, which counts as many as it stands for. The place of every original patch
is carried along, so that outputs are whole again.

Pruning in the way of EViT (ICLR 2022, section 3): the patch tokens that the class token attends to least are removed.
In an exported file all of this is standard operators.
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
    """What happens between attention and MLP; it has no parameters.

    Attributes:
        merged: pairs that become one token. prefix: tokens before the patches. window: see MatchTokens.
    """

    def __init__(self, merged: int, prefix: int, window: int) -> None:
        super().__init__()
        self.merged, self.prefix, self.window = merged, prefix, window

    def forward(self, tokens: CarriedTokens, qkv: Tensor, num_heads: int) -> CarriedTokens:
        """Tokens and their qkv [B,N,3C] -> `merged` fewer of them."""
        x = tokens.values
        sizes = single_sizes(x) if tokens.sizes is None else tokens.sizes
        pairs = self.pairs(qkv, sizes, num_heads)
        first, second = pairs.long().unbind(-1)
        a, b = sizes.gather(1, first), sizes.gather(1, second)
        # The patches alone, counted from the first.
        here, there = (side[:, self.prefix :] - self.prefix for side in (first, second))
        larger = torch.where((b > a)[:, self.prefix :], there, here)
        return CarriedTokens(
            torch_merge.merge_tokens(x, sizes, pairs),
            torch.where(first == second, a, a + b),
            self._carry(here, there, tokens.places),
            tokens.positions.gather(1, larger),
        )

    def pairs(self, qkv: Tensor, sizes: Tensor, num_heads: int) -> Tensor:
        """Which tokens become one: int32 [B,N-merged,2], see the operator MatchTokens."""
        return torch_merge.match_tokens(
            qkv, sizes, num_heads=num_heads, num_prefix=self.prefix, window=self.window, merged=self.merged
        )

    def _carry(self, here: Tensor, there: Tensor, places: Tensor | None) -> Tensor:
        """Places of the original patches after the pairs."""
        new = torch.arange(here.shape[1], device=here.device).expand_as(here)
        room = torch.zeros(here.shape[0], here.shape[1] + self.merged, dtype=torch.long, device=here.device)
        after = room.scatter(1, here, new).scatter(1, there, new)
        return after if places is None else after.gather(1, places)


class Pruning(nn.Module):
    """What a layer that prunes does between attention and MLP; it has no parameters.

    Attributes:
        remaining: patch tokens that go on. prefix: tokens before the patches, the class token first.
    """

    def __init__(self, remaining: int, prefix: int) -> None:
        super().__init__()
        self.remaining, self.prefix = remaining, prefix

    def forward(self, tokens: CarriedTokens, qkv: Tensor, geometry: HeadGeometry) -> CarriedTokens:
        """Keep the `remaining` patches that score highest by the layer's qkv [B,N,3C], in their order: tokens
        [B, prefix + remaining, C].
        """
        x = tokens.values
        winners = ops.top_tokens(self.scores(qkv, geometry), self.remaining)
        rows = ops.rows_at(x[:, self.prefix :], winners)
        return tokens._replace(
            values=torch.cat([x[:, : self.prefix], rows], 1), positions=ops.rows_at(tokens.positions, winners)
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
