"""How a bundle keeps up with a camera: frames come at a constant rate, whether the last one is answered or not.

As in MLPerf's scenario of a constant stream: a frame that comes while another is being answered waits; where another
comes meanwhile, the newest is answered next and the others are missed. Frames are decoded before, and all are others.
"""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import numpy as np

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.bounds import MOST_SECONDS
from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.camera.fidelity import images_of
from sparsifiner_edge.camera.model import Model
from sparsifiner_edge.camera.service import RunOptions, open_model
from sparsifiner_edge.config import require
from sparsifiner_edge.errors import ImageError
from sparsifiner_edge.execution import ON_PROCESSOR
from sparsifiner_edge.profiles.sensors import Energy, Recording, energy, find_sensor
from sparsifiner_edge.profiles.sensors.recording import Window
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.records import MISSING, Known, Unavailable
from sparsifiner_edge.results import Result
from sparsifiner_edge.runtime.session import Runtime

MOST_HELD = 2 << 30
"""Bytes of decoded frames."""
_WARM_UP, _IDLE_S, _LEAST_FRAMES = 3, 2.0, 5


class PaceMethod(msgspec.Struct, frozen=True, kw_only=True):
    """How frames came, and what answered them; whether as a stream, and why not where the bundle has one."""

    video: str
    rate: float
    deadline_ms: float
    preprocessing: str
    runtime: Runtime
    stream: bool
    why_whole: str | None = None


class PaceFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Of all frames.

    Attributes:
        missed: share of those that were answered later than the deadline after they came, or not at all: dropped, of
            which there are so many.
        age_ms: from the coming of a frame to its answer; infer_ms: of that, the answering itself: by percentile.
        energy: of the machine's whole time, idle included, by the frame that came.
    """

    frames: int
    dropped: int
    missed: float
    age_ms: dict[str, float]
    infer_ms: dict[str, float]
    energy: Known[Energy]


class PaceResult(Result, frozen=True):
    """Of kind "pace"; samples: "age_ms" and "infer_ms" of each frame that was answered."""

    method: PaceMethod
    samples: dict[str, list[float]]
    statistics: PaceFigures


def profile_camera(
    bundle: str | Path,
    video: str | Path,
    options: RunOptions | None = None,
    *,
    rate: float = 25.0,
    deadline_ms: float | None = None,
    seconds: float = 10.0,
    progress: Progress | None = None,
) -> PaceResult:
    """Answer a video's frames as they come from a camera, and tell how many answers are late.

    Args:
        bundle: what answers; as a stream where it has one. video: a video, or a folder of a camera's images.
        options: of these execution, fit, region, stream, at_least and share. rate: frames a second.
        deadline_ms: from a frame's coming to its answer; None: the time until the next one comes.
        seconds: for so long, or until the video ends. progress: see `Progress`.

    Raises:
        ConfigError: a number is out of range, or so many frames do not fit into memory.
        ImageError: the video cannot be read, or is too short.
        SparsifinerError: the bundle or backend is unusable.

    Example:
        >>> profile_camera("bundle", "images", rate=100, deadline_ms=5000).statistics.frames
        6
    """
    options = options or RunOptions()
    require(0 < rate <= 1000, f"rate is {rate}.", "Give frames a second, at most 1000.")
    deadline = 1e3 / rate if deadline_ms is None else deadline_ms
    require(0 < deadline <= 1e3 * MOST_SECONDS, f"deadline_ms is {deadline_ms}.", "Give milliseconds.")
    require(0 < seconds <= MOST_SECONDS, f"seconds is {seconds}.", "Give seconds.")
    with open_model(Path(bundle), options) as model:
        if options.stream:
            model.follow(options.at_least, options.share)
        images = _decode(model, str(video), max(_LEAST_FRAMES, round(seconds * rate)))
        for image in images[:_WARM_UP]:
            model.infer_frame(image)
        on = "cpu" if model.session.backend in ON_PROCESSOR else "gpu"
        with Recording(find_sensor(on=on)) as recording:
            if recording.sensor.available:
                recording.stay_idle(_IDLE_S)
            samples, window = _answer_all(model, images, rate, progress)
        joules: Known[Energy] = Unavailable(recording.sensor.total.removeprefix(f"{MISSING}: "))
        if recording.sensor.available:
            joules = energy(recording, [window], len(images))
        method = PaceMethod(
            video=Path(video).name,
            rate=rate,
            deadline_ms=deadline,
            preprocessing=str(model.framing),
            runtime=model.runtime,
            stream=model.stream is not None,
            why_whole=model.whole,
        )
    ages, dropped = np.array(samples["age_ms"]), len(images) - len(samples["age_ms"])
    figures = PaceFigures(
        frames=len(images),
        dropped=dropped,
        missed=(dropped + int((ages > deadline).sum())) / len(images),
        age_ms=_percentiles(samples["age_ms"]),
        infer_ms=_percentiles(samples["infer_ms"]),
        energy=joules,
    )
    return PaceResult("pace", [open_bundle(Path(bundle)).subject("subject")], method, samples, figures)


def _decode(model: Model, video: str, count: int) -> list[Array]:
    images = list[Array]()
    for image in images_of(model, video, count):
        images.append(image)
        require(len(images) * image.nbytes <= MOST_HELD, "So many frames take 2 GiB.", "Give fewer seconds.")
    if len(images) < _LEAST_FRAMES:
        raise ImageError(f"{video} has {len(images)} frames.", f"Give one of {_LEAST_FRAMES} or more.")
    return images


def _answer_all(
    model: Model, images: list[Array], rate: float, progress: Progress | None
) -> tuple[dict[str, list[float]], Window]:
    """Milliseconds of each frame that was answered, and when all this was."""
    ages, taken, number, follows = list[float](), list[float](), 0, False
    begin_ns = time.monotonic_ns()
    begin = begin_ns / 1e9
    while number < len(images):
        comes = begin + number / rate
        if (wait := comes - time.monotonic()) > 0:
            time.sleep(wait)
        began = time.monotonic()
        model.infer_frame(images[number], follows)
        taken.append((time.monotonic() - began) * 1e3)
        ended, follows = time.monotonic(), True
        ages.append((ended - comes) * 1e3)
        if progress:
            progress("frames", number + 1, len(images))
        # The newest that has come by now; one that is to come where there is none.
        number = max(number + 1, min(int((ended - begin) * rate), len(images) - 1))
    return {"age_ms": ages, "infer_ms": taken}, (begin_ns, time.monotonic_ns())


def _percentiles(values: list[float]) -> dict[str, float]:
    marks = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999}
    return {name: float(np.quantile(values, mark)) for name, mark in marks.items()}
