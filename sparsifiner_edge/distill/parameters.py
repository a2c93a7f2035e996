"""A model's parameters: how each group learns, and what tells models apart."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from sparsifiner_edge.distill.recipe import Recipe


def digest(model: nn.Module) -> str:
    """Tells models apart by their weights."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def make_optimiser(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """Of backbone and predictor in turn: matrices, which decay, then the rest; the predictor and tokens never decay."""
    matrices, predictor, rest = list[nn.Parameter](), list[nn.Parameter](), list[nn.Parameter]()
    for name, parameter in model.named_parameters():
        if ".attn.select." in name:
            predictor.append(parameter)
        else:
            decays = parameter.ndim > 1 and not name.endswith(("pos_embed", "_token"))
            (matrices if decays else rest).append(parameter)
    backbone = {"eps": recipe.epsilon, "predictor": False}
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": recipe.weight_decay, **backbone},
            {"params": predictor, "weight_decay": 0.0, "predictor": True},
            {"params": rest, "weight_decay": 0.0, **backbone},
        ]
    )
