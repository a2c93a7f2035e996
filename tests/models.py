"""Small real timm models with random weights whose attention is not uniform."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import timm
import torch
from timm.models.eva import Eva

from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.sparse.hosts.timm import TimmModel, preprocessing
from sparsifiner_edge.sparse.student import Student, make_student

TINY = "test_vit"
"""10 x 10 patches of 16 px, 64 wide, 2 heads of 32, 6 layers, a class token."""
TINY_CONFIG = SparsityConfig(keep=0.2, background_tokens=4, channels=8)
KINDS = {
    "edge": TINY_CONFIG,
    "no cells": replace(TINY_CONFIG, background_tokens=0),
    "merging": replace(TINY_CONFIG, merge=(12, 8, 0, 0, 0, 0)),
    "some dense": replace(TINY_CONFIG, keep=(0.2, 1, 0.2, 0.2, 1, 0.2), merge=(6,)),
    "pruned": replace(TINY_CONFIG, token_keep=((1, 0.7),)),
    "paper": SparsityConfig.for_preset("paper", keep=0.25, channels=8),
    "dense": SparsityConfig(keep=1),
}
"""One configuration of each kind of sparsity, and a dense one."""


def vit(name: str = TINY, seed: int = 0, **options: Any) -> TimmModel:
    """Return a timm model with scaled queries and keys: attention of fresh weights is nearly uniform."""
    torch.manual_seed(seed)
    model = timm.create_model(name, pretrained=False, dynamic_img_size=False, **options).eval()
    with torch.no_grad():
        for block in getattr(model, "blocks", []):
            if hasattr(block, "attn") and hasattr(block.attn, "qkv"):
                block.attn.qkv.weight[: 2 * block.attn.qkv.weight.shape[0] // 3] *= 8
    return model


def student(name: str = TINY, sparsity: SparsityConfig = TINY_CONFIG, **options: Any) -> Student:
    """Return a sparse model with projections computed from its weights."""
    return sparse(name, vit(name, **options), sparsity)


def sparse(name: str, model: TimmModel, sparsity: SparsityConfig = TINY_CONFIG) -> Student:
    """Make a timm model sparse in place, with projections computed from its weights."""
    return make_student(Student(model, name, preprocessing(model)), sparsity)


def images(model: TimmModel, batch: int = 2, seed: int = 0) -> torch.Tensor:
    """Return random float images [batch,3,H,W]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, *model.patch_embed.img_size, generator=generator)


EVA = {
    "separate biases": {"qkv_bias": True},
    "three projections": {"qkv_fused": False},
    "no bias": {"qkv_bias": False},
    "qk-norm, inner norm, gate": {"qk_norm": True, "scale_attn_inner": True, "scale_mlp": True},
    "half rotation, no class token": {"rope_rotate_half": True, "class_token": False, "global_pool": "avg"},
    "tables per layer and head": {"rope_type": "mixed", "attn_type": "rope"},
    "no RoPE": {"use_rot_pos_emb": False},
}


def eva(**options: Any) -> Eva:
    """Return a small EVA with random weights and biases and 8 x 8 patches."""
    torch.manual_seed(0)
    shape = {"img_size": 64, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 5}
    model = Eva(**{**shape, "use_rot_pos_emb": True, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    return model
