"""Losses of a student against its teacher, and the evaluation on held-out images that selects the best weights."""

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
from sparsifiner_edge.metrics import POSITIONS
from sparsifiner_edge.ops import torch as ops
from sparsifiner_edge.scoring import Prediction, alike, correlation
from sparsifiner_edge.sparse.calibrate import observe, selection_loss
from sparsifiner_edge.sparse.hosts import backbone_of
from sparsifiner_edge.sparse.outputs import TOKENS, outputs_of, prediction_of
from sparsifiner_edge.sparse.patch import set_budget

RELATIVE = ("patches", "classes", "outputs")
"""Losses that the recipe's `losses.relative` scales."""
LEAST_SPREAD = 1e-4
"""Least variance of an output within an image that errors are divided by. An output below it counts as empty."""
LEAST_LOSS = 1e-4
"""Loss below which relative scaling stops: a smaller error consists of noise."""
LEAST_ERROR = 1e-6
"""Smallest 1 - cosine in the joint fidelity. Rounding errors are as large."""


class Distiller(nn.Module):
    """Student and teacher as one module from images to losses, so that accelerate can wrap it.

    The teacher's attention matrix is never materialised. For the student, each layer computes some rows of it while the
    loss of its predictor is evaluated.

    Attributes:
        student: Model that is trained.
        names: Names of the outputs around the backbone; see `outputs_of`.
        weights: Weights of the losses.
        teacher: Model that the student follows. It is not part of this module's state.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, weights: Losses, names: tuple[str, ...] | None = None
    ) -> None:
        """Store the models, and freeze the teacher in evaluation mode."""
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
        """Return the losses by name, without their weights; see `total`.

        Args:
            images: Normalised images [B,3,H,W].
            labels: Class numbers int64 [B], shares of classes [B,C], or None.
            generator: Source of the random rows at which the predictors' loss is computed.
            reconstruct: Compute only the loss of the predictors, with dense attention in all layers.
            predictors: Also compute the loss of the predictors in the other case.
        """
        selection: list[Tensor] = []

        def watch(attention: Any, qkv: Tensor, sizes: Tensor | None) -> None:
            """Record the loss of a layer's predictor."""
            with torch.enable_grad(), torch.autocast(qkv.device.type, enabled=False):
                selection.append(selection_loss(attention, qkv.float(), generator, sizes))

        counts = reconstruct or (predictors and bool(self.weights.selection))
        with observe(self.student, watch, densely=reconstruct) if counts else contextlib.nullcontext():
            if reconstruct:
                with torch.no_grad():
                    self.student(images)
                return {"selection": torch.stack(selection).mean()}
            outputs = outputs_of(self.student, images, self.names, tokens=True)
        with torch.no_grad():
            expected = outputs_of(cast(nn.Module, self.teacher), images, self.names, tokens=True)
        losses = token_losses(self.student, outputs, expected, labels)
        if selection:
            losses["selection"] = torch.stack(selection).mean()
        return losses

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """Return the weighted sum of the losses.

        Args:
            losses: Losses by name, each a number or one number per image [B], of which the mean is taken.

        Raises:
            ConfigError: If none of the losses has a weight.
        """
        weighted = [
            getattr(self.weights, name) * self._scale(name, loss)
            for name, loss in losses.items()
            if getattr(self.weights, name)
        ]
        if not weighted:
            raise ConfigError(
                f"All losses have weight 0: {', '.join(losses)}.", "Set one, such as --set losses.patches=1.0."
            )
        return torch.stack(weighted).sum()

    def _scale(self, name: str, loss: Tensor) -> Tensor:
        """Return the mean loss; a relative loss keeps its value but has the slope of its logarithm."""
        if not self.weights.relative or name not in RELATIVE:
            return loss.mean()
        value = loss.detach()
        return (value + (loss - value) / value.clamp_min(LEAST_LOSS)).mean()


def token_losses(
    student: nn.Module, got: dict[str, Tensor], wanted: dict[str, Tensor], labels: Tensor | None
) -> dict[str, Tensor]:
    """Return the losses of the student's outputs against the teacher's.

    Losses of patch tokens and prefix tokens have one value per image [B]; the loss `tokens` is a mean. A bare vision
    transformer adds losses of its logits, any other module the loss of its outputs.

    Args:
        student: The student.
        got: Outputs of the student.
        wanted: Outputs of the teacher.
        labels: Labels, or None.
    """
    backbone = backbone_of(student)
    prefix, tokens = backbone.prefix, got[TOKENS].float()
    expected = wanted[TOKENS].float()
    if POSITIONS in got:  # Pruned tokens do not count.
        rows = ops.rows_at(expected[:, prefix:], got[POSITIONS])
        expected = torch.cat([expected[:, :prefix], rows], 1)
    error = 1 - F.cosine_similarity(tokens, expected, dim=-1)
    losses = {"patches": error[:, prefix:].mean(1), "tokens": F.mse_loss(tokens[:, prefix:], expected[:, prefix:])}
    if prefix:
        losses["classes"] = error[:, :prefix].mean(1)
    if backbone.module is not student:
        losses["outputs"] = output_loss(got, {name: wanted[name] for name in wanted if name not in (TOKENS, POSITIONS)})
    elif "logits" in got:
        logits = got["logits"].float()
        if "logits" in wanted:
            target = wanted["logits"].float().log_softmax(-1)
            losses["logits"] = F.kl_div(logits.log_softmax(-1), target, reduction="batchmean", log_target=True)
        if labels is not None:
            losses["labels"] = F.cross_entropy(logits, labels)
    return losses


