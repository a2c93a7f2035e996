"""Tests of both pages in a real Chromium: they render at every width, without requests and without errors."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import pytest

from sparsifiner_edge.evaluate.explain import explain_student
from sparsifiner_edge.report.explain_page import write_explanation
from tests.everything import first
from tests.plain import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium")
FRAME = """<html style="color-scheme: light dark"><iframe width="{width}" height="900" srcdoc="{page}"></iframe><script>
addEventListener('load', () => {
  const page = document.querySelector('iframe').contentDocument, root = page.documentElement;
  const all = selector => [...page.querySelectorAll(selector)];
  document.title = JSON.stringify({
    width: root.scrollWidth,
    wider: all('main *').filter(e => !e.closest('.scroll') && e.getBoundingClientRect().right > root.clientWidth + 1).length,
    broken: [...page.images].filter(image => !image.complete || !image.naturalWidth).length,
    pictures: page.images.length + all('polygon').length,
    fetched: all('[src], link').map(e => e.src || e.href).filter(url => !url.startsWith('data:')),
    red: Number(getComputedStyle(page.body).backgroundColor.match(/[0-9]+/)[0]),
    places: all('.strip > i, .strip > span').map(e => {
      const mark = e.getBoundingClientRect(), strip = e.parentElement.getBoundingClientRect();
      return (mark.left + mark.width / 2 - strip.left) / strip.width; }) }) })
</script></html>"""  # noqa: E501
"""Shows a page at a given width and reports in its title; places: marks and ticks as shares of their chart's width."""


def chromium(folder, *options):
    """Return standard output and standard error of a Chromium that opens one page."""
    line = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", *options]
    line.append(f"--user-data-dir={folder / 'profile'}")
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout, done.stderr


def seen(folder, page, width, scheme="light"):
    """Return what FRAME reports of a page, and the `complaints` of the browser."""
    frame = folder / "frame.html"
    frame.write_text(FRAME.replace("{width}", str(width)).replace("{page}", html.escape(page)), "utf-8")
    colours = f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"
    out, err = chromium(folder, "--window-size=1200,900", colours, "--dump-dom", frame.as_uri())
    title = re.search("<title>(.*?)</title>", out)
    assert title, err
    return json.loads(html.unescape(title[1])) | {"complaints": re.findall("CONSOLE:.*", err)}


@pytest.fixture(scope="module")
def pages(real, tiny_student, pictures, tmp_path_factory):
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
def test_it_renders(pages, tmp_path, name, scheme, width):
    found = seen(tmp_path, (pages / f"{name}.html").read_text("utf-8"), width, scheme)
    assert (found["complaints"], found["fetched"], found["wider"], found["broken"]) == ([], [], 0, 0)
    assert found["width"] <= width
    assert found["pictures"] >= 2
    assert found["red"] < 60 if scheme == "dark" else found["red"] > 200
    # Marks and ticks stand where their values are: apart from each other and inside their chart.
    assert name.startswith("explain") or len(set(found["places"])) >= 5
    assert all(-0.01 <= place <= 1.01 for place in found["places"])


@pytest.mark.everything
def test_it_prints(pages, tmp_path):
    chromium(tmp_path, f"--print-to-pdf={tmp_path / 'en.pdf'}", (pages / "report-en.html").as_uri())
    assert re.search(rb"/MediaBox \[0 0 59[45]", (tmp_path / "en.pdf").read_bytes())  # A4


def test_the_browser_would_tell(tmp_path):
    """The checks above can fail: a page that throws, fetches and overflows is detected."""
    found = seen(tmp_path, "<main><img src='no.png'><p style='width:3000px'>x</p></main><script>none()</script>", 390)
    assert all(found[name] for name in ("complaints", "fetched", "wider", "broken"))
    assert found["width"] > 390
