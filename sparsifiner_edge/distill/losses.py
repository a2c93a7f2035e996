"""A student beside its teacher: the losses that it learns by; and how close it is on held-out images, by which a
training keeps its best weights.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.distill.recipe import Losses
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.judge import Prediction, alike, correlation
from sparsifiner_edge.metrics import POSITIONS
from sparsifiner_edge.ops import torch as ops
from sparsifiner_edge.sparse.calibrate import observe, selection_loss
from sparsifiner_edge.sparse.hosts import backbone_of
from sparsifiner_edge.sparse.outputs import TOKENS, outputs_of, prediction_of
from sparsifiner_edge.sparse.patch import set_budget

RELATIVE = ("patches", "classes", "outputs")
"""Losses that the recipe's `losses.relative` concerns."""
LEAST_SPREAD = 1e-4
"""Variance within an image below which an output counts as empty: what errors are relative to then."""
LEAST_LOSS = 1e-4
"""Below this cosine distance there is nothing left to learn: noise would be learnt."""
LEAST_ERROR = 1e-6
"""Cosine distance at which a budget counts as perfect: rounding is as large."""


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
        with observe(self.student, watch, densely=reconstruct) if counts else contextlib.nullcontext():
            if reconstruct:
                with torch.no_grad():
                    self.student(images)
                return {"selection": torch.stack(selection).mean()}
            got = outputs_of(self.student, images, self.names, tokens=True)
        with torch.no_grad():
            wanted = outputs_of(cast(nn.Module, self.teacher), images, self.names, tokens=True)
        losses = token_losses(self.student, got, wanted, labels)
        if selection:
            losses["selection"] = torch.stack(selection).mean()
        return losses

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """The weighted sum of losses, each a number or one number per image [B], whose mean counts.

        Raises:
            ConfigError: none of them has a weight.
        """
        weighted = [
            getattr(self.weights, name) * self._scale(name, loss)
            for name, loss in losses.items()
            if getattr(self.weights, name)
        ]
        if not weighted:
            raise ConfigError(f"No loss of {', '.join(losses)} has a weight.", "Set one: --set losses.patches=1.0.")
        return torch.stack(weighted).sum()

    def _scale(self, name: str, loss: Tensor) -> Tensor:
        """A loss as it counts: where losses are relative, of its own value but with the slope of its logarithm."""
        if not self.weights.relative or name not in RELATIVE:
            return loss.mean()
        value = loss.detach()
        return (value + (loss - value) / value.clamp_min(LEAST_LOSS)).mean()


def token_losses(
    student: nn.Module, got: dict[str, Tensor], wanted: dict[str, Tensor], labels: Tensor | None
) -> dict[str, Tensor]:
    """Losses of final tokens against the teacher's: means, of patches and of prefix one per image [B]; and of a vision
    transformer alone those of its classes, else of what is around it.
    """
    backbone = backbone_of(student)
    prefix, tokens = backbone.prefix, got[TOKENS].float()
    expected = wanted[TOKENS].float()
    if POSITIONS in got:  # Tokens that were pruned are not asked for.
        rows = ops.rows_at(expected[:, prefix:], got[POSITIONS])
        expected = torch.cat([expected[:, :prefix], rows], 1)
    apart = 1 - F.cosine_similarity(tokens, expected, dim=-1)
    losses = {"patches": apart[:, prefix:].mean(1), "tokens": F.mse_loss(tokens[:, prefix:], expected[:, prefix:])}
    if prefix:
        losses["classes"] = apart[:, :prefix].mean(1)
    if backbone.module is not student:
        losses["outputs"] = output_loss(got, {name: wanted[name] for name in wanted if name not in (TOKENS, POSITIONS)})
    elif "logits" in got:
        logits = got["logits"].float()
        if "logits" in wanted:
            want = wanted["logits"].float().log_softmax(-1)
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


class HeldOut(NamedTuple):
    """An image [1,3,H,W], what the teacher makes of it, and its class, where that decides."""

    image: Tensor
    wanted: Prediction
    label: int | None = None


class Judgement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of weights, on held-out images.

    Attributes:
        fidelity: see `joint_fidelity`; -1 where it is NaN. cosines: of each budget. top1: of each budget, where images
            have classes, and decides then.
    """

    fidelity: float
    cosines: list[float]
    top1: list[float]

    @property
    def score(self) -> float:
        """What decides: the greater, the better."""
        return statistics.fmean(self.top1) if self.top1 and self.fidelity > -1 else self.fidelity

    @property
    def figures(self) -> list[float]:
        """Of each budget, by what decides."""
        return self.top1 or self.cosines


@torch.no_grad()
def judge_weights(
    model: nn.Module, held_out: Sequence[HeldOut], budgets: list[SparsityConfig], names: tuple[str, ...] | None = None
) -> Judgement:
    """Cosines of tokens to the teacher's, and first classes where images have one.

    A budget's cosine of an image is the mean of the patch tokens', the prefix tokens', and of the correlation with each
    output of what is around the backbone.
    """
    backbone = backbone_of(model)
    before, each, top1 = cast(SparsityConfig, backbone.sparsity), list[list[float]](), list[float]()
    for sparsity in budgets:
        set_budget(model, sparsity, keep_predictors=True)
        values, right = list[float](), list[bool]()
        for one in held_out:
            got = prediction_of(model, one.image, names)
            values.append(_cosine(got, one.wanted, backbone.module is model))
            if one.label is not None:
                right.append(int(got.outputs["logits"].argmax()) == one.label)
        each.append(values)
        top1 += [statistics.fmean(right)] if right else []
    set_budget(model, before, keep_predictors=True)
    joint, cosines = joint_fidelity(each), [statistics.fmean(values) for values in each]
    sound = math.isfinite(joint)
    return Judgement(joint if sound else -1.0, [x if math.isfinite(x) else -1.0 for x in cosines], top1)


def _cosine(got: Prediction, wanted: Prediction, alone: bool) -> float:
    parts = [alike(part, got, wanted) for part in (("prefix", "patches") if got.prefix else ("patches",))]
    others = [] if alone else [name for name in wanted.outputs if name not in (TOKENS, POSITIONS)]
    return statistics.fmean(parts + [correlation(got.outputs[name], wanted.outputs[name]) for name in others])


def joint_fidelity(cosines: list[list[float]]) -> float:
    """One figure for all budgets and images: 1 minus the geometric mean of 1 - cosine.

    Each counts by the share of its own error: else a small gain where errors are large, with few keys or on an image
    unlike the others, would buy a great loss everywhere else. NaN where a cosine is.
    """
    every = [cosine for values in cosines for cosine in values]
    if not all(map(math.isfinite, every)):
        return math.nan
    return 1 - statistics.geometric_mean(max(1 - cosine, LEAST_ERROR) for cosine in every)
