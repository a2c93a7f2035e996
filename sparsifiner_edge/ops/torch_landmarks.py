"""The published predictor in PyTorch: LandmarkKeySelect, and the form that is trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsifiner_edge.ops.torch import run, split_heads, top_keys


def landmark_coefficients(q: Tensor, k: Tensor, weights: Sequence[Tensor], scale: float) -> Tensor:
    """Coefficients of patch queries over landmarks: q, k [B,H,N,d] -> float32 [B,H,N-1,L], differentiable.

    Args:
        weights: the operator's inputs after qkv, in the schema's order.
    """
    with torch.autocast(q.device.type, enabled=False):
        proj_q, bias_q, proj_k, bias_k, down, _ = (weight.float() for weight in weights)
        projected_q = F.linear(q[:, :, 1:].float(), proj_q, bias_q)
        landmarks = F.linear(k.float(), proj_k, bias_k).transpose(-1, -2) @ down
        return torch.softmax(scale * projected_q @ landmarks, -1)


def landmark_attention(q: Tensor, k: Tensor, weights: Sequence[Tensor], scale: float) -> Tensor:
    """The training-time form of the published predictor: signed, unthresholded, differentiable [B,H,N-1,N].

    It is held against the teacher's attention rows (Sparsifiner, section 3.3); inference uses `landmark_key_select`.
    """
    return landmark_coefficients(q, k, weights, scale) @ weights[-1].float().mT


@torch.no_grad()
def landmark_scores(
    qkv: Tensor, *weights: Tensor, num_heads: int, scale: float, top_coefficients: int, basis_threshold: float
) -> Tensor:
    """Selection scores of LandmarkKeySelect: float32 [B,H,N-1,N]."""
    q, k, _ = split_heads(qkv, num_heads)
    coefficients = landmark_coefficients(q, k, weights, scale)
    # `topk` says not which of equal ones it takes.
    dropped = coefficients.sort(dim=-1, descending=True, stable=True).indices[..., top_coefficients:]
    basis = F.threshold(weights[-1].float().abs(), basis_threshold, 0.0)
    scores: Tensor = coefficients.scatter(-1, dropped, 0.0) @ basis.mT
    return scores.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)


def landmark_key_select(qkv: Tensor, *weights: Tensor, **attributes: Any) -> Tensor:
    """LandmarkKeySelect: indices int32 [B,H,N-1,K]; `weights` are its inputs after qkv, in the schema's order."""
    return run("LandmarkKeySelect", _landmark_key_select, (qkv, *weights), attributes)


def _landmark_key_select(*inputs: Tensor, keys: int, **settings: Any) -> Tensor:
    return top_keys(landmark_scores(*inputs, **settings), keys)
