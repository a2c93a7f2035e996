"""Losses of a student against its teacher."""

from __future__ import annotations

import contextlib
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsifiner_edge.distill.recipe import Losses
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.ops import torch as ops
from sparsifiner_edge.sparse.calibrate import observed, selection_loss
from sparsifiner_edge.sparse.hosts import backbone_of
from sparsifiner_edge.sparse.outputs import ModelAnswer, seen_by

RELATIVE = ("patches", "classes", "outputs")
"""Losses that the recipe's `losses.relative` concerns."""
LEAST_SPREAD = 1e-4
"""Variance within an image below which an output counts as empty: what errors are relative to then."""
LEAST_LOSS = 1e-4
"""Below this cosine distance there is nothing left to learn: noise would be learnt."""


class Distiller(nn.Module):
    """A student beside its teacher: images in, losses out, so that accelerate can wrap it.

    The teacher's attention is never materialised; of the student's, each layer holds some rows while its predictor's
    loss is taken.

    Attributes:
        student: learns. teacher: does not, and is no part of this module's state.
        names: of the outputs around the backbone; see `outputs_of`.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, weights: Losses, names: tuple[str, ...] | None = None
    ) -> None:
        super().__init__()
        self.student, self.names = student, names
        self.weights = weights
        object.__setattr__(self, "teacher", teacher.requires_grad_(False).eval())

    def forward(
        self,
        images: Tensor,
        labels: Tensor | None,
        generator: torch.Generator,
        reconstruct: bool,
        predictors: bool = True,
    ) -> dict[str, Tensor]:
        """Losses by name, unweighted; see `total`.

        Args:
            images: normalised, [B,3,H,W]. labels: int64 [B], or shares of classes [B,C], or None.
            generator: draws the rows that the predictors are judged by.
            reconstruct: the predictors alone learn, while all layers attend to everything.
            predictors: whether they learn beside the backbone too.
        """
        selection: list[Tensor] = []

        def watch(attention: Any, qkv: Tensor, sizes: Tensor | None) -> None:
            with torch.enable_grad(), torch.autocast(qkv.device.type, enabled=False):
                selection.append(selection_loss(attention, qkv.float(), generator, sizes))

        counts = reconstruct or (predictors and bool(self.weights.selection))
        with observed(self.student, watch, densely=reconstruct) if counts else contextlib.nullcontext():
            if reconstruct:
                with torch.no_grad():
                    self.student(images)
                return {"selection": torch.stack(selection).mean()}
            got = seen_by(self.student, images, self.names)
        with torch.no_grad():
            wanted = seen_by(cast(nn.Module, self.teacher), images, self.names)
        losses = token_losses(self.student, cast(nn.Module, self.teacher), got, wanted, labels)
        if got.outputs:
            losses["outputs"] = output_loss(got.outputs, wanted.outputs)
        if selection:
            losses["selection"] = torch.stack(selection).mean()
        return losses

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """The weighted sum of losses, each a number or one number per image [B], whose mean counts.

        Raises:
            ConfigError: none of them has a weight.
        """
        weighted = [
            getattr(self.weights, name) * self._counted(name, loss)
            for name, loss in losses.items()
            if getattr(self.weights, name)
        ]
        if not weighted:
            raise ConfigError(f"No loss of {', '.join(losses)} has a weight.", "Set one: --set losses.patches=1.0.")
        return torch.stack(weighted).sum()

    def _counted(self, name: str, loss: Tensor) -> Tensor:
        """A loss as it counts: where losses are relative, of its own value but with the slope of its logarithm."""
        if not self.weights.relative or name not in RELATIVE:
            return loss.mean()
        value = loss.detach()
        return (value + (loss - value) / value.clamp_min(LEAST_LOSS)).mean()


def token_losses(
    student: nn.Module,
    teacher: nn.Module,
    seen: ModelAnswer,
    expected: ModelAnswer,
    labels: Tensor | None,
) -> dict[str, Tensor]:
    """Losses of final tokens and classes against the teacher's: means, of patches and of prefix one per image [B]."""
    backbone, model = backbone_of(student), backbone_of(teacher)
    prefix, tokens = backbone.prefix, seen.tokens
    # Of a backbone within something else nobody asks for classes.
    classifies = bool(backbone.classes) and not expected.outputs
    with torch.no_grad():
        classes = model.heads(expected.tokens)["logits"] if classifies and model.classes else None
        wanted = at_positions(expected.tokens, seen.positions, prefix).float()
    got = tokens.float()
    apart = 1 - F.cosine_similarity(got, wanted, dim=-1)
    losses = {"patches": apart[:, prefix:].mean(1), "tokens": F.mse_loss(got[:, prefix:], wanted[:, prefix:])}
    if prefix:
        losses["classes"] = apart[:, :prefix].mean(1)
    if classifies and (classes is not None or labels is not None):
        logits = backbone.heads(tokens)["logits"].float()
        if classes is not None:
            want = classes.float().log_softmax(-1)
            losses["logits"] = F.kl_div(logits.log_softmax(-1), want, reduction="batchmean", log_target=True)
        if labels is not None:
            losses["labels"] = F.cross_entropy(logits, labels)
    return losses


def output_loss(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> Tensor:
    """Squared error of all outputs, each relative to the variance of the teacher's within an image: [B]."""
    each = []
    for name, expected in wanted.items():
        answer, target = (x.float().flatten(1) for x in (got[name], expected))
        spread = target.var(1, correction=0).clamp_min(LEAST_SPREAD)
        each.append((answer - target).square().mean(1) / spread)
    return torch.stack(each).mean(0)


def at_positions(tokens: Tensor, positions: Tensor | None, prefix: int) -> Tensor:
    """Tokens [B,N,C] -> the prefix and the patches at `positions` [B,P]; all where None."""
    if positions is None:
        return tokens
    return torch.cat([tokens[:, :prefix], ops.rows_at(tokens[:, prefix:], positions)], 1)
