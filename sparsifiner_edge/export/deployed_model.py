"""The module that is exported: camera pixels in, named outputs out."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from timm.models.vision_transformer import LayerScale
from torch import Tensor, nn

from sparsifiner_edge.metrics import POSITIONS
from sparsifiner_edge.sparse.models import Backbone, Normalisation, preprocessing
from sparsifiner_edge.sparse.patch import SparseViTMixin, final_tokens


class DeployedModel(nn.Module):
    """A vision transformer that takes uint8 RGB images [B,H,W,3]; normalisation is folded into the patch embedding,
    layer scale into the linear layers before it.

    Attributes:
        output_names: "logits" and "features" for a classifier, "tokens" too where asked; else "features" and "tokens".
            Where tokens are pruned, "token_positions" follows "tokens".
    """

    def __init__(self, model: Backbone, tokens: bool = False) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).eval().float()
        fold_normalisation(self.model, preprocessing(model))
        fold_layer_scale(self.model)
        classifier = model.num_classes > 0
        self.eval()
        self.output_names = ["logits", "features"] if classifier else ["features", "tokens"]
        if classifier and tokens:
            self.output_names.append("tokens")
        self.prunes = isinstance(model, SparseViTMixin) and bool(model.sparsity.token_keep)
        if self.prunes and "tokens" in self.output_names:
            self.output_names.append(POSITIONS)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """uint8 [B,H,W,3] -> the outputs, in the order of `output_names`."""
        pixels = image.float().permute(0, 3, 1, 2)
        outputs: dict[str, Tensor] = {}
        tokens, positions = final_tokens(self.model, pixels)
        if positions is not None:
            outputs[POSITIONS] = positions.int()
        outputs |= {"tokens": tokens, "features": self.model.forward_head(tokens, pre_logits=True)}
        if "logits" in self.output_names:
            outputs["logits"] = self.model.forward_head(tokens)
        return tuple(outputs[name] for name in self.output_names)


@torch.no_grad()
def fold_layer_scale(model: Backbone) -> None:
    """Multiply what a block adds to its input into the linear layer that makes it: one pass over the tokens less."""
    for block in cast(Any, model).blocks:
        for last, name, parameter in ((block.attn.proj, "ls1", "gamma_1"), (block.mlp.fc2, "ls2", "gamma_2")):
            scale = getattr(block, name, None)
            gamma = scale.gamma if isinstance(scale, LayerScale) else getattr(block, parameter, None)
            if gamma is None:
                continue
            last.weight.mul_(gamma[:, None])
            if last.bias is not None:
                last.bias.mul_(gamma)
            if isinstance(scale, LayerScale):
                setattr(block, name, nn.Identity())
            else:
                setattr(block, parameter, None)


@torch.no_grad()
def fold_normalisation(model: Backbone, pre: Normalisation) -> None:
    """Let the patch embedding take pixels 0 to 255: its kernel has no padding, so the change is exact."""
    projection = cast(Any, model.patch_embed.proj)
    weight = projection.weight.double()
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (pre.mean, pre.std))
    shift = (weight * mean / std).sum((1, 2, 3))
    bias = -shift if projection.bias is None else projection.bias.double() - shift
    projection.weight.copy_(weight / (255 * std))
    projection.bias = nn.Parameter(bias.float())
