"""Tests that evaluation images are not among training images, not even as smaller copies.

`data/image_hashes.json` holds a hash of every image of the split, so the check runs where the packages are not
installed. After a change of the split: `python -m tests.test_split`.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparsifiner_edge.demo import split
from sparsifiner_edge.errors import ImageError

HASHES = Path(__file__).parent / "data" / "image_hashes.json"
SIDE = 16
SAME = 40
"""Maximum number of differing bits (of 256) between copies of an image; other images differ in 50 and more."""
SETS = ("development", "calibration", "publication", "training")


def hash_of(path: Path) -> int:
    """Return a difference hash: 16 x 16 bits that say if a place is brighter than its left neighbour."""
    with Image.open(path) as image:
        image.draft("L", (256, 256))
        small = image.convert("L").resize((SIDE + 1, SIDE), Image.Resampling.BOX)
    grey = np.asarray(small, dtype=np.int16)
    return int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes(), "big")


def recorded() -> dict[str, dict[str, int]]:
    content = json.loads(HASHES.read_text())
    return {name: {key: int(text, 16) for key, text in images.items()} for name, images in content.items()}


def test_no_image_is_in_two_sets() -> None:
    for (one, images), (other, others) in itertools.combinations(recorded().items(), 2):
        for (key, first), (name, second) in itertools.product(images.items(), others.items()):
            assert (first ^ second).bit_count() > SAME, f"{key} ({one}) is {name} ({other})"


def test_every_set_is_recorded_whole() -> None:
    kept = recorded()
    assert set(kept) == set(SETS)
    for name in ("development", "publication"):
        wanted = split.SETS[name]
        assert set(kept[name]) == {f"{package}/{file}" for package, files in wanted.items() for file in files}
    assert len(kept["publication"]) >= 24
    assert len(kept["training"]) >= 40
    assert not {"skimage", "sklearn"} & set(split.SETS["publication"])
    assert not set(split.TRAINING) & {"opencv-doc", "tuxpaint-stamps-default", "budgie-backgrounds"}


def paths_of(name: str) -> list[Path]:
    return split.training() if name == "training" else split.images(name)


@pytest.mark.parametrize("name", SETS)
def test_recorded_hashes_are_those_of_the_files(name: str) -> None:
    try:
        paths = paths_of(name)
    except ImageError as error:
        pytest.skip(error.what)
    kept = recorded()[name]
    for path in paths:
        assert hash_of(path) in kept.values(), f"{path} is not recorded: python -m tests.test_split"


def test_a_demonstration_judges_by_others_than_it_searches_with(monkeypatch: pytest.MonkeyPatch) -> None:
    searched, shown = split.images("searched"), split.images("shown")
    assert len(searched) >= 5
    assert not set(searched) & set(shown)
    monkeypatch.setitem(split.SETS, "shown", {"skimage": ["none.png"]})
    with pytest.raises(ImageError, match=r"\[demo\]"):
        split.images("shown")


def main() -> None:
    """Write the hashes of the installed images."""
    content = {}
    for name in SETS:
        packages = {file: package for package, files in split.SETS.get(name, {}).items() for file in files}
        content[name] = {
            f"{packages[path.name]}/{path.name}" if packages else str(path): f"{hash_of(path):064x}"
            for path in paths_of(name)
        }
    HASHES.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
