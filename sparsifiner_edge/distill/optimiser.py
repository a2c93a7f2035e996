"""What is optimised, in which groups."""

from __future__ import annotations

import torch
from torch import nn

from sparsifiner_edge.distill.recipe import Recipe
from sparsifiner_edge.sparse.hosts import backbone_of
from sparsifiner_edge.sparse.student import is_predictor


def make_optimiser(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """Of backbone and predictor in turn: matrices, which decay, then the rest; tokens never decay.

    A decoder that is frozen is left out, and gets no gradient.
    """
    matrices, predictor, rest = list[nn.Parameter](), list[nn.Parameter](), list[nn.Parameter]()
    inside = set(map(id, backbone_of(model).module.parameters()))
    for name, parameter in model.named_parameters():
        if recipe.freeze_decoder and id(parameter) not in inside:
            parameter.requires_grad_(False)
        elif is_predictor(name):
            predictor.append(parameter)
        else:
            decays = parameter.ndim > 1 and not name.endswith(("pos_embed", "_token"))
            (matrices if decays else rest).append(parameter)
    backbone = {"eps": recipe.epsilon, "predictor": False}
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": recipe.weight_decay, **backbone},
            {"params": predictor, "weight_decay": recipe.predictor_weight_decay, "predictor": True},
            {"params": rest, "weight_decay": 0.0, **backbone},
        ]
    )
