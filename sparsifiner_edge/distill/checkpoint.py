"""Checkpoints: one file, written whole or not at all, and used only where it fits the training that resumes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import torch
from msgspec.structs import asdict
from torch import Tensor

from sparsifiner_edge.bounds import is_number
from sparsifiner_edge.distill.captured import BestPredictors, Captured
from sparsifiner_edge.errors import ArtifactError, ConfigError
from sparsifiner_edge.files import io_errors, lock, open_regular, read_bytes, replaced_file, write_bytes
from sparsifiner_edge.sparse.weights import brief
from sparsifiner_edge.text import dump_json, finite

CHECKPOINT, HISTORY = "checkpoint.pt", "history.jsonl"
ANEW = "Remove its folder to start again, or give another -o."
_MOST_HISTORY = 1 << 30
"""Bytes: some five million steps."""
Tensors: TypeAlias = dict[str, Tensor]
Fingerprint: TypeAlias = dict[str, str | bool | int | float]
"""What must be the same for a training to be resumed."""


class TrainingState(msgspec.Struct, forbid_unknown_fields=True):
    """Where a training stands.

    Attributes:
        step: steps done. fidelity: of each judgement, by step. best_step: of the best of them.
        cosines: of each judgement, by step: of every budget, in the order of `Training.budgets`.
        best: weights of the student then. unreadable: files, with no order.
        top1: of some judgements, by step: of every budget. captured: of some judgements, by step; see `captured`.
        predictors: the best of the phase in which they alone learn; None before, and where there is no such phase.
    """

    step: int
    fidelity: dict[int, float]
    cosines: dict[int, list[float]]
    best_step: int
    best: Tensors
    unreadable: set[str]
    captured: dict[int, Captured] = {}
    top1: dict[int, list[float]] = {}
    predictors: BestPredictors | None = None


class Optimiser(msgspec.Struct, forbid_unknown_fields=True):
    """Moments by the parameters' numbers, and groups, of which nothing is read."""

    state: dict[int, Tensors]
    param_groups: object


class Checkpoint(msgspec.Struct, forbid_unknown_fields=True):
    """A training that can go on.

    Attributes:
        average: averaged weights; None where the training has none.
        recent: losses that an explosion is measured against.
    """

    fingerprint: Fingerprint
    student: Tensors
    optimiser: Optimiser
    average: Tensors | None
    recent: list[float]
    state: TrainingState


def save(folder: Path, content: Checkpoint) -> None:
    """Replace the checkpoint in `folder`.

    Raises:
        ArtifactError: the disk refuses; the checkpoint is the one before.
    """
    path = folder / CHECKPOINT
    best = content.state.predictors
    state = asdict(content.state) | {"unreadable": sorted(content.state.unreadable)}
    state["predictors"] = None if best is None else asdict(best)
    plain = asdict(content) | {"optimiser": asdict(content.optimiser), "state": state}
    try:
        with replaced_file(path) as scratch, scratch.open("wb") as file:
            torch.save(plain, file)
    except (ArtifactError, RuntimeError) as error:  # The latter by torch's writer, in words of its own.
        what = error.what if isinstance(error, ArtifactError) else f"{path} cannot be written: a write came short."
        raise ArtifactError(what, "Free space; go on with --resume.") from error


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """The folder, made where it is missing, for one training alone as long as it lives.

    Raises:
        ConfigError: another training holds it.
        ArtifactError: the disk refuses.
    """
    with io_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    try:
        if not lock(handle):
            raise ConfigError(f"Another training writes to {folder}.", "Wait for it, or give another -o.")
        yield
    finally:
        os.close(handle)


