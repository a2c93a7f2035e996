"""The published predictor in PyTorch: LandmarkKeySelect, and the form that is trained."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsifiner_edge.ops.torch import bare_node, split_heads, top_keys


def landmark_coefficients(
    q: Tensor, k: Tensor, proj_q: Tensor, bias_q: Tensor, proj_k: Tensor, bias_k: Tensor, down: Tensor, scale: float
) -> Tensor:
    """Coefficients of patch queries over landmarks: q, k [B,H,N,d] -> float32 [B,H,N-1,L], differentiable."""
    with torch.autocast(q.device.type, enabled=False):
        projected_q = F.linear(q[:, :, 1:].float(), proj_q.float(), bias_q.float())
        landmarks = F.linear(k.float(), proj_k.float(), bias_k.float()).transpose(-1, -2) @ down.float()
        return torch.softmax(scale * projected_q @ landmarks, -1)


def landmark_attention(
    q: Tensor,
    k: Tensor,
    proj_q: Tensor,
    bias_q: Tensor,
    proj_k: Tensor,
    bias_k: Tensor,
    down: Tensor,
    up: Tensor,
    *,
    scale: float,
) -> Tensor:
    """The training-time form of the published predictor: signed, unthresholded, differentiable [B,H,N-1,N].

    It is held against the teacher's attention rows (Sparsifiner, section 3.3); inference uses `landmark_key_select`.
    """
    coefficients = landmark_coefficients(q, k, proj_q, bias_q, proj_k, bias_k, down, scale)
    return coefficients @ up.float().mT


@torch.no_grad()
def landmark_scores(
    qkv: Tensor,
    proj_q: Tensor,
    bias_q: Tensor,
    proj_k: Tensor,
    bias_k: Tensor,
    down: Tensor,
    up: Tensor,
    *,
    num_heads: int,
    scale: float,
    top_coefficients: int,
    basis_threshold: float,
) -> Tensor:
    """Selection scores of LandmarkKeySelect: float32 [B,H,N-1,N]."""
    q, k, _ = split_heads(qkv, num_heads)
    coefficients = landmark_coefficients(q, k, proj_q, bias_q, proj_k, bias_k, down, scale)
    # `topk` says not which of equal ones it takes.
    dropped = coefficients.sort(dim=-1, descending=True, stable=True).indices[..., top_coefficients:]
    basis = F.threshold(up.float().abs(), basis_threshold, 0.0)
    scores: Tensor = coefficients.scatter(-1, dropped, 0.0) @ basis.mT
    return scores.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)


def landmark_key_select(
    qkv: Tensor,
    *weights: Tensor,
    num_heads: int,
    keys: int,
    scale: float,
    top_coefficients: int,
    basis_threshold: float,
) -> Tensor:
    """LandmarkKeySelect: indices int32 [B,H,N-1,K]; `weights` are its inputs after qkv, in the schema's order."""
    settings = {
        "num_heads": num_heads,
        "scale": scale,
        "top_coefficients": top_coefficients,
        "basis_threshold": basis_threshold,
    }
    if torch.onnx.is_in_onnx_export():
        shape = [qkv.shape[0], num_heads, qkv.shape[1] - 1, keys]
        return bare_node("LandmarkKeySelect", (qkv, *weights), {**settings, "keys": keys}, torch.int32, shape)
    return top_keys(landmark_scores(qkv, *weights, **settings), keys)  # type: ignore[arg-type]
