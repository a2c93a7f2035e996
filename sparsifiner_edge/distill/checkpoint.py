"""What survives a training that is killed: one file, written whole or not at all, and believed only where it fits."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsifiner_edge.bounds import flaw, is_number
from sparsifiner_edge.errors import ArtifactError, ConfigError
from sparsifiner_edge.files import io_errors, lock, open_regular, read_bytes, replaced_file, write_text
from sparsifiner_edge.text import dump_json, finite

CHECKPOINT, HISTORY = "checkpoint.pt", "history.jsonl"
ANEW = "Remove its folder to start again, or give another -o."
_MOST_HISTORY = 1 << 30
"""Bytes: some five million steps."""
_PARTS: dict[str, tuple[type, ...]] = {
    "fingerprint": (dict,), "student": (dict,), "optimiser": (dict,), "average": (dict, type(None)),
    "scaler": (dict, type(None)), "recent": (list,), "state": (dict,),
}  # fmt: skip
_STATE: dict[str, type] = {
    "step": int, "fidelity": dict, "cosines": dict, "best_step": int, "best": dict, "unreadable": list,
}  # fmt: skip


def save(folder: Path, content: dict[str, Any]) -> None:
    """Replace the checkpoint in `folder`.

    Raises:
        ArtifactError: the disk refuses; the checkpoint is the one before.
    """
    path = folder / CHECKPOINT
    try:
        with replaced_file(path) as scratch, scratch.open("wb") as file:
            torch.save(content, file)
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


def load(folder: Path) -> dict[str, Any]:
    """The checkpoint in `folder`; nothing in it is run. Its parts are of the right types; see `require_like` for more.

    Raises:
        ArtifactError: it is damaged, or another kind of file.
    """
    path = folder / CHECKPOINT
    content = _read(path)
    foreign = ArtifactError(f"{path} is no checkpoint of a training.", "Move it, or give another -o.")
    if not isinstance(content, dict) or content.keys() != _PARTS.keys():
        raise foreign
    state, told = content["state"], content["fingerprint"]
    if not all(isinstance(content[name], kinds) for name, kinds in _PARTS.items()) or state.keys() != _STATE.keys():
        raise foreign
    plain = all(isinstance(name, str) and isinstance(value, (str, int, float)) for name, value in told.items())
    if not plain or not all(type(state[name]) is kind for name, kind in _STATE.items()):
        raise foreign
    if not all(map(is_number, content["recent"])) or not all(isinstance(name, str) for name in state["unreadable"]):
        raise foreign
    return content


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


def require_moments(found: Any, optimiser: Any) -> None:
    """Refuse what AdamW would not have kept of its parameters; those that never had a gradient have none.

    Raises:
        ArtifactError: see `require_like`.
    """
    known = found if isinstance(found, dict) else {}
    numbered = zip(optimiser.param_groups, optimiser.state_dict()["param_groups"], strict=True)
    pairs = [pair for group, told in numbered for pair in zip(told["params"], group["params"], strict=True)]
    like = {number: {"exp_avg": x, "exp_avg_sq": x, "step": torch.zeros(())} for number, x in pairs if number in known}
    require_like(found, like, "optimiser")


def require_course(state: Mapping[str, Any], total: int, budgets: int) -> None:
    """Refuse steps and judgements that a training of `total` steps, judged at so many budgets, does not make.

    Raises:
        ArtifactError: a step lies elsewhere, or a judgement is missing or none.
    """
    fidelity, cosines = state["fidelity"], state["cosines"]
    steps = [state["step"], state["best_step"], *fidelity]
    if not (
        all(type(step) is int and 0 <= step <= state["step"] <= total for step in steps)
        and {0, state["best_step"]} <= fidelity.keys() == cosines.keys()
        and all(map(is_number, fidelity.values()))
        and all(isinstance(x, list) and len(x) == budgets and all(map(is_number, x)) for x in cosines.values())
    ):
        raise ArtifactError("The checkpoint's steps are none of this training.", ANEW)


def append_history(folder: Path, entry: dict[str, Any]) -> None:
    """One line of JSON more.

    Raises:
        ArtifactError: the disk refuses.
    """
    line = dump_json(finite(entry)[0], indent=None)  # A loss without weight may be no number.
    with io_errors(folder / HISTORY), (folder / HISTORY).open("a", encoding="utf-8") as file:
        file.write(line)


def cut_history(folder: Path, step: int) -> list[dict[str, Any]]:
    """Drop what was written after `step`; the entries that stay. A line that was cut short or is no entry goes too.

    Raises:
        ArtifactError: the file is none, or the disk refuses.
    """
    path = folder / HISTORY
    lines = read_bytes(path, _MOST_HISTORY).decode("utf-8", "replace").splitlines() if path.exists() else []
    kept = [entry for entry in map(_entry, lines) if entry is not None and entry["step"] <= step]
    write_text(path, "".join(dump_json(entry, indent=None) for entry in kept))
    return kept


def _entry(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    fits = isinstance(entry, dict) and type(entry.get("step")) is int and flaw(entry) is None
    return entry if fits else None
