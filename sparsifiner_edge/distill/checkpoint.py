"""What survives a training that is killed: one file, written whole or not at all, and believed only where it fits."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import torch
from msgspec.structs import asdict
from torch import Tensor

from sparsifiner_edge.bounds import flaw, is_number
from sparsifiner_edge.errors import ArtifactError, ConfigError
from sparsifiner_edge.files import io_errors, lock, open_regular, read_bytes, replaced_file, write_text
from sparsifiner_edge.text import dump_json, finite

CHECKPOINT, HISTORY = "checkpoint.pt", "history.jsonl"
ANEW = "Remove its folder to start again, or give another -o."
_MOST_HISTORY = 1 << 30
"""Bytes: some five million steps."""
Tensors: TypeAlias = dict[str, Tensor]
Fingerprint: TypeAlias = dict[str, str | bool | int | float]
"""What must be the same for a training to be resumed."""


class State(msgspec.Struct, forbid_unknown_fields=True):
    """Where a training stands.

    Attributes:
        step: steps done. fidelity: of each judgement, by step. best_step: of the best of them.
        cosines: of each judgement, by step: of every budget, in the order of `Training.budgets`.
        best: weights of the student then. unreadable: files, with no order.
    """

    step: int
    fidelity: dict[int, float]
    cosines: dict[int, list[float]]
    best_step: int
    best: Tensors
    unreadable: set[str]


class Optimiser(msgspec.Struct, forbid_unknown_fields=True):
    """Moments by the parameters' numbers, and groups, of which nothing is read."""

    state: dict[int, Tensors]
    param_groups: object


class Checkpoint(msgspec.Struct, forbid_unknown_fields=True):
    """A training that can go on.

    Attributes:
        average: averaged weights. scaler: of fp16 gradients. None where the training has none.
        recent: losses that an explosion is measured against.
    """

    fingerprint: Fingerprint
    student: Tensors
    optimiser: Optimiser
    average: Tensors | None
    scaler: dict[str, int | float] | None
    recent: list[float]
    state: State


def save(folder: Path, content: Checkpoint) -> None:
    """Replace the checkpoint in `folder`.

    Raises:
        ArtifactError: the disk refuses; the checkpoint is the one before.
    """
    path = folder / CHECKPOINT
    state = asdict(content.state) | {"unreadable": sorted(content.state.unreadable)}
    plain = asdict(content) | {"optimiser": asdict(content.optimiser), "state": state}
    try:
        with replaced_file(path) as scratch, scratch.open("wb") as file:
            torch.save(plain, file)
    except ArtifactError as error:
        raise ArtifactError(error.what, "Free space; go on with --resume.") from error
    except RuntimeError as error:  # By torch's writer, in words of its own.
        what = f"{path} cannot be written: a write came short."
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
    plain = _read(path)
    try:
        content = msgspec.convert(plain, Checkpoint)
    # A tensor in the place of a dict has errors of its own.
    except Exception as error:
        raise _foreign(path) from error
    if not all(map(is_number, content.recent)):
        raise _foreign(path)
    return content


def _foreign(path: Path) -> ArtifactError:
    return ArtifactError(f"{path} is no checkpoint of a training.", "Move it, or give another -o.")


def _read(path: Path) -> Any:
    with open_regular(path) as file:
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        # torch.load raises many kinds of error on damaged files.
        except Exception as error:
            why = str(error).partition("\n")[0] or type(error).__name__
            raise ArtifactError(f"{path} is damaged: {why}", f"Remove {path.parent}; start again.") from error


def require_like(found: Any, like: Any, label: str) -> None:
    """Refuse a part of a checkpoint that is not what this training itself would have saved.

    Args:
        found: as read. like: dicts, lists, tensors and numbers, of the names, types and shapes that it must have.
        label: for the message.

    Raises:
        ArtifactError: a name, type or shape differs, or a number is none.
    """
    if isinstance(like, Tensor):
        fits = isinstance(found, Tensor) and _same_kind(found, like)
    elif isinstance(like, Mapping):
        fits = isinstance(found, Mapping) and found.keys() == like.keys()
        for name in like if fits else ():
            require_like(found[name], like[name], f"{label}.{name}")
    elif isinstance(like, float):
        fits = is_number(found)
    else:
        fits = type(found) is type(like)
    if not fits:
        raise ArtifactError(f"The checkpoint's {label} is none of this training.", ANEW)


def _same_kind(found: Tensor, like: Tensor) -> bool:
    """Shapes first: a tensor that claims a huge one holds nothing that could be looked at."""
    if found.shape != like.shape or found.dtype != like.dtype:
        return False
    return found.layout is torch.strided and found.device.type == "cpu" and bool(torch.isfinite(found).all())


def require_moments(found: dict[int, Tensors], optimiser: Any) -> None:
    """Refuse what AdamW would not have kept of its parameters; those that never had a gradient have none.

    Raises:
        ArtifactError: see `require_like`.
    """
    numbered = zip(optimiser.param_groups, optimiser.state_dict()["param_groups"], strict=True)
    pairs = [pair for group, told in numbered for pair in zip(told["params"], group["params"], strict=True)]
    like = {number: {"exp_avg": x, "exp_avg_sq": x, "step": torch.zeros(())} for number, x in pairs if number in found}
    require_like(found, like, "optimiser")


def require_course(state: State, total: int, budgets: int) -> None:
    """Refuse steps and judgements that a training of `total` steps, judged at so many budgets, does not make.

    Raises:
        ArtifactError: a step lies elsewhere, or a judgement is missing or none.
    """
    fidelity, cosines = state.fidelity, state.cosines
    steps = [state.step, state.best_step, *fidelity]
    if not (
        all(0 <= step <= state.step <= total for step in steps)
        and {0, state.best_step} <= fidelity.keys() == cosines.keys()
        and all(map(is_number, fidelity.values()))
        and all(len(x) == budgets and all(map(is_number, x)) for x in cosines.values())
    ):
        raise ArtifactError("The checkpoint's steps are none of this training.", ANEW)


def append_history(folder: Path, step: int, **found: float | list[float]) -> None:
    """One line of JSON more: the step, and what was found there.

    Raises:
        ArtifactError: the disk refuses.
    """
    line = dump_json(finite({"step": step} | found)[0], indent=None)  # A loss without weight may be no number.
    with io_errors(folder / HISTORY), (folder / HISTORY).open("a", encoding="utf-8") as file:
        file.write(line)


def cut_history(folder: Path, step: int) -> None:
    """Drop what was written after `step`, and any line that was cut short or is no entry.

    Raises:
        ArtifactError: the file is none, or the disk refuses.
    """
    path = folder / HISTORY
    lines = read_bytes(path, _MOST_HISTORY).decode("utf-8", "replace").splitlines() if path.exists() else []
    kept = [entry for line in lines if (entry := _entry(line, step)) is not None]
    write_text(path, "".join(dump_json(entry, indent=None) for entry in kept))


class _Entry(msgspec.Struct):
    step: int


def _entry(line: str, last: int) -> object | None:
    """What a line holds; None where it is no entry up to the `last` step."""
    try:
        entry = json.loads(line)
        fits = flaw(entry) is None and msgspec.convert(entry, _Entry).step <= last
    except (ValueError, RecursionError):
        return None
    return entry if fits else None