def output_loss(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> Tensor:
    """Return the mean squared error of the outputs per image [B], relative to the variance of the teacher's output."""
    errors = []
    for name, expected in wanted.items():
        output, target = (x.float().flatten(1) for x in (got[name], expected))
        spread = target.var(1, correction=0).clamp_min(LEAST_SPREAD)
        errors.append((output - target).square().mean(1) / spread)
    return torch.stack(errors).mean(0)


class HeldOut(NamedTuple):
    """Held-out image.

    Attributes:
        image: Normalised image [1,3,H,W].
        wanted: Outputs of the teacher.
        label: Class number, if accuracy selects the weights, else None.
    """

    image: Tensor
    wanted: Prediction
    label: int | None = None


class Judgement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Evaluation of weights on the held-out images.

    Attributes:
        fidelity: Joint fidelity of all budgets; see `joint_fidelity`. -1 where it is NaN.
        cosines: Mean cosine of each budget.
        top1: Top-1 accuracy of each budget if the images have classes, else empty. It then selects the weights.
    """

    fidelity: float
    cosines: list[float]
    top1: list[float]

    @property
    def score(self) -> float:
        """Value that selects the weights; higher is better."""
        return statistics.fmean(self.top1) if self.top1 and self.fidelity > -1 else self.fidelity

    @property
    def figures(self) -> list[float]:
        """Value of each budget by the selecting metric."""
        return self.top1 or self.cosines


@torch.no_grad()
def evaluate_weights(
    model: nn.Module, held_out: Sequence[HeldOut], budgets: list[SparsityConfig], names: tuple[str, ...] | None = None
) -> Judgement:
    """Evaluate a model on the held-out images at every budget.

    The cosine of an image is the mean of the patch tokens' cosine, the prefix tokens' cosine, and the correlation with
    the teacher of each output of the module around the backbone.

    Args:
        model: The student. Its budget is restored afterwards.
        held_out: Images with the teacher's outputs.
        budgets: Budgets to evaluate.
        names: Names of the outputs around the backbone; see `outputs_of`.
    """
    backbone = backbone_of(model)
    before, by_budget, top1 = cast(SparsityConfig, backbone.sparsity), list[list[float]](), list[float]()
    for sparsity in budgets:
        set_budget(model, sparsity, keep_predictors=True)
        values, correct = list[float](), list[bool]()
        for example in held_out:
            prediction = prediction_of(model, example.image, names)
            values.append(_cosine(prediction, example.wanted, backbone.module is model))
            if example.label is not None:
                correct.append(int(prediction.outputs["logits"].argmax()) == example.label)
        by_budget.append(values)
        top1 += [statistics.fmean(correct)] if correct else []
    set_budget(model, before, keep_predictors=True)
    joint, cosines = joint_fidelity(by_budget), [statistics.fmean(values) for values in by_budget]
    sound = math.isfinite(joint)
    return Judgement(joint if sound else -1.0, [x if math.isfinite(x) else -1.0 for x in cosines], top1)


def _cosine(got: Prediction, wanted: Prediction, alone: bool) -> float:
    """Return the cosine of an image; see `evaluate_weights`."""
    parts = [alike(part, got, wanted) for part in (("prefix", "patches") if got.prefix else ("patches",))]
    others = [] if alone else [name for name in wanted.outputs if name not in (TOKENS, POSITIONS)]
    return statistics.fmean(parts + [correlation(got.outputs[name], wanted.outputs[name]) for name in others])


def joint_fidelity(cosines: list[list[float]]) -> float:
    """Return one value for all budgets and images: 1 minus the geometric mean of 1 - cosine, or NaN if a cosine is NaN.

    The geometric mean weighs each error relative to its own size. An arithmetic mean would prefer a small gain where
    errors are large, with few keys or on an unusual image, to a large drop everywhere else.
    """
    every = [cosine for values in cosines for cosine in values]
    if not all(map(math.isfinite, every)):
        return math.nan
    return 1 - statistics.geometric_mean(max(1 - cosine, LEAST_ERROR) for cosine in every)
