"""What survives a training that is killed: one file, written whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sparsifiner_edge.errors import ArtifactError, ConfigError

CHECKPOINT, HISTORY = "checkpoint.pt", "history.jsonl"


def save(folder: Path, content: dict[str, Any]) -> None:
    """Replace the checkpoint in `folder`."""
    scratch = folder / f"{CHECKPOINT}.part"
    try:
        with scratch.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(folder / CHECKPOINT)
    finally:
        scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """The folder, made where it is missing, for one training alone as long as it lives.

    Raises:
        ConfigError: another training holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"Another training writes to {folder}.", "Wait for it, or give another -o.") from error
        except OSError:
            pass  # a disk that knows no locks
        yield
    finally:
        os.close(handle)


def load(folder: Path) -> dict[str, Any]:
    """The checkpoint in `folder`; nothing in it is run.

    Raises:
        ArtifactError: it is damaged, or another kind of file.
    """
    path = folder / CHECKPOINT
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError) as error:
        raise ArtifactError(
            f"{path} is damaged: {str(error).splitlines()[0]}", f"Remove {folder}; start again."
        ) from error
    if not isinstance(content, dict) or not all(isinstance(content.get(x), dict) for x in ("fingerprint", "state")):
        raise ArtifactError(f"{path} is no checkpoint of a training.", "Move it, or give another -o.")
    return content


def append_history(folder: Path, entry: dict[str, Any]) -> None:
    """One line of JSON more."""
    with (folder / HISTORY).open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def cut_history(folder: Path, step: int) -> list[dict[str, Any]]:
    """Drop what was written after `step`; the entries that stay. A line that was cut short goes too."""
    path, kept = folder / HISTORY, []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if entry["step"] <= step:
            kept.append(entry)
    scratch = path.with_suffix(".part")
    scratch.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
    scratch.replace(path)
    return kept
