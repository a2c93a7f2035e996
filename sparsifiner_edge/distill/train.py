"""Training loop: budgets, steps, evaluations and checkpoints. accelerate provides parallel processes."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import random
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import msgspec
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast, gather_object
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.distill import checkpoint
from sparsifiner_edge.distill.checkpoint import Fingerprint, Tensors, TrainingState
from sparsifiner_edge.distill.data import Batch, BatchAugmentation, ImageSource, augmentation, batches, fixed_seed
from sparsifiner_edge.distill.losses import Distiller, HeldOut, evaluate_weights
from sparsifiner_edge.distill.recipe import Phase, Recipe, RecipeBudget
from sparsifiner_edge.errors import ConfigError, GateError, ImageError
from sparsifiner_edge.images import load_image
from sparsifiner_edge.plan import plan_of
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.sparse.hosts import backbone_of
from sparsifiner_edge.sparse.outputs import prediction_of
from sparsifiner_edge.sparse.patch import set_budget
from sparsifiner_edge.sparse.student import Student, is_predictor
from sparsifiner_edge.sparse.weights import normalise

RECENT = 50
"""Number of recent losses with which a new loss is compared."""
EXPLOSION = 20.0
"""Multiple of the median of the recent losses at which a training stops."""
BOUND = (
    "seed",
    "epsilon",
    "weight_decay",
    "predictor_weight_decay",
    "ema",
    "freeze_decoder",
    "precision",
    "best",
)
"""Settings of a recipe that may not change when a training resumes."""


def make_accelerator(recipe: Recipe) -> Any:
    """Return an accelerator for the processes that were launched.

    Raises:
        ConfigError: If the device does not support the recipe's precision.
    """
    if "RANK" not in os.environ:
        # Without a launcher, a second training in the same Python process may have another precision.
        AcceleratorState._reset_state()
    try:
        return Accelerator(
            mixed_precision=recipe.precision,
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
    except ValueError as error:
        raise ConfigError(f"precision {recipe.precision}: {error}.", "Choose another: --set precision=no.") from error


def make_optimiser(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """Return the optimiser of a student, with parameter groups for matrices, the predictor and the rest.

    Only matrices and the predictor have weight decay; tokens and position embeddings have none. A frozen decoder is
    left out and gets no gradient.
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


