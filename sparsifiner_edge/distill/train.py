"""The training itself: budgets, steps, judgements, checkpoints. Parallel processes are accelerate's."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import random
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import msgspec
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast, gather_object
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.distill import checkpoint
from sparsifiner_edge.distill.augment import BatchAugmentation, augmentation, drawn_from
from sparsifiner_edge.distill.budgets import judged_budgets
from sparsifiner_edge.distill.captured import BestPredictors, attention_captured, weights_of_predictors
from sparsifiner_edge.distill.checkpoint import Checkpoint, Fingerprint, Optimiser, TrainingState
from sparsifiner_edge.distill.data import Batch, ImageSource, batches
from sparsifiner_edge.distill.fidelity import HeldOut, judge_weights
from sparsifiner_edge.distill.losses import Distiller
from sparsifiner_edge.distill.optimiser import make_optimiser
from sparsifiner_edge.distill.recipe import Phase, Recipe
from sparsifiner_edge.distill.tensorboard import RecordLosses
from sparsifiner_edge.errors import ConfigError, GateError, ImageError
from sparsifiner_edge.images import load_image
from sparsifiner_edge.plan import plan_of
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.sparse.calibrate import sparse_layers
from sparsifiner_edge.sparse.outputs import seen_by
from sparsifiner_edge.sparse.patch import set_budget
from sparsifiner_edge.sparse.student import Student
from sparsifiner_edge.sparse.weights import normalise

RECENT = 50
"""Losses that an explosion is measured against."""


def make_accelerator(recipe: Recipe) -> Any:
    """Hugging Face accelerate's view of the processes that were launched.

    Raises:
        ConfigError: the device does not know the recipe's precision.
    """
    if "RANK" not in os.environ:
        # Alone, a second training of one Python process may have another precision.
        AcceleratorState._reset_state()
    try:
        return Accelerator(
            mixed_precision=recipe.precision,
            gradient_accumulation_steps=recipe.accumulate,
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
    except ValueError as error:
        raise ConfigError(f"precision {recipe.precision}: {error}.", "Choose another: --set precision=no.") from error


def digest(model: nn.Module) -> str:
    """Tells models apart by their weights."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class Training:
    """A student, its teacher and their images, on the processes that accelerate was launched with."""

    def __init__(
        self,
        accelerator: Any,
        student: Student,
        teacher: Student,
        source: ImageSource,
        recipe: Recipe,
        folder: Path,
    ) -> None:
        self.accelerator, self.sparsity = accelerator, student.sparsity
        self.recipe, self.source, self.folder = recipe, source, folder
        self.size, self.pre = student.img_size, student.normalisation
        teacher.model.to(self.accelerator.device)
        distiller = Distiller(student.model, teacher.model, recipe.losses, student.outputs)
        self.augmented = BatchAugmentation(recipe.images, len(source.classes), recipe.batch, self.accelerator.device)
        self.optimiser = make_optimiser(student.model, recipe)
        self.wrapped, self.optimiser = self.accelerator.prepare(distiller, self.optimiser)
        self.distiller = cast(Distiller, self.accelerator.unwrap_model(self.wrapped))
        decay = get_ema_multi_avg_fn(recipe.ema)
        self.average = AveragedModel(self.distiller.student, multi_avg_fn=decay) if recipe.ema else None
        self.state, self.recent, self._saved = TrainingState(0, {}, {}, 0, {}, set()), list[float](), 0
        self.origin = {name: digest(side.model) for name, side in (("student", student), ("teacher", teacher))}
        self.phases = [(phase, self._steps(phase)) for phase in (recipe.reconstruct, recipe.distil)]
        self.total = sum(steps for _, steps in self.phases)
        size = len(student.backbone.layers), student.backbone.patches
        self.plan = plan_of(student.sparsity, *size)
        for budget in self.budgets():
            plan_of(budget, *size)  # refuses those that contradict the student
        self.by_top1 = recipe.best == "top1" and bool(source.labels)
        if self.by_top1 and not source.held_out_labels:
            raise ConfigError(
                f"Images of {source.held_out_root} that are held out lie outside of the folders of classes.",
                "Sort them, or let the cosine decide: --set best=cosine.",
            )
        self.held_out = self._held_out(teacher.model)

    def _steps(self, phase: Phase) -> int:
        if not phase.epochs:
            return phase.steps
        per_step: int = self.recipe.batch * self.recipe.accumulate * self.accelerator.num_processes
        return max(1, math.ceil(phase.epochs * len(self.source.train) / per_step))

    @torch.no_grad()
    def _held_out(self, teacher: nn.Module) -> list[HeldOut]:
        """Validation images, and what the teacher makes of them; judged by the first process alone."""
        if not self.accelerator.is_main_process:
            return []
        found = []
        labels = self.source.held_out_labels if self.by_top1 else ()
        for path, label in itertools.zip_longest(self.source.held_out, labels):
            try:
                pixels = load_image(path, self.size)
            except ImageError:
                self.state.unreadable.add(str(path))
                continue
            image = normalise(torch.from_numpy(pixels)[None], self.pre).to(self.accelerator.device)
            found.append(HeldOut(image, seen_by(teacher, image, self.distiller.names), label))
        if not found:
            raise ImageError("None of the held-out images can be read.", f"Look at {self.source.held_out[0]}.")
        return found

    def budgets(self) -> list[SparsityConfig]:
        """What the student is judged at; see `judged_budgets`."""
        return judged_budgets(self.recipe.budgets, self.sparsity, self.plan)

    def budget(self, step: int) -> SparsityConfig:
        """The budget of one step, drawn from the seed and the step alone."""
        draw = random.Random(1_000_003 * self.recipe.seed + step)  # noqa: S311
        choices = self.budgets()
        whole = [c for c in choices if c.token_keep == self.sparsity.token_keep]
        pruned = [c for c in choices if c.token_keep != self.sparsity.token_keep]
        return draw.choice(pruned if pruned and draw.random() < self.recipe.budgets.pruned else whole)

    def run(self, progress: Progress | None = None, record: RecordLosses | None = None) -> TrainingState:
        """Train from where the state stands to the end.

        Raises:
            GateError: a loss is NaN or infinite, or has exploded.
        """
        if 0 not in self.state.fidelity:
            self._judge(0)
            self._save()
        stream = self._stream()
        for step in range(self.state.step, self.total):
            losses = self._step(step, stream)
            self.state.step = step + 1
            if self.accelerator.is_main_process:
                checkpoint.append_history(self.folder, step + 1, **losses)
            if record:
                record(step + 1, losses)
            if step + 1 == self.phases[0][1]:
                self._settle_predictors()
            # The end of the first phase too: there it is seen whether predictors learn or lose.
            if (step + 1) % self.recipe.check_every == 0 or step + 1 in (self.phases[0][1], self.total):
                self._judge(step + 1)
                if record:
                    record(step + 1, self._captured(step + 1))
            if progress:
                progress(f"loss {losses['loss']:.4f}", step + 1, self.total)
        self._save()
        return self.state

    def _stream(self) -> Iterator[Batch]:
        return batches(
            self.source,
            augmentation(self.size, self.recipe.images, self.pre.mean),
            seed=self.recipe.seed,
            batch=self.recipe.batch,
            first=self.state.step * self.recipe.accumulate,
            process=self.accelerator.process_index,
            processes=self.accelerator.num_processes,
            workers=self.recipe.images.workers,
        )

    def _step(self, step: int, stream: Iterator[Batch]) -> dict[str, float]:
        """One step of the optimiser; mean losses over passes and processes."""
        done, phase = 0, self.phases[0]
        for phase in self.phases:
            if step < done + phase[1]:
                break
            done += phase[1]
        if step == done:  # another phase has losses of its own
            self.recent = []
        self._set_rates(phase[0], (step - done + 1) / phase[1])
        set_budget(self.distiller.student, self.budget(step), keep_predictors=True)
        torch.manual_seed(self.recipe.seed + step)
        sums: dict[str, float] = {}
        files: list[str] = []
        for number in range(self.recipe.accumulate):
            batch = next(stream)
            self.state.unreadable.update(batch.unreadable)
            files += batch.files
            generator = torch.Generator().manual_seed(self.recipe.seed + self.recipe.accumulate * step + number)
            with self.accelerator.accumulate(self.wrapped):
                with drawn_from(self._drawn(step, number)):
                    images, labels = self._inputs(batch)
                kind = phase[0] is self.recipe.reconstruct, phase[0].predictor_learning_rate > 0
                losses = self.wrapped(images, labels, generator, *kind)
                total = self.distiller.total(losses)
                self._check(step, float(self.accelerator.reduce(total.detach(), "mean")), files)
                if number == 0 and step and step % self.recipe.save_every == 0:
                    self._save()  # only once these weights have shown a sound loss
                self.accelerator.backward(total)
                if self.accelerator.sync_gradients:
                    self._clip(step, files)
                self.optimiser.step()
                self.optimiser.zero_grad()
            for name, loss in {"loss": total, **losses}.items():
                mean = self.accelerator.reduce(loss.detach().mean(), "mean")
                sums[name] = sums.get(name, 0.0) + float(mean) / self.recipe.accumulate
        if self.average is not None:
            self.average.update_parameters(self.distiller.student)
        self.recent = [*self.recent[1 - RECENT :], sums["loss"]]
        return sums

    def _drawn(self, step: int, number: int) -> int:
        """The seed of what a process does to a batch."""
        passes = self.recipe.accumulate * step + number
        processes: int = self.accelerator.num_processes
        return self.recipe.seed + processes * passes + int(self.accelerator.process_index)

    def _inputs(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        images = normalise(batch.images.permute(0, 2, 3, 1), self.pre).to(self.accelerator.device)
        return self.augmented(images, batch.labels.to(self.accelerator.device))

    def _check(self, step: int, loss: float, files: list[str]) -> None:
        exploded = len(self.recent) == RECENT and loss > self.recipe.explosion * statistics.median(self.recent)
        if not math.isfinite(loss) or exploded:
            self._stop(step, f"the loss is {loss:g}", files)

    def _stop(self, step: int, what: str, files: list[str]) -> None:
        """End all processes alike: the loss and the gradients are those of all."""
        names = ", ".join(gather_object(files))
        raise GateError(
            f"Training stopped at step {step + 1}: {what}. Images of the batch: {names}.",
            f"The last good checkpoint, of step {self._saved}, is in {self.folder}; go on with --resume and a lower "
            "learning rate, or start again without those images.",
        )

    def _clip(self, step: int, files: list[str]) -> None:
        """Cut the gradients of backbone and predictor apart: those of the predictor are much larger."""
        norms = []
        for group in self.optimiser.param_groups[::2], self.optimiser.param_groups[1::2]:
            parameters = [p for part in group for p in part["params"] if p.grad is not None]
            if parameters:
                limit = self.recipe.clip or math.inf
                norms.append(float(nn.utils.clip_grad_norm_(parameters, limit)))
        if not all(map(math.isfinite, norms)):
            self._stop(step, "a gradient is NaN or infinite", files)

    def _set_rates(self, phase: Phase, share: float) -> None:
        factor = phase.factor(share)
        for group in self.optimiser.param_groups:
            group["lr"] = factor * (phase.predictor_learning_rate if group["predictor"] else phase.learning_rate)

    def _judge(self, step: int) -> None:
        """Look at held-out images, and keep the weights of the best."""
        if self.accelerator.is_main_process:
            raw, models = self.distiller.student, dict[str, nn.Module]()
            models[""] = raw if self.average is None else self.average.module
            if self.by_top1 and self.average is not None and step:
                models["raw "] = raw
            for prefix, model in models.items():
                self._judge_one(step, model, prefix)
        self.accelerator.wait_for_everyone()

    def _judge_one(self, step: int, model: nn.Module, prefix: str) -> None:
        state, found = self.state, judge_weights(model, self.held_out, self.budgets(), self.distiller.names)
        if step == 0 and not found.sound:
            raise GateError("The student's tokens of held-out images are NaN or infinite.", "Look at its weights.")
        figures: dict[str, Any] = {"fidelity": found.fidelity, "cosines": found.cosines, "captured": found.captured}
        figures |= {"top1": found.top1} if self.by_top1 else {}
        if step == 0 and self.phases[0][1]:
            state.predictors = BestPredictors.of(model)
        elif state.predictors is not None and step < self.phases[0][1]:
            state.predictors.take(model, state.captured[0], found.captured)
        checkpoint.append_history(self.folder, step, **{f"{prefix}{name}": x for name, x in figures.items()})
        if found.score <= state.fidelity.get(step, -math.inf):
            return  # The averaged weights of this step do as well.
        state.fidelity[step], state.cosines[step], state.captured[step] = found.score, found.cosines, found.captured
        if self.by_top1:
            state.top1[step] = found.top1
        if found.score >= max(state.fidelity.values()):
            state.best_step = step
            state.best = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}

    def _settle_predictors(self) -> None:
        """End the first phase with the best predictor of each layer, in all processes and in the average."""
        best, models = self.state.predictors, [self.distiller.student, *([self.average.module] if self.average else [])]
        if best is not None and self.accelerator.is_main_process:  # That alone judges.
            images, budgets = [one.image for one in self.held_out], self.budgets()
            for model in models:
                best.take(model, self.state.captured[0], attention_captured(model, images, budgets))
            for model in models:
                best.give(model)
        for model in models:
            for layer in sparse_layers(model):
                broadcast([parameter.data for parameter in layer.select.parameters()])

    def _captured(self, step: int) -> dict[str, float]:
        """For TensorBoard."""
        found = self.state.captured.get(step, {})
        return {f"captured {keep}/{n}": share for keep, each in found.items() for n, share in enumerate(each)}

    def _save(self) -> None:
        self._saved = self.state.step
        self.state.unreadable = set(gather_object(sorted(self.state.unreadable)))
        if self.accelerator.is_main_process:
            content = Checkpoint(
                fingerprint=self.fingerprint(),
                student=self.distiller.student.state_dict(),
                optimiser=Optimiser(**self.optimiser.state_dict()),
                average=None if self.average is None else self.average.state_dict(),
                recent=self.recent,
                state=self.state,
            )
            checkpoint.save(self.folder, content)
        self.accelerator.wait_for_everyone()

    def restore(self, content: Checkpoint) -> None:
        """Take up a checkpoint, as `checkpoint.load` gives it.

        Raises:
            ArtifactError: it holds anything that this training would not have saved.
        """
        self._check_restored(content)
        self.distiller.student.load_state_dict(content.student)
        # Rates are set at every step, and all else that the groups say the fingerprint has compared.
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": content.optimiser.state, "param_groups": groups})
        if self.average is not None and content.average is not None:
            self.average.load_state_dict(content.average)
        self.recent = content.recent
        unreadable = self.state.unreadable | content.state.unreadable
        self.state = msgspec.structs.replace(content.state, unreadable=unreadable)
        self._saved = self.state.step
        if self.accelerator.is_main_process:
            checkpoint.cut_history(self.folder, self.state.step)

    def _check_restored(self, content: Checkpoint) -> None:
        weights, found = self.distiller.student.state_dict(), content.optimiser.state
        like = {
            "student": weights,
            "best": weights,
            "average": None if self.average is None else self.average.state_dict(),
            "optimiser": checkpoint.moments_like(self.optimiser, found),
        }
        parts = {"student": content.student, "best": content.state.best, "average": content.average, "optimiser": found}
        checkpoint.require_like(parts, like, "content")
        checkpoint.require_course(content.state, self.total, len(self.budgets()))
        checkpoint.require_predictors(content.state, weights_of_predictors(self.distiller.student))

    def fingerprint(self) -> Fingerprint:
        """What must be the same for a training to be resumed; learning rates, losses and limits may change."""
        recipe = self.recipe
        images = recipe.images
        crops = images.smallest_crop, images.flip, images.cut_mix, images.corrupted
        mixed = images.auto_augment, images.erasing, images.mixup, images.mixup_cut, images.smoothing
        return {
            "images": self.source.fingerprint,
            "crops": str(crops + mixed),
            **self.origin,
            "budgets": str(recipe.budgets),
            "sparsity": str(self.sparsity),
            "seed": recipe.seed,
            "images per step": recipe.batch * recipe.accumulate * self.accelerator.num_processes,
            "steps": self.total,
            "ema": bool(recipe.ema),
            "precision": recipe.precision,
            # Of the optimiser's state, which comes from the checkpoint:
            "epsilon": recipe.epsilon,
            "weight_decay": recipe.weight_decay,
            "predictor_weight_decay": recipe.predictor_weight_decay,
        }
