"""Checkpoints: one file of tensors and JSON, written whole or not at all, used only where it fits the training that
resumes; and the history beside it.
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

CHECKPOINT, HISTORY = "checkpoint.safetensors", "history.jsonl"
ANEW = "Remove its folder to start again, or give another -o."
_MOST_HISTORY = 1 << 30
"""Bytes: some five million steps."""
_STATE = "state"
Tensors: TypeAlias = dict[str, Tensor]
Fingerprint: TypeAlias = dict[str, str | bool | int | float]
"""What must be the same for a training to be resumed."""


class TrainingState(msgspec.Struct, forbid_unknown_fields=True):
    """Where a training stands, beside its tensors.

    Attributes:
        step: steps done. best_step: after which the weights that are kept stood.
        start, best: judgements of the first weights, and of those that are kept.
        unreadable: files. recent: losses that an explosion is measured against.
    """

    fingerprint: Fingerprint = {}
    step: int = 0
    best_step: int = 0
    start: Judgement | None = None
    best: Judgement | None = None
    unreadable: set[str] = set()
    recent: list[float] = []

    def require_course(self, total: int, budgets: int) -> None:
        """Refuse steps and judgements that a training of `total` steps, judged at that many budgets, does not make.

        Raises:
            ArtifactError: a step lies elsewhere, or a judgement is missing.
        """
        judged = all(one is not None and len(one.figures) == budgets for one in (self.start, self.best))
        if not (judged and 0 <= self.best_step <= self.step <= total):
            raise ArtifactError("The checkpoint's steps do not belong to this training.", ANEW)


def save(folder: Path, state: TrainingState, tensors: Mapping[str, Tensor]) -> None:
    """Replace the checkpoint in `folder`.

    Raises:
        ArtifactError: the disk refuses; the checkpoint is the one before.
    """
    copies = {name: x.detach().to("cpu", copy=True).contiguous() for name, x in tensors.items()}
    try:
        with replace_file(folder / CHECKPOINT) as scratch:
            # Not by `save_file`, which writes to a file of its own first: a kill would leave that beside ours.
            scratch.write_bytes(safetensors.torch.save(copies, {_STATE: msgspec.json.encode(state).decode()}))
    except ArtifactError as error:
        raise ArtifactError(error.what, "Free space; go on with --resume.") from error


def load(folder: Path) -> tuple[TrainingState, Tensors]:
    """The checkpoint in `folder`; see `require_like` for what its tensors must be.

    Raises:
        ArtifactError: it is damaged, or another kind of file.
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
        fix = f"Remove {folder}; start again."
        raise ArtifactError(f"{path} is damaged, or no training's checkpoint: {one_line(error)}", fix) from error


def require_like(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not what this training itself would have saved; like: that.

    Raises:
        ArtifactError: a name, type or shape differs, or a number is NaN or infinite.
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
        raise ArtifactError(f"The checkpoint's {foreign[0]!r:.200} does not belong to this training.", ANEW)


def append_history(folder: Path, step: int, **figures: object) -> None:
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
    path, lines = folder / HISTORY, []
    for line in read_bytes(path, _MOST_HISTORY).splitlines() if path.exists() else []:
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            if msgspec.json.decode(line, type=_Entry).step <= step:
                lines.append(line + b"\n")
    write_bytes(path, b"".join(lines))
