"""What several test files share: weights, pictures, a student and a bundle of the smallest timm model, made once."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# torch and the like are imported where they are used: some tests run without them.

# A shell starts programs in the background deaf to Ctrl-C, and what they start inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def handlers_restored() -> Iterator[None]:
    """The command line, called in this process, takes signals and lost exceptions over."""
    hook = sys.unraisablehook
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    sys.unraisablehook = hook
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of 10 classes."""
    import safetensors.torch

    from tests.models import vit

    path = tmp_path_factory.mktemp("weights") / "classifier.safetensors"
    safetensors.torch.save_file(vit(num_classes=10).state_dict(), path)
    return path


@pytest.fixture(scope="session")
def feature_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without classifier."""
    import safetensors.torch

    from tests.models import vit

    path = tmp_path_factory.mktemp("weights") / "features.safetensors"
    safetensors.torch.save_file(vit(num_classes=0).state_dict(), path)
    return path


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three small pictures."""
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (60 + number, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"picture{number}.png")
    return folder


@pytest.fixture(scope="session")
def tiny_student(tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path) -> Path:
    from sparsifiner_edge.sparse.student import sparsify
    from tests.models import TINY

    return sparsify(TINY, tmp_path_factory.mktemp("student") / "student", weights=tiny_weights, cells=4)


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory, tiny_student: Path) -> Path:
    from sparsifiner_edge.export.bundle import export_bundle

    return export_bundle(tiny_student, tmp_path_factory.mktemp("bundle") / "bundle")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve smooth pictures in two classes."""
    import numpy as np
    from PIL import Image

    root = tmp_path_factory.mktemp("training")
    for number in range(12):
        coarse = np.random.default_rng(number).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        path = root / ("cats" if number % 2 else "dogs") / f"{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(coarse).resize((180, 170), Image.Resampling.BICUBIC).save(path)
    return root


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """key.pem, key.pub, other.pem, other.pub."""
    from sparsifiner_edge.signing import generate_key

    folder = tmp_path_factory.mktemp("keys")
    for name in ("key", "other"):
        generate_key(folder / f"{name}.pem")
    return folder
