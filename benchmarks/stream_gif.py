"""Draw docs/stream.gif: the dense model and a stream answer the same camera, each at its real rate.

    python benchmarks/stream_gif.py -o docs/stream.gif

A fixed camera sees a cat move over a lawn (scikit-image's `chelsea` and `grass`, CC0) at 25 frames per second. Both
models find the subject. Each takes the newest frame as soon as it has answered the last one, so a slow model shows an
old answer. Times are measured while the script runs: use an idle machine. The dense model runs in its fastest fp32
engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import click
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from skimage import data
from stream import exported

import sparsifiner_edge as se
from sparsifiner_edge.arrays import Array
from sparsifiner_edge.fitting import Framing
from sparsifiner_edge.images import fit_image

SIZE = 518
PANEL = 320
"""Pixels of a panel's side."""
PICTURE_S = 0.1
"""Seconds between pictures of the GIF."""
RATE = 25
"""Frames per second of the camera."""
DIAMETER = 140
"""Pixels of the cat, of `SIZE`."""
NOISE = 2.0
"""Standard deviation of the sensor noise, of 255."""
TINT = np.array([230, 60, 40], np.float32)
"""Colour of the subject that a model finds."""
COLORS = 96
"""Colours of the GIF's palette: more make the file larger, and no clearer."""


class Answer(NamedTuple):
    """An answer and when it was ready.

    Attributes:
        at_s: Seconds since the camera started.
        frame: Number of the frame that was answered.
        ms: Milliseconds that the answer took.
        saliency: Map of the subject, [H,W], 0 to 1.
        computed: Share of the patches that were computed.
    """

    at_s: float
    frame: int
    ms: float
    saliency: Array
    computed: float


def scene(count: int) -> list[Array]:
    """Return frames uint8 [SIZE,SIZE,3] of a cat that moves over a lawn."""
    random = np.random.default_rng(0)
    lawn = Image.fromarray(data.grass()).convert("RGB").resize((SIZE, SIZE))
    cat = Image.fromarray(data.chelsea()[20:280, 90:350]).resize((DIAMETER, DIAMETER))
    cover = Image.new("L", cat.size)
    ImageDraw.Draw(cover).ellipse((2, 2, DIAMETER - 2, DIAMETER - 2), fill=255)
    frames = []
    for number in range(count):
        angle, frame = 2 * np.pi * number / (12 * RATE), lawn.copy()
        centre = SIZE / 2 + 130 * np.array([np.cos(angle), np.sin(angle)])
        frame.paste(cat, tuple(int(x) for x in centre - DIAMETER / 2), cover.filter(ImageFilter.GaussianBlur(2)))
        noisy = np.asarray(frame) + random.normal(0, NOISE, (SIZE, SIZE, 3))
        frames.append(noisy.clip(0, 255).astype(np.uint8))
    return frames


def live(pixels: list[Array], infer: Callable[[Array], tuple[Array, float]]) -> list[Answer]:
    """Answer a camera live: take the newest frame whenever the last answer is ready."""
    answers, clock = list[Answer](), 0.0
    while (number := int(clock * RATE)) < len(pixels):
        began = time.perf_counter()
        saliency, computed = infer(pixels[number])
        taken = time.perf_counter() - began
        clock = max(clock + taken, (number + 1) / RATE)
        answers.append(Answer(clock, number, 1000 * taken, saliency, computed))
    return answers


def panel(picture: Image.Image, answer: Answer | None, title: str) -> Image.Image:
    """Draw a frame, the subject that an answer found in it, and the rate."""
    shown = np.asarray(picture.resize((PANEL, PANEL)).filter(ImageFilter.GaussianBlur(0.8)), np.float32)
    if answer is not None:
        mask = Image.fromarray((answer.saliency > 0.5).astype(np.uint8) * 255).resize((PANEL, PANEL))
        share = np.asarray(mask, np.float32)[..., None] / 255 * 0.55
        shown = shown * (1 - share) + TINT * share
    image = Image.new("RGB", (PANEL, PANEL + 30), "white")
    image.paste(Image.fromarray(shown.astype(np.uint8)), (0, 30))
    ImageDraw.Draw(image).text((6, 6), title, fill="black", font=ImageFont.load_default(15))
    return image


def draw(frames: list[Array], ways: dict[str, list[Answer]], path: Path) -> None:
    """Write the GIF; every way shows the answer that is ready at each moment."""
    rates = {name: 1000 / float(np.median([answer.ms for answer in answers])) for name, answers in ways.items()}
    pictures = []
    for moment in np.arange(1.0, len(frames) / RATE, PICTURE_S):
        both = Image.new("RGB", (2 * PANEL + 8, PANEL + 30), "white")
        for place, (name, answers) in enumerate(ways.items()):
            ready = [answer for answer in answers if answer.at_s <= moment]
            last = ready[-1] if ready else None
            picture = Image.fromarray(frames[last.frame if last else 0])
            title = f"{name}: {min(rates[name], RATE):.1f} answers per second"
            both.paste(panel(picture, last, title), (place * (PANEL + 8), 0))
        pictures.append(both.quantize(COLORS, dither=Image.Dither.NONE))
    pictures[0].save(
        path, save_all=True, append_images=pictures[1:], duration=int(1000 * PICTURE_S), loop=0, optimize=True
    )


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="GIF to write.")
@click.option("--seconds", default=8.0, show_default=True, help="Seconds of video.")
def main(output: Path, seconds: float) -> None:
    """Draw the dense model and a stream side by side at their measured rates."""
    frames = scene(int(seconds * RATE))
    pixels = [np.asarray(fit_image(Image.fromarray(frame), Framing(SIZE)))[None] for frame in frames]
    ways: dict[str, list[Answer]] = {}
    with TemporaryDirectory() as scratch:
        bundle = exported("saliency", SIZE, Path(scratch) / "bundle")
        for backend in ("onnxruntime", "openvino"):
            with se.open_session(bundle, se.Execution(backend=backend)) as session:
                session.infer({"image": pixels[0]})
                dense = live(pixels, lambda image, run=session: (run.infer({"image": image})["saliency"][0], 1.0))
                known = ways.get("dense")
                if known is None or np.median([a.ms for a in dense]) < np.median([a.ms for a in known]):
                    ways["dense"] = dense
        with se.open_session(bundle, se.Execution(backend="onnxruntime")) as session:
            stream = session.stream(at_least=0.98)

            def infer(image: Array) -> tuple[Array, float]:
                outputs = stream.infer({"image": image})
                return outputs["saliency"][0], stream.computed.share if stream.computed else 1.0

            for image in pixels[:5]:
                infer(image)
            ways["stream"] = live(pixels, infer)
    draw(frames, ways, output)
    for name, answers in ways.items():
        ms = float(np.median([answer.ms for answer in answers]))
        share = float(np.mean([answer.computed for answer in answers]))
        click.echo(
            f"{name}: {len(answers)} answers, median {ms:.1f} ms, {share:.0%} of the patches computed on average"
        )
    click.echo(f"written: {output}, {output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
