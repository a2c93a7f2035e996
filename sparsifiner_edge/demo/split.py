"""Which images are for what (`split.toml`). Training, calibration, benchmarks and tests take their images from here.

Two whole packages, opencv-doc and budgie-backgrounds, are set apart for publication: nothing is tuned, trained or
calibrated on them; and so are the stamps of tuxpaint-stamps-default for tasks with a ground truth.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from sparsifiner_edge.artifacts import read_toml
from sparsifiner_edge.errors import ImageError, MissingExtraError, pip_install
from sparsifiner_edge.images import list_images

SETS: dict[str, dict[str, Any]] = read_toml(Path(__file__).with_name("split.toml"), "Install this package again.")
TRAINING = (
    "gnome-backgrounds",
    "lomiri-wallpapers-16.04",
    "lomiri-wallpapers-20.04",
    "mate-backgrounds",
    "plasma-workspace-wallpapers",
    "ukui-wallpapers",
)
"""Debian packages whose photographs are trained on."""
_PACKAGES = {"skimage": "scikit-image", "sklearn": "scikit-learn"}
_WALLPAPERS = (Path("/usr/share/backgrounds"), Path("/usr/share/wallpapers"))
LEAST_BYTES = 60_000
"""What a photograph to train on has at least; screenshots and thumbnails have less."""


def images(name: str) -> list[Path]:
    """The files of a set: "development", by which rules and defaults are chosen; "calibration", of predictors;
    "publication", that figures are published for; "searched" and "shown" by the demonstration.

    Raises:
        MissingExtraError, ImageError: a package that carries them is not installed, of Python's or of Debian's.
    """
    files = [
        (Path(where) if (where := SETS["folders"][package]).startswith("/") else home(package) / where) / file
        for package, names in SETS[name].items()
        for file in names
    ]
    if missing := next((path for path in files if not path.is_file()), None):
        debian, apt = missing.is_relative_to("/usr/share"), f"apt-get install {' '.join(SETS['publication'])}"
        raise ImageError(f"{missing} is not there.", apt if debian else pip_install("demo"))
    return files


def training() -> list[Path]:
    """Photographs to train on, of those packages of `TRAINING` that are installed; none that is for publication.

    Raises:
        ImageError: hardly any is installed.
    """
    apart = Path(SETS["folders"]["budgie-backgrounds"])
    large = [
        path
        for folder in _WALLPAPERS
        if folder.is_dir()
        for path in list_images(folder)
        if not path.is_symlink()
        and path.stat().st_size > LEAST_BYTES
        and "screenshot" not in path.name
        and apart not in path.parents
    ]
    if len(large) < 40:
        raise ImageError(f"Only {len(large)} photographs are installed.", f"apt-get install {' '.join(TRAINING)}")
    return large


def home(package: str) -> Path:
    """Folder of an installed Python package, found without importing it.

    Raises:
        MissingExtraError: it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(_PACKAGES.get(package, package.replace("_", "-")), "demo")
    return Path(spec.submodule_search_locations[0])
