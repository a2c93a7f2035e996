"""Losses as TensorBoard reads them."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sparsifiner_edge.errors import MissingExtraError
from sparsifiner_edge.files import io_errors

RecordLosses = Callable[[int, dict[str, float]], None]
"""Called with (step, losses); other figures bear a name with a slash."""


@contextlib.contextmanager
def recorder(folder: Path) -> Iterator[RecordLosses]:
    """What writes losses into a file in `folder`, which is made with the first of them.

    It writes in the caller's own thread: that of TensorBoard's writer prints a traceback where a disk is full.

    Raises:
        MissingExtraError: TensorBoard is not installed.
        ArtifactError: from what it gives: the disk refuses.
    """
    try:
        from tensorboard.compat.proto.event_pb2 import (  # type: ignore[import-untyped]
            Event,
            SessionLog,
        )
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
        from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingExtraError("tensorboard", "train") from error
    path = folder / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
    writer: Any = None

    def write(**content: Any) -> None:
        writer.write(Event(wall_time=time.time(), **content).SerializeToString())

    def record(step: int, losses: dict[str, float]) -> None:
        nonlocal writer
        with io_errors(path):
            if writer is None:
                folder.mkdir(parents=True, exist_ok=True)
                writer = RecordWriter(path.open("ab", buffering=0))
                write(file_version="brain.Event:2")
                # What was written after the checkpoint that a training resumes from is written anew.
                write(step=step, session_log=SessionLog(status=SessionLog.START))
            values = [
                Summary.Value(tag=name if "/" in name else f"loss/{name}", simple_value=value)
                for name, value in losses.items()
            ]
            write(step=step, summary=Summary(value=values))

    try:
        yield record
    finally:
        if writer is not None:
            writer.close()
