"""The page of an explanation in a real Chromium: it shows its pictures, asks for nothing, complains of nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.evaluate.explain import explain_student
from sparsifiner_edge.export.check import smooth_images
from sparsifiner_edge.report.explain_page import write_explanation
from sparsifiner_edge.sparse.student import save_student
from tests.models import student
from tests.report.browser import CHROMIUM, Browser, browser

pytestmark = [
    pytest.mark.everything,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium"),
]
READY = "[...document.images].every(image => image.complete && image.naturalWidth)"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explained")
    sparsity = SparsityConfig(keep=0.2, cells=4, channels=8, merge=(12, 0))
    save_student(student(sparsity=sparsity, num_classes=0, img_size=(96, 160)), folder / "student")
    (folder / "images").mkdir()
    for number, image in enumerate(smooth_images((96, 160), 2)):
        Image.fromarray(image).save(folder / "images" / f"{number}.png")
    result, explained = explain_student(folder / "student", folder / "images")
    for language in ("en", "ja"):
        write_explanation(explained, result.method, folder / f"{language}.html", language)
    return folder


def opened(page: Browser, path: Path, width: int = 1000, scheme: str = "light") -> None:
    page.open(path, width, scheme)
    deadline = time.monotonic() + 60
    while not page.value(READY):
        assert time.monotonic() < deadline, page.complaints()
        time.sleep(0.05)


@pytest.mark.parametrize("language", ["en", "ja"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1000])
def test_it_shows(page: Browser, pages: Path, language: str, scheme: str, width: int) -> None:
    path = pages / f"{language}.html"
    opened(page, path, width, scheme)
    assert page.complaints() == []
    assert page.fetched() == [path.as_uri()]
    assert page.value("document.documentElement.scrollWidth") <= width
    assert page.value("document.images.length") == 2
    assert page.value("document.images[0].naturalWidth") == 4 * 160 + 3 * 6
    red = int(page.value("getComputedStyle(document.body).backgroundColor").removeprefix("rgb(").partition(",")[0])
    assert red < 60 if scheme == "dark" else red > 200
