"""The page of an explanation in a real Chromium: it draws, answers a hand, asks for nothing, complains of nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
READY = "[...document.querySelectorAll('section.image')].every(s => s.dataset.ready === 'yes')"
DRAWN = "document.querySelector('canvas').toDataURL()"
SAID = "document.querySelector('output').textContent"


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
def test_it_draws(page: Browser, pages: Path, language: str, scheme: str, width: int) -> None:
    path = pages / f"{language}.html"
    opened(page, path, width, scheme)
    assert page.complaints() == []
    assert page.fetched() == [path.as_uri()]
    assert page.value("document.documentElement.scrollWidth") <= width
    assert page.value("document.querySelectorAll('canvas').length") == 2
    assert page.value("document.querySelector('canvas').width") == 160
    red = int(page.value("getComputedStyle(document.body).backgroundColor").removeprefix("rgb(").partition(",")[0])
    assert red < 60 if scheme == "dark" else red > 200


def change(page: Browser, selector: str, value: str, event: str) -> None:
    page.value(
        f"(() => {{ const found = document.querySelector({selector!r}); found.value = {value!r}; "
        f"found.dispatchEvent(new Event({event!r})); }})()"
    )


def move(page: Browser, kind: str, x: float, y: float) -> None:
    """A pointer's event at a share of the canvas."""
    page.value(
        "(() => { const canvas = document.querySelector('canvas'), box = canvas.getBoundingClientRect(); "
        f"canvas.dispatchEvent(new MouseEvent({kind!r}, {{ clientX: box.left + {x} * box.width, "
        f"clientY: box.top + {y} * box.height, bubbles: true }})); }})()"
    )


def test_it_answers_a_hand(page: Browser, pages: Path) -> None:
    opened(page, pages / "en.html")
    pictures: list[Any] = [page.value(DRAWN)]
    for view in ("reached", "dense", "merged", "cells"):
        change(page, "select", view, "change")
        pictures.append(page.value(DRAWN))
    change(page, "select", "read", "change")
    assert page.value(DRAWN) == pictures[0]
    change(page, "input", "3", "input")
    assert page.value("document.querySelector('.layer').textContent") == "3"
    pictures.append(page.value(DRAWN))
    move(page, "click", 0.05, 0.08)
    pictures.append(page.value(DRAWN))
    assert len(set(pictures)) == len(pictures), "every view, layer and place has a picture of its own"
    assert page.value(SAID).startswith("row 0, column 0 · patches in its token: ")
    move(page, "pointermove", 0.95, 0.95)
    said = page.value(SAID)
    assert said.startswith("row 5, column 9 · ")
    assert " heads · score " in said
    assert page.value(DRAWN) == pictures[-1], "hovering moves nothing"
    page.value("document.querySelector('canvas').dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowRight' }))")
    assert page.value(SAID).startswith("row 0, column 1 · ")
    page.value("document.querySelector('canvas').dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowUp' }))")
    assert page.value(SAID).startswith("row 0, column 1 · "), "there is nothing above"
    assert page.complaints() == []
