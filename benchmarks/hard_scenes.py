"""Scenes that are hard for a stream, made from photographs: events, light, weather, cuts and motion of a fixed camera.

    python benchmarks/hard_scenes.py FOLDER [--set publication]

Each scene exists slow and fast. Frames are exact: the same arguments give the same pixels. The command writes every
eighth frame of each scene as one picture, to look at.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.demo import split
from sparsifiner_edge.fitting import Framing
from sparsifiner_edge.images import load_image

SIDE, FRAMES = 518, 52
NOISE = 2.0
"""Standard deviation of the pixel noise of a camera, of 255."""
SPEEDS = {"slow": 1.0, "fast": 4.0}
PHOTOGRAPHS = {
    "development": (
        ("coffee.png", "china.jpg", "motorcycle_left.png"),
        ("astronaut.png", "chelsea.png", "flower.jpg", "rocket.jpg"),
    ),
    "publication": (
        ("piazza-gae-aulenti.jpg", "tea-gardens.jpg", "home.jpg"),
        ("messi5.jpg", "squirrel_cls.jpg", "fruits.jpg", "chicky_512.png"),
    ),
}
"""Backgrounds, and pictures of things, of each set of photographs."""


@functools.cache
def photograph(chosen: str, name: str, side: int) -> Array:
    """Return a photograph of a set as float32 [side,side,3]."""
    files = {path.name: path for path in split.images(chosen)}
    return load_image(files[name], Framing(side)).astype(np.float32)


class Stage:
    """What a scene is made of.

    Attributes:
        speed: Speed of motion; 1 is slow.
        random: Source of randomness of the scene.
    """

    def __init__(self, chosen: str, scene: str, speed: float) -> None:
        self.speed, self.random = speed, np.random.default_rng(zlib.crc32(f"{chosen} {scene} {speed}".encode()))
        self._chosen, (self._backgrounds, self._things) = chosen, PHOTOGRAPHS[chosen]
        self._first = int(self.random.integers(12))

    def background(self, number: int = 0) -> Array:
        """Return a photograph of the whole frame."""
        names = self._backgrounds
        return photograph(self._chosen, names[(self._first + number) % len(names)], SIDE).copy()

    def thing(self, side: int, number: int = 0) -> Array:
        """Return a picture of a thing."""
        names = self._things
        return photograph(self._chosen, names[(self._first + number) % len(names)], side)

    def smooth(self, low: float, high: float) -> Array:
        """Return a nearly empty frame: a brightness that varies slowly."""
        small = self.random.uniform(low, high, (3, 3, 3)).astype(np.float32)
        planes = [Image.fromarray(small[..., k]).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for k in range(3)]
        return np.stack([np.asarray(plane) for plane in planes], -1)


def put(frame: Array, thing: Array, left: float, top: float) -> Array:
    """Draw a round thing into a frame, in place; parts outside are cut."""
    side = len(thing)
    across = np.linspace(-1, 1, side)
    cover = np.clip((1 - np.hypot(across[:, None], across)) * side / 4, 0, 1)[..., None].astype(np.float32)
    x, y = round(left), round(top)
    rows, columns = slice(max(0, y), min(SIDE, y + side)), slice(max(0, x), min(SIDE, x + side))
    if rows.start < rows.stop and columns.start < columns.stop:
        inside = slice(rows.start - y, rows.stop - y), slice(columns.start - x, columns.stop - x)
        part = frame[rows, columns]
        part += cover[inside] * (thing[inside] - part)
    return frame


Scene = Callable[[Stage], Iterator[Array]]


def enters(low: float, high: float) -> Scene:
    """Something enters an empty scene of a brightness at the edge, and crosses it."""

    def frames(stage: Stage) -> Iterator[Array]:
        still, thing = stage.smooth(low, high), stage.thing(160)
        for number in range(FRAMES):
            yield put(still.copy(), thing * (high / 200), SIDE - 6 * stage.speed * max(0, number - 12), 180)

    return frames


def light(stage: Stage) -> Iterator[Array]:
    """A light is switched on, then off again."""
    still, across = stage.background(), np.linspace(-1, 1, SIDE)
    lamp = np.exp(-3 * (across[:, None] ** 2 + (across - 0.4) ** 2))[..., None].astype(np.float32)
    for number in range(FRAMES):
        on = np.clip((number - 14) * stage.speed / 4, 0, 1) - np.clip((number - 36) * stage.speed / 4, 0, 1)
        yield still * (0.35 + 0.65 * on * lamp)


def fade(stage: Stage) -> Iterator[Array]:
    """One picture fades into another."""
    before, after = stage.background(), stage.background(1)
    for number in range(FRAMES):
        part = float(np.clip((number - 8) * stage.speed / 40, 0, 1))
        yield before + part * (after - before)


def flicker(stage: Stage) -> Iterator[Array]:
    """Bands of a lamp on 50 Hz pass through the picture."""
    still, rows = stage.background(), np.arange(SIDE)[:, None, None] / SIDE
    for number in range(FRAMES):
        yield still * (1 + 0.12 * np.sin(2 * np.pi * (1.5 * rows + 0.11 * stage.speed * number))).astype(np.float32)


def cuts(gain: float, fog: float) -> Scene:
    """Cuts between scenes that are dark, or in fog."""

    def frames(stage: Stage) -> Iterator[Array]:
        every = round(16 / stage.speed)
        for number in range(FRAMES):
            yield gain * (fog * stage.background(number // every) + (1 - fog) * 150)

    return frames


def fog(stage: Stage) -> Iterator[Array]:
    """Fog rolls in until the picture is gone."""
    still = stage.background()
    for number in range(FRAMES):
        clear = float(np.clip(1 - (number - 6) * stage.speed / 44, 0.03, 1))
        yield clear * still + (1 - clear) * 170


def corner(moving: Callable[[Stage, int], Array]) -> Scene:
    """A corner always moves; then a thing appears elsewhere."""

    def frames(stage: Stage) -> Iterator[Array]:
        still, thing = stage.background(), stage.thing(120)
        for number in range(FRAMES):
            frame = still.copy()
            frame[:170, :170] = moving(stage, number)
            yield put(frame, thing, 300, 260) if number >= 30 else frame

    return frames


def leaves(stage: Stage, number: int) -> Array:
    """Return waving leaves, [170,170,3]."""
    picture, rows = stage.background(1)[:200, :200], np.arange(170)
    wave = (8 * np.sin(rows / 17 + 0.25 * stage.speed * number)).round().astype(int) + 15
    return picture[rows[:, None], wave[:, None] + rows]


def screen(stage: Stage, _: int) -> Array:
    """Return a screen without a signal, [170,170,3]."""
    cell = 10 if stage.speed > 1 else 34
    noise = stage.random.uniform(0, 255, (-(-170 // cell), -(-170 // cell), 3))
    return np.kron(noise, np.ones((cell, cell, 1)))[:170, :170].astype(np.float32)


def text(stage: Stage) -> Iterator[Array]:
    """Text scrolls over a third of the picture."""
    page, font = Image.new("RGB", (SIDE, 3000), (245, 245, 240)), ImageFont.load_default(20)
    draw = ImageDraw.Draw(page)
    for line in range(100):
        words = " ".join("".join(chr(97 + int(c)) for c in stage.random.integers(0, 26, 5)) for _ in range(8))
        draw.text((12, 28 * line), words, (20, 20, 20), font)
    lines, still = np.asarray(page, np.float32), stage.background()
    for number in range(FRAMES):
        frame, top = still.copy(), round(2 * stage.speed * number)
        frame[340:] = lines[top : top + SIDE - 340]
        yield frame


def conveyor(stage: Stage) -> Iterator[Array]:
    """Things pass on a belt."""
    still = stage.background()
    for number in range(FRAMES):
        frame = still.copy()
        frame[220:330] = 90
        for k in range(5):
            put(frame, stage.thing(96, k), (140 * k + 3 * stage.speed * number) % 700 - 96, 227)
        yield frame


def desktop(stage: Stage) -> Iterator[Array]:
    """A screen recording: windows open, a cursor moves, nothing has noise."""
    frame = np.full((SIDE, SIDE, 3), 58, np.float32)
    frame[:24] = 220
    for number in range(FRAMES):
        if number % round(16 / stage.speed) == 8 % round(16 / stage.speed):
            x, y = stage.random.integers(20, SIDE - 240, 2)
            frame[y - 14 : y, x : x + 200], frame[y : y + 150, x : x + 200] = 90, 250
            frame[y + 20 : y + 130, x + 20 : x + 130] = stage.thing(110, number // 8)
        shown = frame.copy()
        x, y = round(100 + 4 * stage.speed * number) % (SIDE - 16), 300
        shown[y : y + 14, x : x + 10] = 0
        yield shown


def moves(area: float) -> Scene:
    """Things move that cover a part of the frame."""

    def frames(stage: Stage) -> Iterator[Array]:
        count = 4
        still, side = stage.background(), round(SIDE * float(np.sqrt(4 / np.pi * area / count)))
        begin, pace = stage.random.uniform(0, 2, (2, count, 2))
        for number in range(FRAMES):
            frame, phase = still.copy(), begin + (0.1 + 0.1 * pace) * number / 25 * stage.speed
            for k, (top, left) in enumerate(np.clip(0.55 - 0.6 * np.cos(np.pi * phase), 0, 1) * (SIDE - side)):
                put(frame, stage.thing(side, k), left, top)
            yield frame

    return frames


def rain(stage: Stage) -> Iterator[Array]:
    """Rain falls: bright streaks at new places in each frame."""
    still = stage.background()
    for _ in range(FRAMES):
        frame = still.copy()
        for x, y in stage.random.integers(0, SIDE - 40, (round(60 * stage.speed), 2)):
            frame[y : y + 24, x : x + 2] += 60
        yield frame


def night(stage: Stage) -> Iterator[Array]:
    """A person walks through the noise of a night."""
    still, thing = 0.12 * stage.background(), 0.25 * stage.thing(110)
    for number in range(FRAMES):
        yield put(still.copy(), thing, 5 * stage.speed * number - 110, 250)


SCENES: dict[str, tuple[Scene, float]] = {
    "something enters at an empty wall": (enters(150, 200), NOISE),
    "something enters a grey road": (enters(80, 100), NOISE),
    "something enters the night sky": (enters(8, 22), NOISE),
    "a light is switched": (light, NOISE),
    "fade": (fade, 0.0),
    "flicker at 50 Hz": (flicker, NOISE),
    "cuts in the dark": (cuts(0.07, 1.0), 1.5),
    "cuts in fog": (cuts(1.0, 0.12), NOISE),
    "fog rolls in": (fog, NOISE),
    "leaves, then a thing": (corner(leaves), NOISE),
    "a screen, then a thing": (corner(screen), NOISE),
    "scrolling text": (text, 0.0),
    "conveyor belt": (conveyor, NOISE),
    "screen recording": (desktop, 0.0),
    "10 % moving": (moves(0.1), NOISE),
    "20 % moving": (moves(0.2), NOISE),
    "rain": (rain, NOISE),
    "a person at night": (night, 4.0),
}
"""Function and noise of each scene, by name."""


def scene_frames(chosen: str, name: str, speed: str) -> Iterator[Array]:
    """Yield the frames of a scene, uint8 [SIDE,SIDE,3].

    Args:
        chosen: Set of photographs.
        name: Name in `SCENES`.
        speed: Name in `SPEEDS`.
    """
    scene, noise = SCENES[name]
    stage = Stage(chosen, name, SPEEDS[speed])
    for frame in scene(stage):
        noisy = frame + stage.random.normal(0, noise, frame.shape) if noise else frame
        yield noisy.clip(0, 255).astype(np.uint8)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--set", "chosen", type=click.Choice(list(PHOTOGRAPHS)), default="publication", show_default=True)
def main(folder: Path, chosen: str) -> None:
    """Write a picture of each scene."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in SCENES:
        for speed in SPEEDS:
            shown = list(scene_frames(chosen, name, speed))[::8]
            sheet = np.concatenate([frame[::2, ::2] for frame in shown], 1)
            Image.fromarray(sheet).save(folder / f"{name}, {speed}.png".replace(" ", "_"))
            click.echo(f"{name}, {speed}")


if __name__ == "__main__":
    main()
