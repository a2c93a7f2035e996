"""Makes images with exact masks: Tux Paint's stamps, cut out by their transparency, on publication photographs.

    python benchmarks/stamps.py -o FOLDER [--count 200] [--size 518]

FOLDER/images and FOLDER/masks hold one PNG each under one name, for `evaluate --metric task --masks`. The images are
seeded; nothing was tuned, trained or calibrated on either. Needs the Debian packages tuxpaint-stamps-default, opencv-
doc and budgie-backgrounds.
"""

from __future__ import annotations

import random
from pathlib import Path

import click
import numpy as np
from PIL import Image

from sparsifiner_edge.demo import split
from sparsifiner_edge.images import load_image

STAMPS = Path("/usr/share/tuxpaint/stamps")
LEAST_SIDE, SHARES = 60, (0.15, 0.95)
"""Minimum side of a stamp, and bounds of its opaque share: others are backgrounds or lines."""
SCALES = (0.35, 0.6)
"""Longer side of a pasted stamp, as a share of the image's."""


def usable() -> list[Path]:
    """Return stamps whose transparency cuts something out."""
    found = []
    for path in sorted(STAMPS.rglob("*.png")):
        with Image.open(path) as stamp:
            if "A" not in stamp.convert("RGBA").getbands() or stamp.mode not in ("RGBA", "LA", "P", "PA"):
                continue
            alpha = np.asarray(stamp.convert("RGBA"))[..., 3] > 127
        if min(alpha.shape) >= LEAST_SIDE and SHARES[0] <= alpha.mean() <= SHARES[1]:
            found.append(path)
    return found


def write(folder: Path, count: int, size: int, seed: int = 0) -> None:
    """Write `count` images and their masks."""
    if not STAMPS.is_dir():
        raise click.UsageError(f"{STAMPS} is missing: apt-get install tuxpaint-stamps-default")
    draw = random.Random(seed)
    stamps, photographs = draw.sample(usable(), count), split.images("publication")
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(stamps):
        photograph = photographs[number % len(photographs)]
        scene = Image.fromarray(load_image(photograph, size)).convert("RGBA")
        with Image.open(path) as opened:
            stamp = opened.convert("RGBA")
        factor = draw.uniform(*SCALES) * size / max(stamp.size)
        stamp = stamp.resize([max(1, round(side * factor)) for side in stamp.size], Image.Resampling.LANCZOS)
        place = draw.randrange(size - stamp.width + 1), draw.randrange(size - stamp.height + 1)
        scene.alpha_composite(stamp, place)
        mask = Image.new("L", scene.size)
        mask.paste(stamp.getchannel("A").point(lambda value: 255 if value > 127 else 0), place)
        name = f"{number:03d}_{photograph.stem}_{path.stem}.png"
        scene.convert("RGB").save(folder / "images" / name)
        mask.save(folder / "masks" / name)


@click.command()
@click.option("--count", default=200, show_default=True)
@click.option("--size", default=518, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
def main(count: int, size: int, output: Path) -> None:
    """Write images with exact masks."""
    write(output, count, size)
    click.echo(f"{output}: {count} images and masks")


if __name__ == "__main__":
    main()
