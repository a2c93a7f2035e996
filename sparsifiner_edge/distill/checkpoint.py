"""Checkpoints and history of a training.

A checkpoint is one file of tensors and JSON. It is written completely or not at all, and is used only if it fits the
training that resumes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import msgspec
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from sparsifiner_edge.distill.losses import Judgement
from sparsifiner_edge.errors import ArtifactError
from sparsifiner_edge.files import io_errors, open_regular, read_bytes, replace_file, write_bytes
from sparsifiner_edge.text import dump_json, finite, one_line

CHECKPOINT = "checkpoint.safetensors"
"""Name of the checkpoint file."""
HISTORY = "history.jsonl"
"""Name of the file with one line of figures per step."""
ANEW = "Remove its folder to start again, or give another -o."
"""Fix for a checkpoint that does not fit."""
_MOST_HISTORY = 1 << 30
"""Largest history file in bytes, enough for about five million steps."""
_STATE = "state"
"""Metadata key of the training state in the checkpoint."""
Tensors: TypeAlias = dict[str, Tensor]
"""Tensors by name."""
Fingerprint: TypeAlias = dict[str, str | bool | int | float]
"""Settings that must be the same when a training resumes."""


class TrainingState(msgspec.Struct, forbid_unknown_fields=True):
    """State of a training apart from its tensors.

    Attributes:
        fingerprint: Settings that must be the same when the training resumes.
        step: Steps that are done.
        best_step: Step after which the kept weights were evaluated.
        start: Evaluation of the initial weights.
        best: Evaluation of the kept weights.
        unreadable: Files that could not be read.
        recent: Latest losses, with which a new loss is compared to detect an explosion.
    """

    fingerprint: Fingerprint = {}
    step: int = 0
    best_step: int = 0
    start: Judgement | None = None
    best: Judgement | None = None
    unreadable: set[str] = set()
    recent: list[float] = []

    def require_course(self, total: int, budgets: int) -> None:
        """Check that the steps and evaluations can come from a training of `total` steps at a number of budgets.

        Raises:
            ArtifactError: If a step is out of range, or an evaluation is missing.
        """
        evaluated = all(
            judgement is not None and len(judgement.figures) == budgets for judgement in (self.start, self.best)
        )
        if not (evaluated and 0 <= self.best_step <= self.step <= total):
            raise ArtifactError("The checkpoint's steps do not belong to this training.", ANEW)


def save(folder: Path, state: TrainingState, tensors: Mapping[str, Tensor]) -> None:
    """Replace the checkpoint in a folder.

    Raises:
        ArtifactError: If the file cannot be written. The previous checkpoint is kept in this case.
    """
    copies = {name: x.detach().to("cpu", copy=True).contiguous() for name, x in tensors.items()}
    try:
        with replace_file(folder / CHECKPOINT) as scratch:
            # `save_file` writes to a temporary file of its own first, which would remain after a kill.
            scratch.write_bytes(safetensors.torch.save(copies, {_STATE: msgspec.json.encode(state).decode()}))
    except ArtifactError as error:
        raise ArtifactError(error.what, "Free space, then continue with --resume.") from error


def load(folder: Path) -> tuple[TrainingState, Tensors]:
    """Read the checkpoint in a folder; `require_like` checks its tensors.

    Raises:
        ArtifactError: If the checkpoint is damaged, or the file is something else.
    """
    path = folder / CHECKPOINT
    with open_regular(path):
        pass
    try:
        with safetensors.safe_open(path, "pt") as file:
            state = msgspec.json.decode((file.metadata() or {})[_STATE], type=TrainingState)
            return state, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    # Damaged files raise many kinds of error.
    except Exception as error:
        fix = f"Remove {folder} and start again."
        raise ArtifactError(f"{path} is damaged or is not a checkpoint: {one_line(error)}", fix) from error


def require_like(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
    """Check that tensors have the names, types and shapes that this training would have saved.

    Args:
        tensors: Tensors of the checkpoint.
        like: Tensors that the training would save.

    Raises:
        ArtifactError: If a name, type or shape differs, or a number is NaN or infinite.
    """
    foreign = sorted(tensors.keys() ^ like.keys())
    foreign += [
        name
        for name in like.keys() & tensors.keys()
        if tensors[name].shape != like[name].shape
        or tensors[name].dtype != like[name].dtype
        or not bool(torch.isfinite(tensors[name]).all())
    ]
    if foreign:
        raise ArtifactError(f"The checkpoint's tensor {foreign[0]!r:.200} does not belong to this training.", ANEW)


def append_history(folder: Path, step: int, **figures: object) -> None:
    """Append a line of JSON with the step and its figures.

    Raises:
        ArtifactError: If the file cannot be written.
    """
    line = dump_json(finite({"step": step} | figures)[0], indent=None)  # A loss whose weight is 0 may be NaN.
    with io_errors(folder / HISTORY), (folder / HISTORY).open("a", encoding="utf-8") as file:
        file.write(line)


class _Entry(msgspec.Struct):
    """Line of the history."""

    step: int


def cut_history(folder: Path, step: int) -> None:
    """Remove the entries after `step`, and lines that are incomplete or not entries.

    Raises:
        ArtifactError: If the history is not a regular file, or cannot be written.
    """
    path, lines = folder / HISTORY, []
    for line in read_bytes(path, _MOST_HISTORY).splitlines() if path.exists() else []:
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            if msgspec.json.decode(line, type=_Entry).step <= step:
                lines.append(line + b"\n")
    write_bytes(path, b"".join(lines))
