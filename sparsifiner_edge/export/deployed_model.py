"""The module that is exported: camera pixels in, named outputs out."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from sparsifiner_edge.metrics import POSITIONS
from sparsifiner_edge.sparse.hosts import Backbone, backbone_of
from sparsifiner_edge.sparse.hosts.timm import Model, preprocessing
from sparsifiner_edge.sparse.patch import final_tokens
from sparsifiner_edge.sparse.weights import Normalisation


class DeployedModel(nn.Module):
    """A vision transformer that takes uint8 RGB images [B,H,W,3]; normalisation is folded into the patch embedding,
    layer scale into the linear layers before it.

    Attributes:
        output_names: "logits" and "features" for a classifier, "tokens" too where asked; else "features" and "tokens".
            Where tokens are pruned, "token_positions" follows "tokens".
    """

    def __init__(self, model: Model, tokens: bool = False) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).eval().float()
        backbone = backbone_of(self.model)
        fold_normalisation(backbone, preprocessing(model))
        backbone.host.fold_layer_scale(backbone)
        classifier = model.num_classes > 0
        self.eval()
        self.output_names = ["logits", "features"] if classifier else ["features", "tokens"]
        if classifier and tokens:
            self.output_names.append("tokens")
        self.prunes = backbone.sparsity is not None and bool(backbone.sparsity.token_keep)
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
def fold_normalisation(backbone: Backbone, pre: Normalisation) -> None:
    """Let the patch embedding take pixels 0 to 255: its kernel has no padding, so the change is exact."""
    projection = backbone.embedding
    weight = projection.weight.double()
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (pre.mean, pre.std))
    shift = (weight * mean / std).sum((1, 2, 3))
    bias = -shift if projection.bias is None else projection.bias.double() - shift
    projection.weight.copy_(weight / (255 * std))
    projection.bias = nn.Parameter(bias.float())
