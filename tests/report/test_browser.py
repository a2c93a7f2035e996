"""Both pages in a real Chromium: they render, ask for nothing, complain of nothing, and fit every width."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sparsifiner_edge.evaluate.explain import explain_student
from sparsifiner_edge.report.explain_page import write_explanation
from tests.everything import first
from tests.plain import write_report
from tests.report.browser import CHROMIUM, Browser, browser

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium")
WIDER = (
    "[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll') && "
    "e.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map(e => e.tagName)"
)
PLACES = """[...document.querySelectorAll('.strip > i, .strip > span')].map(e => {
  const mark = e.getBoundingClientRect(), strip = e.parentElement.getBoundingClientRect();
  return (mark.left + mark.width / 2 - strip.left) / strip.width; })"""
"""Of marks and ticks, as shares of their charts' widths."""
BACKGROUND = "getComputedStyle(document.body).backgroundColor"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(real: dict[str, Path], tiny_student: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    result, explained = explain_student(tiny_student, pictures, most=2)
    for language in ("en", "ja"):
        results = [real[kind] for kind in ("comparison", "profile", "evaluation", "robustness")]
        write_report(results, folder / f"report-{language}.html", language=language)
        write_explanation(explained, result.method, folder / f"explain-{language}.html", language)
    return folder


@pytest.mark.parametrize("name", first(["report-en", "report-ja", "explain-en", "explain-ja"]))
@pytest.mark.parametrize("scheme", first(["light", "dark"]))
@pytest.mark.parametrize("width", first([390, 1000]))
def test_it_renders(page: Browser, pages: Path, name: str, scheme: str, width: int) -> None:
    path = pages / f"{name}.html"
    page.open(path, width, scheme)
    assert page.complaints() == []
    assert page.fetched() == [path.as_uri()]
    assert page.value("document.documentElement.scrollWidth") <= width
    assert page.value(WIDER) == []
    assert page.value("[...document.images].every(image => image.complete && image.naturalWidth)")
    assert page.value("document.images.length + document.querySelectorAll('polygon').length") >= 2
    # Marks and ticks stand where their values are: apart from each other, inside their chart.
    places = page.value(PLACES)
    assert name.startswith("explain") or (len(places) >= 6 and all(-0.01 <= place <= 1.01 for place in places))
    assert name.startswith("explain") or len(set(places)) >= 5
    red = int(page.value(BACKGROUND).removeprefix("rgb(").partition(",")[0])
    assert red < 60 if scheme == "dark" else red > 200
    assert page.picture(pages / f"{name}-{scheme}-{width}.png").stat().st_size > 30_000


@pytest.mark.everything
def test_it_prints(page: Browser, pages: Path) -> None:
    page.open(pages / "report-en.html", 1000, "dark")
    content = page.pdf(pages / "en.pdf").read_bytes()
    assert content.startswith(b"%PDF")
    assert b"/MediaBox [0 0 594" in content or b"/MediaBox [0 0 595" in content  # A4


def test_the_browser_would_tell(page: Browser, tmp_path: Path) -> None:
    """The checks above can fail: a page that throws, fetches and overflows is found out."""
    bad = tmp_path / "bad.html"
    bad.write_text("<main><img src='missing.png'><p style='width:3000px'>x</p></main><script>nothing()</script>")
    page.open(bad, 390)
    assert page.complaints()
    assert len(page.fetched()) == 2
    assert page.value(WIDER)
