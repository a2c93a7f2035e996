"""Measurement of how a bundle keeps up with a camera: frames arrive at a constant rate, whatever the model is doing.

As in MLPerf's constant-stream scenario, a frame that arrives while another one is being answered waits. If a further
frame arrives meanwhile, the newest one is answered next and the others are missed. Frames are decoded beforehand, and
no frame is used twice.
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
"""Most bytes of decoded frames that are held in memory."""
_WARM_UP = 3
"""Frames answered before the measurement."""
_IDLE_S = 2.0
"""Seconds for which idle power is recorded before the measurement."""
_LEAST_FRAMES = 5
"""Fewest frames for a result."""


class PaceMethod(msgspec.Struct, frozen=True, kw_only=True):
    """Setup of the measurement.

    Attributes:
        video: Name of the video.
        rate: Frames per second.
        deadline_ms: Deadline from the arrival of a frame to its answer, in milliseconds.
        preprocessing: How frames were brought to the input size.
        runtime: What ran the model.
        stream: Whether streaming inference was used.
        why_whole: Why it was not used although the bundle supports it.
    """

    video: str
    rate: float
    deadline_ms: float
    preprocessing: str
    runtime: Runtime
    stream: bool
    why_whole: str | None = None


class PaceFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Figures over all frames. Percentiles are "p50", "p99" and "p99.9".

    Attributes:
        frames: Number of frames that arrived.
        dropped: Number of frames that were not answered.
        missed: Share of the frames that were dropped, or answered after the deadline.
        age_ms: Percentiles of the time from the arrival of a frame to its answer, in milliseconds.
        infer_ms: Percentiles of the inference time within it, in milliseconds.
        energy: Energy of the machine per arrived frame, over the whole time including idle time.
    """

    frames: int
    dropped: int
    missed: float
    age_ms: dict[str, float]
    infer_ms: dict[str, float]
    energy: Known[Energy]


class PaceResult(Result, frozen=True):
    """Result of kind "pace". Samples are "age_ms" and "infer_ms" of each answered frame."""

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
    """Answer the frames of a video at the rate of a camera, and measure how many answers miss a deadline.

    Args:
        bundle: Bundle to measure; uses streaming inference if the bundle supports it.
        video: Video, or a folder of a camera's images.
        options: Used fields: execution, fit, region, stream, at_least, share and stabilise.
        rate: Frames per second.
        deadline_ms: Deadline from the arrival of a frame to its answer in milliseconds; None for the time until the
            next frame arrives.
        seconds: Duration of the measurement; it ends earlier if the video does.
        progress: See `Progress`.

    Returns:
        A result of kind "pace".

    Raises:
        ConfigError: A number is out of range, or the frames do not fit into memory.
        ImageError: The video cannot be read, or is too short.
        SparsifinerError: The bundle or backend is unusable.

    Example:
        >>> profile_camera("bundle", "images", rate=100, deadline_ms=5000).statistics.frames
        9
    """
    options = options or RunOptions()
    require(0 < rate <= 1000, f"rate is {rate}.", "Give frames per second, above 0 and at most 1000.")
    deadline = 1e3 / rate if deadline_ms is None else deadline_ms
    require(
        0 < deadline <= 1e3 * MOST_SECONDS,
        f"deadline_ms is {deadline_ms}.",
        f"Give milliseconds above 0, at most {1e3 * MOST_SECONDS:g}.",
    )
    require(0 < seconds <= MOST_SECONDS, f"seconds is {seconds}.", f"Give seconds above 0, at most {MOST_SECONDS:g}.")
    with open_model(Path(bundle), options) as model:
        if options.stream:
            model.follow(options.at_least, options.share, options.stabilise)
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
            why_whole=model.why_whole,
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
    """Return up to `count` decoded inputs of the model, uint8 RGB [H,W,3]."""
    images = list[Array]()
    for image in images_of(model, video, count):
        images.append(image)
        require(len(images) * image.nbytes <= MOST_HELD, "The decoded frames exceed 2 GiB.", "Give fewer seconds.")
    if len(images) < _LEAST_FRAMES:
        raise ImageError(f"{video} has {len(images)} frames.", f"Give a video of at least {_LEAST_FRAMES} frames.")
    return images


def _answer_all(
    model: Model, images: list[Array], rate: float, progress: Progress | None
) -> tuple[dict[str, list[float]], Window]:
    """Return the ages and inference times of the answered frames in milliseconds, and the time window of the run."""
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
        # The newest frame that has arrived by now; if there is none, the next one to arrive.
        number = max(number + 1, min(int((ended - begin) * rate), len(images) - 1))
    return {"age_ms": ages, "infer_ms": taken}, (begin_ns, time.monotonic_ns())


def _percentiles(values: list[float]) -> dict[str, float]:
    """Return the 50th, 99th and 99.9th percentile."""
    marks = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999}
    return {name: float(np.quantile(values, mark)) for name, mark in marks.items()}
