"""Which images are for what. Training, calibration, benchmarks and tests take their images from here.

- `calibration`, `training`: predictors and students learn from these.
- `development`: rules and defaults are chosen by these eight.
- `publication`: figures are published for these alone; nothing is tuned, trained or calibrated on them. Two whole
  packages, opencv-doc and budgie-backgrounds, are set apart for that, and the stamps of tuxpaint-stamps-default for
  tasks with a ground truth.

A test holds the sets apart, resized copies included.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from sparsifiner_edge.errors import ImageError, MissingExtraError
from sparsifiner_edge.images import list_images

DEVELOPMENT = {
    "skimage": ("coffee.png", "astronaut.png", "chelsea.png", "motorcycle_left.png", "rocket.jpg", "retina.jpg"),
    "sklearn": ("china.jpg", "flower.jpg"),
}
CALIBRATION = {
    "skimage": (
        "camera.png", "coins.png", "brick.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png",
        "clock_motion.png", "moon.png", "horse.png",
    ),
    "matplotlib": ("grace_hopper.jpg",),
}  # fmt: skip
PUBLICATION = {
    "opencv-doc": (
        "aero1.jpg", "aloeL.jpg", "apple.jpg", "baboon.jpg", "basketball1.png", "board.jpg", "box_in_scene.png",
        "building.jpg", "butterfly.jpg", "chicky_512.png", "ela_original.jpg", "fruits.jpg", "graf1.png", "home.jpg",
        "left.jpg", "leuvenA.jpg", "messi5.jpg", "orange.jpg", "rubberwhale1.png", "squirrel_cls.jpg",
    ),
    "budgie-backgrounds": (
        "beacon-street-sunset.jpg", "blue-periwinkle.jpg", "canyon-wren.jpg", "casa-mila.jpg",
        "extreme-desert-hike.jpg", "high-trestle-trail.jpg", "lake-sherburne.jpg", "oakland-zoo-otters.jpg",
        "perched-osprey.jpg", "piazza-gae-aulenti.jpg", "roman-colosseum.jpg", "singaporean-cityscape.jpg",
        "tea-gardens.jpg",
    ),
}  # fmt: skip
"""The photographs of the two packages; what is drawn, rendered or of a screen is left out."""
TRAINING = (
    "gnome-backgrounds", "lomiri-wallpapers-16.04", "lomiri-wallpapers-20.04", "mate-backgrounds",
    "plasma-workspace-wallpapers", "ukui-wallpapers",
)  # fmt: skip
"""Debian packages whose photographs are trained on."""
_FOLDERS = {
    "skimage": "data",
    "sklearn": "datasets/images",
    "matplotlib": "mpl-data/sample_data",
    "opencv-doc": "/usr/share/doc/opencv-doc/examples/data",
    "budgie-backgrounds": "/usr/share/backgrounds/budgie",
}
_PACKAGES = {"skimage": "scikit-image", "sklearn": "scikit-learn", "matplotlib": "matplotlib"}
_WALLPAPERS = (Path("/usr/share/backgrounds"), Path("/usr/share/wallpapers"))
LEAST_BYTES = 60_000
"""What a photograph to train on has at least; screenshots and thumbnails have less."""


def development() -> list[Path]:
    """The eight photographs that rules and defaults are chosen by.

    Raises:
        MissingExtraError: a package that carries them is not installed.
    """
    return _paths(DEVELOPMENT)


def calibration() -> list[Path]:
    """The images that predictors are calibrated on.

    Raises:
        MissingExtraError: a package that carries them is not installed.
    """
    return _paths(CALIBRATION)


def publication() -> list[Path]:
    """The photographs that figures are published for.

    Raises:
        ImageError: a package that carries them is not installed.
    """
    return _paths(PUBLICATION)


def training() -> list[Path]:
    """Photographs to train on, of those packages of `TRAINING` that are installed; none that is for publication.

    Raises:
        ImageError: hardly any is installed.
    """
    apart = Path(_FOLDERS["budgie-backgrounds"])
    found = [path for folder in _WALLPAPERS if folder.is_dir() for path in list_images(folder)]
    large = [
        path
        for path in found
        if not path.is_symlink()
        and path.stat().st_size > LEAST_BYTES
        and "screenshot" not in path.name
        and apart not in path.parents
    ]
    if len(large) < 40:
        raise ImageError(f"Only {len(large)} photographs are installed.", f"apt-get install {' '.join(TRAINING)}")
    return large


def _paths(wanted: dict[str, tuple[str, ...]]) -> list[Path]:
    found = [folder / name for package, names in wanted.items() for folder in (_folder(package),) for name in names]
    missing = next((path for path in found if not path.is_file()), None)
    if missing is not None:
        raise ImageError(f"{missing} is not there.", f"apt-get install {' '.join(PUBLICATION)}")
    return found


def _folder(package: str) -> Path:
    folder = Path(_FOLDERS[package])
    return folder if folder.is_absolute() else home(package) / folder


def home(package: str) -> Path:
    """Folder of an installed Python package, found without importing it.

    Raises:
        MissingExtraError: it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(_PACKAGES.get(package, package.replace("_", "-")), "demo")
    return Path(spec.submodule_search_locations[0])
