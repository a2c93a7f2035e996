"""Makes fixed-camera videos from photographs: moving pieces, drifting light, sensor noise, H.264.

    python benchmarks/stream_scenes.py FOLDER [--set publication] [--frames 300]

Pieces of other photographs move over a still one. The result depends only on the arguments.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
from PIL import Image

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.demo import split
from sparsifiner_edge.fitting import Framing
from sparsifiner_edge.images import load_image

SIDE, RATE = 720, 25
"""Side of a square frame in pixels; frames per second."""
NOISE, DRIFT, PERIOD_S = 3.0, 0.15, 20.0
"""Standard deviation of pixel noise (of 255); gain drift from end to end; seconds of a drift cycle, there and back."""


class Scene(NamedTuple):
    """A background, the moving pieces by the photographs' file names, and the area share of each."""

    background: str
    pieces: tuple[str, ...]
    area: float


SCENES = {
    "publication": {
        "square": Scene("piazza-gae-aulenti.jpg", ("chicky_512.png",), 0.02),
        "street": Scene("casa-mila.jpg", ("fruits.jpg", "messi5.jpg"), 0.025),
        "garden": Scene("tea-gardens.jpg", ("messi5.jpg", "butterfly.jpg", "squirrel_cls.jpg"), 0.033),
    },
    "development": {
        "temple": Scene("china.jpg", ("astronaut.png",), 0.02),
        "table": Scene("coffee.png", ("chelsea.png", "flower.jpg", "rocket.jpg"), 0.033),
    },
}


def scene_frames(scene: Scene, chosen: str, count: int) -> Iterator[Array]:
    """Yield uint8 [SIDE,SIDE,3]. chosen: the set of photographs."""
    random, files = np.random.default_rng(0), {path.name: path for path in split.images(chosen)}
    still = load_image(files[scene.background], Framing(SIDE)).astype(np.float32)
    side = round(SIDE * float(np.sqrt(4 / np.pi * scene.area)))
    pieces = [load_image(files[name], Framing(side)).astype(np.float32) for name in scene.pieces]
    across = np.linspace(-1, 1, side)
    cover = np.clip((1 - np.hypot(across[:, None], across)) * side / 4, 0, 1)[..., None].astype(np.float32)
    begin, speed = random.uniform(0, 2, (2, len(pieces), 2))
    for number in range(count):
        seconds = number / RATE
        frame = still.copy()
        # Back and forth, each at its own speed: a tenth to three tenths of the frame per second, with a rest at each
        # end.
        phase = begin + (0.1 + 0.1 * speed) * seconds
        places = np.clip(0.55 - 0.6 * np.cos(np.pi * phase), 0, 1) * (SIDE - side)
        for piece, (top, left) in zip(pieces, places.astype(int), strict=True):
            part = frame[top : top + side, left : left + side]
            part += cover * (piece - part)
        gain = 1 + DRIFT * (abs((seconds / PERIOD_S + 0.5) % 2 - 1) - 0.5)
        noisy = frame * gain + random.normal(0, NOISE, frame.shape)
        yield noisy.clip(0, 255).astype(np.uint8)


def write_scene(scene: Scene, chosen: str, count: int, path: Path) -> Path:
    """Encode a scene."""
    import av

    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=RATE, options={"crf": "28"})
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        for picture in scene_frames(scene, chosen, count):
            file.mux(stream.encode(av.VideoFrame.from_image(Image.fromarray(picture))))
        file.mux(stream.encode(None))
    return path


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--set", "chosen", type=click.Choice(list(SCENES)), default="publication", show_default=True)
@click.option("--frames", default=300, show_default=True)
def main(folder: Path, chosen: str, frames: int) -> None:
    """Write each scene of a set as NAME.mp4."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, scene in SCENES[chosen].items():
        click.echo(write_scene(scene, chosen, frames, folder / f"{name}.mp4"))


if __name__ == "__main__":
    main()