def digest(model: nn.Module) -> str:
    """Return a digest of a model's weights."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Training:
    """Training of a student with its teacher and images, on the processes of an accelerator.

    Attributes:
        state: Progress of the training.
        best: Weights of the student that are kept.
        budgets: Budgets at which the student is trained and evaluated.
    """

    def __init__(
        self, accelerator: Any, student: Student, teacher: Student, source: ImageSource, recipe: Recipe, folder: Path
    ) -> None:
        """Prepare the models, the optimiser and the held-out images.

        Raises:
            ConfigError: If a budget does not fit the student, or accuracy is to select the weights but held-out images
                have no class.
            ImageError: If no held-out image can be read.
        """
        self.accelerator, self.recipe, self.source, self.folder = accelerator, recipe, source, folder
        self.size, self.pre = student.img_size, student.normalisation
        size = len(student.backbone.layers), student.backbone.patches
        plan = plan_of(student.sparsity, *size)
        configs = [budget.config(student.sparsity, plan) for budget in recipe.budgets or (RecipeBudget(),)]
        self.budgets: list[SparsityConfig] = list(dict.fromkeys(configs))
        for budget in self.budgets:
            plan_of(budget, *size)  # Raises an error for a budget that does not fit the student.
        self.by_top1 = recipe.best == "top1" and bool(source.labels)
        if self.by_top1 and not source.held_out_labels:
            raise ConfigError(
                "best is top1, but some held-out images are outside of class folders.",
                "Move them into the folders of their classes, or set --set best=cosine.",
            )
        self.phases = [(phase, self._steps(phase)) for phase in (recipe.reconstruct, recipe.distil)]
        self.total = sum(steps for _, steps in self.phases)
        self.state = TrainingState(fingerprint=self._fingerprint(student, teacher))
        self.best: Tensors = {}
        self._saved = 0
        teacher.model.to(accelerator.device)
        distiller = Distiller(student.model, teacher.model, recipe.losses, student.outputs)
        self.augmented = BatchAugmentation(recipe.images, len(source.classes), recipe.batch, accelerator.device)
        self.optimiser = make_optimiser(student.model, recipe)
        self.wrapped, self.optimiser = accelerator.prepare(distiller, self.optimiser)
        self.distiller = cast(Distiller, accelerator.unwrap_model(self.wrapped))
        self.average = ModelEmaV3(self.distiller.student, decay=recipe.ema) if recipe.ema else None
        self.held_out = self._held_out_images(teacher.model)

    def _steps(self, phase: Phase) -> int:
        """Return the number of steps of a phase."""
        if not phase.epochs:
            return phase.steps
        per_step: int = self.recipe.batch * self.accelerator.num_processes
        return max(1, math.ceil(phase.epochs * len(self.source.train) / per_step))

    @torch.no_grad()
    def _held_out_images(self, teacher: nn.Module) -> list[HeldOut]:
        """Return the held-out images with the teacher's outputs. Only the main process evaluates them."""
        if not self.accelerator.is_main_process:
            return []
        readable = []
        labels = self.source.held_out_labels if self.by_top1 else ()
        for path, label in itertools.zip_longest(self.source.held_out, labels):
            try:
                pixels = load_image(path, self.size)
            except ImageError:
                self.state.unreadable.add(str(path))
                continue
            image = normalise(torch.from_numpy(pixels)[None], self.pre).to(self.accelerator.device)
            readable.append(HeldOut(image, prediction_of(teacher, image, self.distiller.names), label))
        if not readable:
            raise ImageError(
                "None of the held-out images can be read.", f"Check the first one, {self.source.held_out[0]}."
            )
        return readable

    def run(self, progress: Progress | None = None) -> None:
        """Train from the current state to the end.

        Raises:
            GateError: If a loss is NaN or infinite, or explodes.
        """
        if self.state.start is None:
            self._evaluate(0)
            self._save()
        stream = self._stream()
        for step in range(self.state.step, self.total):
            losses = self._step(step, stream)
            self.state.step = step + 1
            if self.accelerator.is_main_process:
                checkpoint.append_history(self.folder, step + 1, **losses)
            if (step + 1) % self.recipe.check_every == 0 or step + 1 in (self.phases[0][1], self.total):
                self._evaluate(step + 1)
            if step + 1 == self.phases[0][1]:
                self._take_best()
            if progress:
                progress(f"loss {losses['loss']:.4f}", step + 1, self.total)
        self._save()

    def _stream(self) -> Iterator[Batch]:
        """Return the batches of this process from the current step on."""
        return batches(
            self.source,
            augmentation(self.size, self.recipe.images, self.pre.mean),
            seed=self.recipe.seed,
            batch=self.recipe.batch,
            first=self.state.step,
            process=self.accelerator.process_index,
            processes=self.accelerator.num_processes,
            workers=self.recipe.images.workers,
        )

    def budget(self, step: int) -> SparsityConfig:
        """Return the budget of a step, drawn from the seed and the step only."""
        # A budget that reads all keys cannot train the predictors.
        selecting = [budget for budget in self.budgets if budget.keep != 1] if step < self.phases[0][1] else []
        return random.Random(1_000_003 * self.recipe.seed + step).choice(selecting or self.budgets)  # noqa: S311

    def _step(self, step: int, stream: Iterator[Batch]) -> dict[str, float]:
        """Run one optimiser step and return the losses as means over the processes."""
        first = self.phases[0][1]
        (phase, steps), begun = (self.phases[0], 0) if step < first else (self.phases[1], first)
        if step == begun:  # The losses of another phase are not comparable.
            self.state.recent = []
        self._set_rates(phase, (step - begun + 1) / steps)
        set_budget(self.distiller.student, self.budget(step), keep_predictors=True)
        torch.manual_seed(self.recipe.seed + step)
        batch, processes = next(stream), int(self.accelerator.num_processes)
        self.state.unreadable.update(batch.unreadable)
        with fixed_seed(self.recipe.seed + processes * step + int(self.accelerator.process_index)):
            images, labels = self._inputs(batch)
        kind = phase is self.recipe.reconstruct, phase.predictor_learning_rate > 0
        losses = self.wrapped(images, labels, torch.Generator().manual_seed(self.recipe.seed + step), *kind)
        total = self.distiller.total(losses)
        self._check(step, float(self.accelerator.reduce(total.detach(), "mean")), batch.files)
        if step and step % self.recipe.save_every == 0:
            self._save()  # Only after these weights have produced a finite loss.
        self.accelerator.backward(total)
        self._clip(step, batch.files)
        self.optimiser.step()
        self.optimiser.zero_grad()
        if self.average is not None:
            self.average.update(self.distiller.student)
        means = {
            name: float(self.accelerator.reduce(loss.detach().mean(), "mean"))
            for name, loss in {"loss": total, **losses}.items()
        }
        self.state.recent = [*self.state.recent[1 - RECENT :], means["loss"]]
        return means

    def _inputs(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Return the normalised and augmented images of a batch, and their labels."""
        images = normalise(batch.images.permute(0, 2, 3, 1), self.pre).to(self.accelerator.device)
        return self.augmented(images, batch.labels.to(self.accelerator.device))

    def _check(self, step: int, loss: float, files: Sequence[str]) -> None:
        """Stop if the loss is not finite or explodes."""
        recent = self.state.recent
        exploded = len(recent) == RECENT and loss > EXPLOSION * statistics.median(recent)
        if not math.isfinite(loss) or exploded:
            self._stop(step, f"the loss is {loss:g}", files)

    def _stop(self, step: int, what: str, files: Sequence[str]) -> None:
        """Raise the error that stops the training, in all processes alike, because losses and gradients are shared."""
        names = ", ".join(gather_object(list(files)))
        raise GateError(
            f"Training stopped at step {step + 1}: {what}. Images of the batch: {names}.",
            f"The last good checkpoint, of step {self._saved}, is in {self.folder}. Continue with --resume and a lower "
            "learning rate, or start again without those images.",
        )

    def _clip(self, step: int, files: Sequence[str]) -> None:
        """Clip the gradients of backbone and predictor separately, because those of the predictor are much larger."""
        norms = []
        for group in self.optimiser.param_groups[::2], self.optimiser.param_groups[1::2]:
            parameters = [p for part in group for p in part["params"] if p.grad is not None]
            if parameters:
                limit = self.recipe.clip or math.inf
                norms.append(float(nn.utils.clip_grad_norm_(parameters, limit)))
        if not all(map(math.isfinite, norms)):
            self._stop(step, "a gradient is NaN or infinite", files)

    def _set_rates(self, phase: Phase, share: float) -> None:
        """Set the learning rates for a share of a phase."""
        factor = phase.factor(share)
        for group in self.optimiser.param_groups:
            group["lr"] = factor * (phase.predictor_learning_rate if group["predictor"] else phase.learning_rate)

    def _evaluate(self, step: int) -> None:
        """Evaluate the held-out images and keep the weights if they are the best, averaged weights if there are any."""
        if self.accelerator.is_main_process:
            model = self.distiller.student if self.average is None else self.average.module
            state, judgement = self.state, evaluate_weights(model, self.held_out, self.budgets, self.distiller.names)
            if step == 0 and judgement.fidelity == -1:
                raise GateError(
                    "The student's tokens of held-out images are NaN or infinite.", "Check the student's weights."
                )
            top1 = {"top1": judgement.top1} if self.by_top1 else {}
            checkpoint.append_history(self.folder, step, fidelity=judgement.fidelity, cosines=judgement.cosines, **top1)
            state.start = state.start or judgement
            if state.best is None or judgement.score >= state.best.score:
                state.best, state.best_step = judgement, step
                self.best = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
        self.accelerator.wait_for_everyone()

    def _take_best(self) -> None:
        """Continue with the best weights, in all processes and in the average.

        The published loss of the first phase, the squared error of the predicted attention, may fall while the
        predictors become worse.
        """
        for model in [self.distiller.student, *([self.average.module] if self.average else [])]:
            if self.accelerator.is_main_process:  # Only this process has the best weights.
                model.load_state_dict(self.best)
            broadcast([parameter.data for parameter in model.parameters()])

    def _save(self) -> None:
        """Write a checkpoint."""
        self._saved = self.state.step
        self.state.unreadable = set(gather_object(sorted(self.state.unreadable)))
        if self.accelerator.is_main_process:
            checkpoint.save(self.folder, self.state, self._tensors() | _with_part("best", self.best))
        self.accelerator.wait_for_everyone()

    def _tensors(self) -> Tensors:
        """Return all tensors that the steps change."""
        average = {} if self.average is None else self.average.module.state_dict()
        tensors = _with_part("student", self.distiller.student.state_dict()) | _with_part("average", average)
        for number, moments in self.optimiser.state_dict()["state"].items():
            tensors |= _with_part(f"optimiser/{number}", moments)
        return tensors

    def restore(self, state: TrainingState, tensors: Tensors) -> None:
        """Continue from a checkpoint that `checkpoint.load` returned.

        Raises:
            ConfigError: If the training was started with other settings.
            ArtifactError: If the checkpoint holds anything that this training would not have saved.
        """
        for name, value in self.state.fingerprint.items():
            before = state.fingerprint.get(name)
            if before != value:
                raise ConfigError(
                    f"The training in {self.folder} differs in {name}: it began with {before}, now it is {value}.",
                    f"Use the original value, or remove {self.folder} to start again.",
                )
        state.require_course(self.total, len(self.budgets))
        student, average = self.distiller.student, None if self.average is None else self.average.module
        parameters = [parameter for group in self.optimiser.param_groups for parameter in group["params"]]
        moments = {number: _part(f"optimiser/{number}", tensors) for number in range(len(parameters))}
        # Parameters that never had a gradient have no moments.
        moments = {number: values for number, values in moments.items() if values}
        like = self._tensors() | _with_part("best", student.state_dict())
        for number in moments:
            of_adam = {"exp_avg": parameters[number], "exp_avg_sq": parameters[number], "step": torch.zeros(())}
            like |= _with_part(f"optimiser/{number}", of_adam)
        checkpoint.require_like(tensors, like)
        student.load_state_dict(_part("student", tensors))
        if average is not None:
            average.load_state_dict(_part("average", tensors))
        # The learning rates are set at every step. The fingerprint has compared the other settings of the groups.
        self.optimiser.load_state_dict({"state": moments, "param_groups": self.optimiser.state_dict()["param_groups"]})
        state.unreadable |= self.state.unreadable
        self.best, self.state, self._saved = _part("best", tensors), state, state.step
        if self.accelerator.is_main_process:
            checkpoint.cut_history(self.folder, state.step)

    def _fingerprint(self, student: Student, teacher: Student) -> Fingerprint:
        """Return the settings that must not change on resume. Learning rates, losses and limits may change."""
        recipe = self.recipe
        images = msgspec.structs.replace(recipe.images, held_out=1, workers=0)
        return {name: getattr(recipe, name) for name in BOUND} | {
            "images": self.source.fingerprint,
            "crops": str(images),
            "budgets": str(self.budgets),
            "student": digest(student.model),
            "teacher": digest(teacher.model),
            "steps": self.total,
            "images per step": recipe.batch * self.accelerator.num_processes,
        }


def _with_part(part: str, tensors: dict[str, Tensor]) -> Tensors:
    """Return the tensors with a part name before their names."""
    return {f"{part}/{name}": tensor for name, tensor in tensors.items()}


def _part(part: str, tensors: Tensors) -> Tensors:
    """Return the tensors of a part, the reverse of `_with_part`."""
    return {name.removeprefix(f"{part}/"): x for name, x in tensors.items() if name.startswith(f"{part}/")}
