"""The page in a real Chromium: it renders, asks for nothing, complains of nothing, and fits every width."""

from __future__ import annotations

import pytest

from sparsifiner_edge.report import Prices
from tests.everything import first
from tests.plain import write_report
from tests.report.browser import CHROMIUM, browser

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium")
WIDER = (
    "[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll') && "
    "e.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map(e => e.tagName)"
)
BACKGROUND = "getComputedStyle(document.body).backgroundColor"
# Text that lies outside its chart.
SHOWN = """[...document.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().width)
  .map(s => s.className.baseVal)"""
CLIPPED = """[...document.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().width).flatMap(s => {
  const frame = s.getBoundingClientRect();
  return [...s.querySelectorAll('text')].filter(t => { const b = t.getBoundingClientRect();
    return b.left < frame.left - 2 || b.right > frame.right + 2 || b.bottom > frame.bottom + 2; })
    .map(t => t.textContent);
})"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(real, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    results = [real[kind] for kind in ("comparison", "profile", "evaluation", "robustness", "estimate")]
    for language in ("en", "ja"):
        path = folder / f"{language}.html"
        write_report(results, path, language=language, prices=Prices(0.3, 0.1, "EUR"), images=False)
    return folder


@pytest.mark.parametrize("language", first(["en", "ja"]))
@pytest.mark.parametrize("scheme", first(["light", "dark"]))
@pytest.mark.parametrize("width", first([390, 1000]))
def test_it_renders(page, pages, language, scheme, width):
    path = pages / f"{language}.html"
    page.open(path, width, scheme)
    assert page.complaints() == []
    assert page.fetched() == [path.as_uri()]
    assert page.value("document.documentElement.scrollWidth") <= width
    assert page.value(WIDER) == []
    assert page.value(CLIPPED) == []
    kind = "narrow" if width == 390 else "wide"
    shown = page.value(SHOWN)
    assert len(shown) >= 6
    assert set(shown) == {kind}
    red = int(page.value(BACKGROUND).removeprefix("rgb(").partition(",")[0])
    assert red < 60 if scheme == "dark" else red > 200
    picture = page.picture(pages / f"{language}-{scheme}-{width}.png")
    assert picture.stat().st_size > 50_000


@pytest.mark.everything
def test_it_prints(page, pages):
    page.open(pages / "en.html", 1000, "dark")
    content = page.pdf(pages / "en.pdf").read_bytes()
    assert content.startswith(b"%PDF")
    assert b"/MediaBox [0 0 594" in content or b"/MediaBox [0 0 595" in content  # A4


def test_the_browser_would_tell(page, tmp_path):
    """The checks above can fail: a page that throws, fetches and overflows is found out."""
    bad = tmp_path / "bad.html"
    bad.write_text("<main><img src='missing.png'><p style='width:3000px'>x</p></main><script>nothing()</script>")
    page.open(bad, 390)
    assert page.complaints()
    assert len(page.fetched()) == 2
    assert page.value(WIDER)
