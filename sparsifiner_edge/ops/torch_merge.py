"""MatchTokens and MergeTokens in PyTorch; `torch.py` contains the attention operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsifiner_edge.ops.torch import rows_at, run, split_heads, top_keys, true_places

_BROKEN = -1e30
"""Lower bound of the similarity of two tokens; NaN counts as this value."""
_NOBODY = -3e30
"""Similarity that stands for "no partner"; it is below every real similarity."""


def match_tokens(qkv: Tensor, sizes: Tensor, **attributes: Any) -> Tensor:
    """Run MatchTokens: int32 pairs [B,N-merged,2]. The matching has no gradient."""
    # `no_grad` is not applied here: torch.export would turn it into a submodule.
    return run("MatchTokens", _match_tokens, (qkv, sizes), attributes)


@torch.no_grad()
def _match_tokens(qkv: Tensor, sizes: Tensor, *, num_heads: int, num_prefix: int, window: int, merged: int) -> Tensor:
    batch, tokens, _ = qkv.shape
    metric = split_heads(qkv, num_heads)[1][:, :, num_prefix:].float().mean(1)
    metric = metric / torch.linalg.vector_norm(metric, dim=-1, keepdim=True)
    best, partner = _best_partners(metric, sizes[:, num_prefix:], window)
    score, suitor = _best_suitors(best, partner, metric.shape[1] // 2, window)
    # Ties go to the lower index in every step: `max` returns the first maximum.
    winners = top_keys(score, merged).long()
    chosen = suitor.gather(1, winners)
    alone = chosen < 0
    # Winners without a suitor write to the extra last entry, which is discarded.
    taken = torch.zeros(batch, best.shape[1] + 1, dtype=torch.bool, device=qkv.device)
    taken = taken.scatter(1, torch.where(alone, best.shape[1], chosen), True)
    free = true_places(~taken[:, :-1], best.shape[1])
    # Winners without a suitor are paired with the free even patches, both in ascending order.
    chosen = torch.where(alone, free.gather(1, (alone.cumsum(1) - 1).clamp_min(0)), chosen)
    gone = torch.zeros(batch, tokens, dtype=torch.bool, device=qkv.device)
    gone = gone.scatter(1, num_prefix + 2 * chosen, True)
    second = torch.arange(tokens, device=qkv.device).repeat(batch, 1)
    second = second.scatter(1, num_prefix + 2 * winners + 1, num_prefix + 2 * chosen)
    stays = true_places(~gone, tokens - merged)
    return torch.stack([stays, second.gather(1, stays)], -1).to(torch.int32)


def _best_partners(metric: Tensor, sizes: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Return the similarity of each even patch to its best partner in the window, and the partner's index.

    Args:
        metric: Normalized mean keys [B,P,d].
        sizes: Sizes [B,P].
        window: Number of candidates.

    Returns:
        Similarities [B,E] and indices [B,E] into the odd patches.
    """
    seek, sought = metric[:, ::2], metric[:, 1::2]
    places = torch.arange(seek.shape[1], device=seek.device)[:, None]
    places = places + torch.arange(-window // 2, window // 2, device=seek.device)
    outside = (places < 0) | (places >= sought.shape[1])
    places = places.clamp(0, sought.shape[1] - 1)
    a, b = sizes[:, ::2, None], sizes[:, 1::2][:, places]
    alike = (a * b / (a + b)).sqrt() * ((seek[:, :, None] * sought[:, places]).sum(-1) - 1)
    best, arg = alike.nan_to_num(nan=_BROKEN).clamp_min(_BROKEN).masked_fill(outside, _NOBODY).max(-1)
    return best, places.expand(len(seek), -1, -1).gather(2, arg[..., None])[..., 0]


def _best_suitors(best: Tensor, partner: Tensor, sought: int, window: int) -> tuple[Tensor, Tensor]:
    """Return the similarity of each odd patch to its best suitor, and the suitor's index.

    A suitor is an even patch whose best partner is this odd patch.

    Args:
        best: Similarity [B,E] of each even patch to its best partner.
        partner: Index [B,E] of that partner among the odd patches.
        sought: Number of odd patches O.
        window: Number of candidates.

    Returns:
        Similarities [B,O], `_NOBODY` without a suitor, and indices [B,O] into the even patches, -1 without a suitor.
    """
    places = torch.arange(sought, device=best.device)[:, None]
    places = places + torch.arange(1 - window // 2, window // 2 + 1, device=best.device)
    outside = (places < 0) | (places >= best.shape[1])
    places = places.clamp(0, best.shape[1] - 1)
    wooed = partner[:, places] == torch.arange(sought, device=best.device)[:, None]
    score, arg = best[:, places].masked_fill(~wooed | outside, _NOBODY).max(-1)
    suitor = places.expand(len(best), -1, -1).gather(2, arg[..., None])[..., 0]
    return score, torch.where(score > _NOBODY, suitor, -1)


def merge_tokens(x: Tensor, sizes: Tensor, pairs: Tensor) -> Tensor:
    """Run MergeTokens: [B,M,C], differentiable in x."""
    return run("MergeTokens", _merge_tokens, (x, sizes, pairs), {})


def _merge_tokens(x: Tensor, sizes: Tensor, pairs: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        first, second = pairs.long().unbind(-1)
        a, b = sizes.gather(1, first), sizes.gather(1, second)
        share = torch.where(first == second, 1, a / (a + b))[..., None]
        both: Tensor = share * rows_at(x, first).float() + (1 - share) * rows_at(x, second).float()
        return both.to(x.dtype)
