"""Measures whether a stream keeps its bound in hard scenes and with a moving camera, and how fast it is there.

    python benchmarks/stream_conditions.py [--set publication] [--only TEXT] [--cache FOLDER] [-o FILE]

Every frame is compared with the dense model on the same pixels: in the scenes of `hard_scenes.py` on the frame, and in
the motions of `moving_cameras.py` on the aligned frame. A frame claims to be kept if its estimated error is at most
1 - .98. A claim is bad if the true error is above that by more than .005. The dense model is timed in turn with the
stream, in the same engine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
from hard_scenes import SCENES, SPEEDS, scene_frames
from moving_cameras import MOTIONS, PHOTOGRAPHS, SIDE, moving_frames
from stream import exported
from summary import write_summary

import sparsifiner_edge as se
from sparsifiner_edge.arrays import Array
from sparsifiner_edge.bundle.store import bundle_hash
from sparsifiner_edge.camera.align import Aligner
from sparsifiner_edge.cli.common import err_console, print_table
from sparsifiner_edge.execution import Execution
from sparsifiner_edge.metrics import cosine
from sparsifiner_edge.profiles.measure.timing import call_ms
from sparsifiner_edge.results import Result, Subject

AT_LEAST, TOLERANCE = 0.98, 0.005
PREFIX = 1
EVERY = 4
"""The dense model is timed on one of so many frames, if its answers come from the cache."""


@dataclasses.dataclass
class Case:
    """Results of a stream on a sequence of frames, in order.

    Attributes:
        by: Kind of computation.
        share: Fraction of the patches that were computed.
        error: True error.
        estimated: Estimated error; infinite for a frame that does not claim to be kept.
        ms: Milliseconds of the stream, with the alignment.
        align_ms: Milliseconds of the alignment.
        dense_ms: Milliseconds of the dense model, of the frames on which it was timed.
    """

    by: list[str] = dataclasses.field(default_factory=list)
    share: list[float] = dataclasses.field(default_factory=list)
    error: list[float] = dataclasses.field(default_factory=list)
    estimated: list[float] = dataclasses.field(default_factory=list)
    ms: list[float] = dataclasses.field(default_factory=list)
    align_ms: list[float] = dataclasses.field(default_factory=list)
    dense_ms: list[float] = dataclasses.field(default_factory=list)

    def row(self) -> dict[str, Any]:
        """Return the figures, without the first frame."""
        error, claims = np.array(self.error[1:]), np.array(self.estimated[1:]) <= 1 - AT_LEAST
        wrong = error > 1 - AT_LEAST + TOLERANCE
        longest = run = 0
        for one in wrong:
            run = run + 1 if one else 0
            longest = max(longest, run)
        return {
            "frames": len(error),
            "claims": int(claims.sum()),
            "bad_claims": int((wrong & claims).sum()),
            "worst_claim": 1 - float(error[claims].max(initial=0)),
            "mean": 1 - float(error.mean()),
            "longest_wrong": longest,
            **{f"{kind}_frames": self.by[1:].count(kind) for kind in ("incremental", "full", "fallback")},
            "share": float(np.mean(self.share[1:])),
            "ms": float(np.mean(self.ms[1:])),
            "align_ms": float(np.mean(self.align_ms[1:])) if self.align_ms else 0.0,
            "dense_ms": float(np.median(self.dense_ms)),
            "times": float(np.median(self.dense_ms) / np.mean(self.ms[1:])),
        }


class Truth:
    """Tokens of the dense model, kept in a folder if one is given."""

    def __init__(self, session: se.Session, cache: Path | None) -> None:
        self._session, self._cache = session, cache
        if cache:
            cache.mkdir(parents=True, exist_ok=True)

    def __call__(self, image: Array, case: Case) -> Array:
        """Return the tokens for a frame, and time the model as often as is needed."""
        kept = self._cache and self._cache / f"{hashlib.blake2b(image.tobytes(), digest_size=12).hexdigest()}.npy"
        tokens: Array | None = None
        if kept and kept.exists():
            tokens = np.load(kept).astype(np.float32)
        if tokens is None or len(case.by) % EVERY == 0:
            outputs: dict[str, Array] = {}
            case.dense_ms += call_ms(lambda: outputs.update(self._session.infer({"image": image})), 1)
            if tokens is None:
                tokens = outputs["tokens"]
                if kept:
                    np.save(kept, tokens.astype(np.float16))
        return tokens


def judged(session: se.Session, truth: Truth, frames: Iterator[Array], moving: bool) -> Case:
    """Run a stream over frames and compare each with the dense model on the same pixels.

    Args:
        session: Session of the bundle.
        truth: Dense model.
        frames: Frames, uint8 [H,W,3].
        moving: Whether to align the frames.
    """
    stream, case = session.stream(AT_LEAST), Case()
    aligner = Aligner((SIDE, SIDE), stream.grid) if moving else None
    for frame in frames:
        image, moved = frame, (0, 0)
        answer: dict[str, Array] = {}
        taken = 0.0
        if aligner:
            aligned: list[Any] = []
            case.align_ms += call_ms(lambda: aligned.append(aligner.align(frame)), 1)  # noqa: B023
            image, moved, taken = aligned[-1].image, aligned[-1].moved, case.align_ms[-1]
        dense = truth(image[None], case)
        taken += call_ms(lambda: answer.update(stream.infer({"image": image[None]}, moved)), 1)[0]  # noqa: B023
        case.ms.append(taken)
        computed = stream.computed
        assert computed is not None
        case.by.append(computed.by)
        case.share.append(computed.share)
        case.error.append(float((1 - cosine(answer["tokens"], dense)[0, PREFIX:]).mean()))
        case.estimated.append(np.inf if computed.error is None else computed.error)
    return case


def cases(chosen: str, only: str) -> Iterator[tuple[str, Iterator[Array], bool]]:
    """Yield name, frames and whether the camera moves."""
    for name in SCENES:
        for speed in SPEEDS:
            if only in f"{name}, {speed}":
                yield f"{name}, {speed}", scene_frames(chosen, name, speed), False
    for name in MOTIONS:
        for number in range(len(PHOTOGRAPHS[chosen])):
            if only in f"{name}, {number}":
                yield f"{name}, {number}", (frame for frame, _ in moving_frames(chosen, name, number)), True


@click.command()
@click.option("--set", "chosen", type=click.Choice(list(PHOTOGRAPHS)), default="publication", show_default=True)
@click.option("--only", default="", help="Part of the name of a case.")
@click.option("--backend", type=click.Choice(["onnxruntime", "openvino"]), default="onnxruntime", show_default=True)
@click.option("--cache", type=click.Path(path_type=Path), help="Folder for answers of the dense model.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Summary file.")
def main(chosen: str, only: str, backend: str, cache: Path | None, output: Path | None) -> None:
    """Measure a stream in hard scenes and with a moving camera."""
    rows = dict[str, dict[str, Any]]()
    with tempfile.TemporaryDirectory() as scratch:
        bundle = exported("dinov2", SIDE, Path(scratch) / "bundle")
        subject = Subject(path="dinov2", sha256=bundle_hash(bundle))
        with se.open_session(bundle, Execution(backend=backend)) as session:
            truth = Truth(session, cache)
            for name, frames, moving in cases(chosen, only):
                rows[name] = judged(session, truth, frames, moving).row()
                err_console.print(name, {key: rows[name][key] for key in ("bad_claims", "worst_claim", "times")})
    head = ["claims", "bad_claims", "worst_claim", "mean", "longest_wrong", "full_frames", "fallback_frames", "times"]
    shown = [
        [name, *(f"{x:.4g}" if isinstance(x := row[key], float) else str(x) for key in head)]
        for name, row in rows.items()
    ]
    print_table(f"{chosen} set, {SIDE} px, {backend}", ["", *head], shown)
    if output:
        write_summary(output, Result("comparison", [subject], {"set": chosen, "size": SIDE}, {}, {"cases": rows}))


if __name__ == "__main__":
    main()