def load(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`; nothing in it is run. Its parts are of the right types; see `require_like` for more.

    Raises:
        ArtifactError: it is damaged, or another kind of file.
    """
    path = folder / CHECKPOINT
    with open_regular(path) as file:
        try:
            plain = torch.load(file, map_location="cpu", weights_only=True)
        # torch.load raises many kinds of error on damaged files.
        except Exception as error:
            raise ArtifactError(f"{path} is damaged: {brief(error)}", f"Remove {folder}; start again.") from error
    # A tensor in the place of a dict has errors of its own.
    with contextlib.suppress(Exception):
        content = msgspec.convert(plain, Checkpoint)
        if all(map(is_number, content.recent)):
            return content
    raise ArtifactError(f"{path} is not a training's checkpoint.", "Move it, or give another -o.")


def require_like(found: Any, like: Any, label: str) -> None:
    """Refuse a part of a checkpoint that is not what this training itself would have saved.

    Args:
        found: as read. like: dicts, tensors and numbers, of the names, types and shapes that it must have.
        label: for the message.

    Raises:
        ArtifactError: a name, type or shape differs, or a number is NaN or infinite.
    """
    if isinstance(like, Tensor):
        fits = isinstance(found, Tensor) and _same_kind(found, like)
    elif isinstance(like, Mapping):
        fits = isinstance(found, Mapping) and found.keys() == like.keys()
        for name in like if fits else ():
            require_like(found[name], like[name], f"{label}.{name}")
    else:
        fits = is_number(found) if isinstance(like, float) else type(found) is type(like)
    if not fits:
        raise ArtifactError(f"The checkpoint's {label} does not belong to this training.", ANEW)


def _same_kind(found: Tensor, like: Tensor) -> bool:
    """Shapes first: a tensor that claims a huge one holds nothing that could be looked at."""
    if found.shape != like.shape or found.dtype != like.dtype:
        return False
    return found.layout is torch.strided and found.device.type == "cpu" and bool(torch.isfinite(found).all())


def moments_like(optimiser: Any, numbers: Container[int]) -> dict[int, Tensors]:
    """What AdamW keeps of those of its parameters that ever had a gradient, by their numbers."""
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    kept = [(number, x) for number, x in enumerate(parameters) if number in numbers]
    return {number: {"exp_avg": x, "exp_avg_sq": x, "step": torch.zeros(())} for number, x in kept}


def require_course(state: TrainingState, total: int, budgets: int) -> None:
    """Refuse steps and judgements that a training of `total` steps, judged at so many budgets, does not make.

    Raises:
        ArtifactError: a step lies elsewhere, or a judgement is missing, NaN or infinite.
    """
    figures = [*state.fidelity.values(), *(x for cosines in state.cosines.values() for x in cosines)]
    captured = [{keep: len(shares) for keep, shares in found.items()} for found in state.captured.values()]
    figures += [x for accuracies in state.top1.values() for x in accuracies]
    figures += [x for found in state.captured.values() for shares in found.values() for x in shares]
    if not (
        all(0 <= step <= state.step <= total for step in [state.step, state.best_step, *state.fidelity])
        and {0, state.best_step} <= state.fidelity.keys() == state.cosines.keys()
        and all(len(each) == budgets for each in (*state.cosines.values(), *state.top1.values()))
        and all(map(is_number, figures))
        and all(lengths == captured[0] for lengths in captured)
    ):
        raise ArtifactError("The checkpoint's steps do not belong to this training.", ANEW)


def require_predictors(state: TrainingState, like: Tensors) -> None:
    """Refuse predictors that are not those of a model; like: its own.

    Raises:
        ArtifactError: see `require_like`; or there are not as many gains as layers, or one is below 0, or what lists
            held at the start is not of these layers.
    """
    if state.predictors is not None:
        require_like(state.predictors.weights, like, "predictors")
        gains, layers = state.predictors.gains, len({name.split(".")[0] for name in like})
        sound = len(gains) == layers and all(is_number(gain) and gain >= 0 for gain in gains)
        if not sound or any(len(shares) != layers for shares in state.captured.get(0, {"": []}).values()):
            raise ArtifactError("The checkpoint's predictors do not belong to this training.", ANEW)


def append_history(folder: Path, step: int, **figures: float | list[float] | Captured) -> None:
    """One line of JSON more: the step, and figures of it.

    Raises:
        ArtifactError: the disk refuses.
    """
    line = dump_json(finite({"step": step} | figures)[0], indent=None)  # A loss whose weight is 0 may be NaN.
    with io_errors(folder / HISTORY), (folder / HISTORY).open("a", encoding="utf-8") as file:
        file.write(line)


class _Entry(msgspec.Struct):
    step: int


def cut_history(folder: Path, step: int) -> None:
    """Drop what was written after `step`, and any line that was cut short or is no entry.

    Raises:
        ArtifactError: it is not a regular file, or the disk refuses.
    """
    path, kept = folder / HISTORY, []
    for line in read_bytes(path, _MOST_HISTORY).splitlines() if path.exists() else []:
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            if msgspec.json.decode(line, type=_Entry).step <= step:
                kept.append(line + b"\n")
    write_bytes(path, b"".join(kept))
