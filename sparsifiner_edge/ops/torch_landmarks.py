"""The published predictor in PyTorch: LandmarkKeySelect and its trainable form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsifiner_edge.ops.torch import run, split_heads, top_keys


def landmark_coefficients(q: Tensor, k: Tensor, weights: Sequence[Tensor], scale: float) -> Tensor:
    """Return the coefficients of the patch queries over the landmarks, differentiable.

    Args:
        q: Queries [B,H,N,d].
        k: Keys [B,H,N,d].
        weights: Inputs of the operator after `qkv`, in the order of the schema.
        scale: Scale of the logits.

    Returns:
        Coefficients [B,H,N-1,L] in float32.
    """
    with torch.autocast(q.device.type, enabled=False):
        proj_q, bias_q, proj_k, bias_k, down, _ = (weight.float() for weight in weights)
        projected_q = F.linear(q[:, :, 1:].float(), proj_q, bias_q)
        landmarks = F.linear(k.float(), proj_k, bias_k).transpose(-1, -2) @ down
        return torch.softmax(scale * projected_q @ landmarks, -1)


def landmark_attention(q: Tensor, k: Tensor, weights: Sequence[Tensor], scale: float) -> Tensor:
    """Return the predicted attention of the published predictor in its training form: [B,H,N-1,N], differentiable.

    The basis is signed and no threshold is applied. Distillation compares the result with the attention rows of the
    teacher (Sparsifiner, section 3.3). Inference uses `landmark_key_select`.
    """
    return landmark_coefficients(q, k, weights, scale) @ weights[-1].float().mT


@torch.no_grad()
def landmark_scores(
    qkv: Tensor, *weights: Tensor, num_heads: int, scale: float, top_coefficients: int, basis_threshold: float
) -> Tensor:
    """Return the selection scores of LandmarkKeySelect: float32 [B,H,N-1,N]."""
    q, k, _ = split_heads(qkv, num_heads)
    coefficients = landmark_coefficients(q, k, weights, scale)
    # `topk` does not define which of several equal values it takes.
    dropped = coefficients.sort(dim=-1, descending=True, stable=True).indices[..., top_coefficients:]
    basis = F.threshold(weights[-1].float().abs(), basis_threshold, 0.0)
    scores: Tensor = coefficients.scatter(-1, dropped, 0.0) @ basis.mT
    return scores.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)


def landmark_key_select(qkv: Tensor, *weights: Tensor, **attributes: Any) -> Tensor:
    """Run LandmarkKeySelect: int32 indices [B,H,N-1,K]; `weights` are the inputs after `qkv` in the schema's order."""
    return run("LandmarkKeySelect", _landmark_key_select, (qkv, *weights), attributes)


def _landmark_key_select(*inputs: Tensor, keys: int, **settings: Any) -> Tensor:
    return top_keys(landmark_scores(*inputs, **settings), keys)
