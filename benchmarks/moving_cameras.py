"""Videos of a camera that shakes, sways, pans, turns or zooms over a photograph, with sensor noise and H.264.

    python benchmarks/moving_cameras.py FOLDER [--set publication]

Frames are exact up to the encoder: the same arguments give the same pixels. The command writes every eighth frame of
each motion as one picture, to look at.
"""

from __future__ import annotations

import functools
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import click
import cv2
import numpy as np
from PIL import Image

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.demo import split

SIDE, FRAMES, RATE = 518, 60, 25
NOISE = 2.0
"""Standard deviation of the pixel noise of a camera, of 255."""
CRF = "23"
"""Quality of the encoder, its own default."""
ROWS = 700
"""Height of the photograph in pixels of the frame."""
PHOTOGRAPHS = {
    "development": (
        "Wine_by_Jakkub_Mede.jpg",
        "life_by_Aitzol_Berasategi.jpg",
        "picosdeeuropa_by_Aitzol_Berasategi.jpg",
    ),
    "publication": ("casa-mila.jpg", "roman-colosseum.jpg", "oakland-zoo-otters.jpg"),
}
"""Photographs of each set; those of "development" are for training models."""
Pose = tuple[float, float, float, float]
"""Shift to the right and down in pixels, rotation in degrees, and zoom."""
Motion = Callable[[int, np.random.Generator], Pose]


def pan(pace: float) -> Motion:
    """Move to the right by so many pixels a frame."""
    return lambda number, _: (pace * number, 0.1 * pace * number, 0.0, 1.0)


def jitter(sigma: float) -> Motion:
    """Shake: independent shifts."""
    return lambda _, random: (*random.normal(0, sigma, 2), 0.0, 1.0)


def sway(number: int, _: np.random.Generator) -> Pose:
    """Sway slowly by 3 pixels, as a pole in the wind."""
    return 3 * float(np.sin(number / 8)), 1.5 * float(np.sin(number / 5.5)), 0.0, 1.0


def hand(number: int, random: np.random.Generator) -> Pose:
    """Hold it in the hand: shifts and small turns that come and go."""
    drift = 6 * float(np.sin(number / 11)), 4 * float(np.sin(number / 7 + 1))
    return drift[0] + random.normal(0, 0.5), drift[1] + random.normal(0, 0.5), 0.8 * float(np.sin(number / 9)), 1.0


def turn(pace: float) -> Motion:
    """Rotate by so many degrees a frame."""
    return lambda number, _: (0.0, 0.0, pace * number, 1.0)


def zoom(pace: float) -> Motion:
    """Zoom in by a fraction a frame."""
    return lambda number, _: (0.0, 0.0, 0.0, (1 + pace) ** number)


MOTIONS: dict[str, Motion] = {
    "jitter of 0.5 px": jitter(0.5),
    "jitter of 2 px": jitter(2.0),
    "sway of 3 px": sway,
    "pan of 1 px a frame": pan(1.0),
    "pan of 3 px a frame": pan(3.0),
    "pan of 6 px a frame": pan(6.0),
    "pan of 12 px a frame": pan(12.0),
    "in the hand": hand,
    "turn of 0.1 degrees a frame": turn(0.1),
    "turn of 0.5 degrees a frame": turn(0.5),
    "zoom of 0.1 % a frame": zoom(0.001),
    "zoom of 0.5 % a frame": zoom(0.005),
}


@functools.cache
def photograph(chosen: str, number: int) -> Array:
    """Return a photograph, uint8 RGB, `ROWS` high."""
    paths = split.training() if chosen == "development" else split.images(chosen)
    path = next(path for path in paths if path.name == PHOTOGRAPHS[chosen][number])
    image = Image.open(path).convert("RGB")
    return np.asarray(image.resize((round(ROWS * image.width / image.height), ROWS), Image.Resampling.LANCZOS))


def moving_frames(chosen: str, name: str, number: int = 0, frames: int = FRAMES) -> Iterator[tuple[Array, Pose]]:
    """Yield the frames of a motion over a photograph, uint8 [SIDE,SIDE,3], and the pose of each.

    Args:
        chosen: Set of photographs.
        name: Name in `MOTIONS`.
        number: Number of the photograph.
        frames: Number of frames.
    """
    random = np.random.default_rng(zlib.crc32(f"{chosen} {name} {number}".encode()))
    photo, poses, made = photograph(chosen, number), list[Pose](), list[Array]()
    height, width = photo.shape[:2]
    for index in range(frames):
        x, y, degrees, scale = pose = MOTIONS[name](index, random)
        poses.append(pose)
        across = (width - SIDE) / 2 if not name.startswith("pan") else min(40.0, (width - SIDE) / 2)
        view = cv2.getRotationMatrix2D((SIDE / 2, SIDE / 2), degrees, 1 / scale)
        view[:, 2] += across + x, (height - SIDE) / 2 + y
        flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
        frame = cv2.warpAffine(photo, view, (SIDE, SIDE), flags=flags, borderMode=cv2.BORDER_REFLECT)
        made.append((frame + random.normal(0, NOISE, frame.shape)).clip(0, 255).astype(np.uint8))
    yield from zip(_coded(made), poses, strict=True)


def _coded(frames: list[Array]) -> list[Array]:
    """Return frames after H.264."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as out:
        stream = out.add_stream("libx264", rate=RATE, options={"crf": CRF})
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        out.mux(stream.encode(None))
    file.seek(0)
    with av.open(file) as read:
        return [frame.to_ndarray(format="rgb24") for frame in read.decode(video=0)]


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--set", "chosen", type=click.Choice(list(PHOTOGRAPHS)), default="publication", show_default=True)
def main(folder: Path, chosen: str) -> None:
    """Write a picture of each motion."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in MOTIONS:
        for number in range(len(PHOTOGRAPHS[chosen])):
            shown = [frame for frame, _ in moving_frames(chosen, name, number)][::8]
            sheet = np.concatenate([frame[::2, ::2] for frame in shown], 1)
            Image.fromarray(sheet).save(folder / f"{name}, {number}.png".replace(" ", "_"))
        click.echo(name)


if __name__ == "__main__":
    main()
