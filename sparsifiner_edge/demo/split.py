"""Split of the images (`split.toml`) into sets for training, calibration, benchmarks and tests.

Two complete packages, opencv-doc and budgie-backgrounds, are reserved for published figures. Nothing is tuned, trained
or calibrated on them. The stamps of tuxpaint-stamps-default are reserved in the same way for tasks with a ground truth.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from sparsifiner_edge.artifacts import read_toml
from sparsifiner_edge.errors import ImageError, MissingExtraError, pip_install
from sparsifiner_edge.images import list_images

SETS: dict[str, dict[str, Any]] = read_toml(Path(__file__).with_name("split.toml"), "Install this package again.")
"""Content of split.toml: files by set and package, and the folder of each package."""
TRAINING = (
    "gnome-backgrounds",
    "lomiri-wallpapers-16.04",
    "lomiri-wallpapers-20.04",
    "mate-backgrounds",
    "plasma-workspace-wallpapers",
    "ukui-wallpapers",
)
"""Debian packages with photographs for training."""
_PACKAGES = {"skimage": "scikit-image", "sklearn": "scikit-learn"}
"""PyPI names of packages whose import name differs."""
_WALLPAPERS = (Path("/usr/share/backgrounds"), Path("/usr/share/wallpapers"))
"""Folders into which Debian packages install photographs."""
LEAST_BYTES = 60_000
"""Smallest file size of a photograph for training; screenshots and thumbnails are smaller."""


def images(name: str) -> list[Path]:
    """Return the files of a set.

    Args:
        name: "development" for choosing rules and defaults, "calibration" for predictors, "publication" for published
            figures, or "searched" and "shown" for the demonstration.

    Raises:
        MissingExtraError: If a Python package with some of the images is not installed.
        ImageError: If a file is missing, for instance because a Debian package is not installed.
    """
    files = [
        (Path(where) if (where := SETS["folders"][package]).startswith("/") else home(package) / where) / file
        for package, names in SETS[name].items()
        for file in names
    ]
    if missing := next((path for path in files if not path.is_file()), None):
        debian, apt = missing.is_relative_to("/usr/share"), f"apt-get install {' '.join(SETS['publication'])}"
        raise ImageError(f"{missing} does not exist.", apt if debian else pip_install("demo"))
    return files


def training() -> list[Path]:
    """Return the photographs for training from the installed packages, without those reserved for publication.

    Raises:
        ImageError: If fewer than 40 photographs are installed.
    """
    reserved = Path(SETS["folders"]["budgie-backgrounds"])
    large = [
        path
        for folder in _WALLPAPERS
        if folder.is_dir()
        for path in list_images(folder)
        if not path.is_symlink()
        and path.stat().st_size > LEAST_BYTES
        and "screenshot" not in path.name
        and reserved not in path.parents
    ]
    if len(large) < 40:
        raise ImageError(f"Only {len(large)} photographs are installed.", f"apt-get install {' '.join(TRAINING)}")
    return large


def home(package: str) -> Path:
    """Return the folder of an installed Python package without importing it.

    Raises:
        MissingExtraError: If the package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(_PACKAGES.get(package, package.replace("_", "-")), "demo")
    return Path(spec.submodule_search_locations[0])
