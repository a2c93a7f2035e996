"""What tests are made from: images, weights and keys, as fixtures in `conftest.py` and as good examples of `fuzz`.

What is heavy is imported where it is used: some tests run without it.
"""

from __future__ import annotations

from pathlib import Path


def draw_pictures(folder: Path) -> None:
    """Three small images: picture0.png and so on."""
    import numpy as np
    from PIL import Image

    folder.mkdir(exist_ok=True)
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (60 + number, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"picture{number}.png")


def draw_classes(folder: Path) -> None:
    """Twelve smooth images in two classes."""
    import numpy as np
    from PIL import Image

    for number in range(12):
        coarse = np.random.default_rng(number).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        path = folder / ("cats" if number % 2 else "dogs") / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse).resize((180, 170), Image.Resampling.BICUBIC).save(path)


def save_weights(path: Path, classes: int) -> None:
    """Of the smallest model of timm; 0 classes: without classifier."""
    import safetensors.torch

    from tests.models import vit

    safetensors.torch.save_file(vit(num_classes=classes).state_dict(), path)


def make_keys(folder: Path) -> None:
    """key.pem, key.pub, other.pem, other.pub."""
    from sparsifiner_edge.bundle.sign import generate_key

    for name in ("key", "other"):
        generate_key(folder / f"{name}.pem")
