"""Token merging along the curve (ToMe, ICLR 2023, section 3, with partners within a window, and smaller tokens first):
after a layer's attention and before its MLP, pairs of patches that are alike become one token each, which counts as
many as it stands for.

Every later layer sees fewer tokens. The order of the curve is kept, so that runs of tokens remain compact, and the
place of every original patch is carried along, so that outputs are whole again.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsifiner_edge.ops import torch_merge as ops
from sparsifiner_edge.ops.torch_native import single_sizes
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
            ops.merge_tokens(x, sizes, pairs),
            torch.where(first == second, a, a + b),
            self._carried(here, there, tokens.places),
            tokens.positions.gather(1, larger),
        )

    def pairs(self, qkv: Tensor, sizes: Tensor, num_heads: int) -> Tensor:
        """Which tokens become one: int32 [B,N-merged,2], see the operator MatchTokens."""
        return ops.match_tokens(
            qkv, sizes, num_heads=num_heads, num_prefix=self.prefix, window=self.window, merged=self.merged
        )

    def _carried(self, here: Tensor, there: Tensor, places: Tensor | None) -> Tensor:
        """Places of the original patches after the pairs."""
        new = torch.arange(here.shape[1], device=here.device).expand_as(here)
        room = torch.zeros(here.shape[0], here.shape[1] + self.merged, dtype=torch.long, device=here.device)
        after = room.scatter(1, here, new).scatter(1, there, new)
        return after if places is None else after.gather(1, places)
