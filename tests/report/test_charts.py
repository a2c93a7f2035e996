"""Charts: the same from run to run, one page's from one another's apart, in the page's colours, text as text."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="the extra report is not installed")

from PIL import Image

from sparsifiner_edge.report import charts, rendering
from sparsifiner_edge.report.blocks import Figure
from sparsifiner_edge.report.values import Interval

ODD = "a_b $x^2$ <b id='x'> & \"#0a66c2\""
SAMPLES = np.random.default_rng(0).lognormal(0, 0.2, 500)
CHARTS: dict[str, Callable[[float], Any]] = {
    "scatter": partial(
        charts.scatter, [charts.ScatterPoint(ODD, Interval(2, 1, 3), Interval(0.9, 0.8, 1.0))] * 3, "x", "y", most=1.0
    ),
    "strips": partial(charts.strips, [charts.Strip(ODD, SAMPLES, {"p50": 1.0, "p99": 1.6})] * 2, "ms", "log ms"),
    "wide-strips": partial(charts.strips, [charts.Strip(ODD, SAMPLES**9, {"p50": 1.0})], "ms", "log ms"),
    "bars": partial(
        charts.bars, [charts.Bar(ODD, Interval(-1, -2, 1), 0, "-1"), charts.Bar("b", Interval(3), 1, "3", hollow=True)]
    ),
    "stacks": partial(charts.stacks, [charts.Stack(ODD, {"a": 1.0, "mlp": 2.0}, "3")], {"a": ODD, "mlp": "MLP"}),
    "many-stacks": partial(charts.stacks, [charts.Stack(f"layer {n}", {"a": n}, "3") for n in range(30)], {"a": "A"}),
}


def rendered(name: str, families: list[str] | None = None) -> rendering.RenderedChart:
    return rendering.render(Figure(name, "Title $x$", ODD, CHARTS[name]), families)


@pytest.mark.parametrize("name", sorted(CHARTS))
def test_a_chart_follows_the_page(name: str) -> None:
    for svg in (chart := rendered(name))[:2]:
        outside = re.sub(">[^<]*<", "><", svg)
        assert not re.search("url\\(|https?:|<style|<script|font-family|clip-path|<!--", svg)
        assert set(re.findall("#[0-9a-f]{6}", re.sub('aria-label="[^"]*"', "", outside))) == set()
        assert "var(--" in svg
        assert 'role="img" aria-label="a_b $x^2$ &lt;b id=&#x27;x&#x27;&gt; &amp; &quot;#0a66c2&quot;"' in svg
    assert chart.png == b""
    assert 'viewBox="0 0 720 ' in chart.wide
    assert 'viewBox="0 0 340 ' in chart.narrow


@pytest.mark.parametrize("name", ["scatter", "bars", "stacks"])
def test_names_stay_as_they_are(name: str) -> None:
    wide = rendered(name).wide
    assert ">a_b $x^2$ &lt;b id='x'&gt; &amp; \"#0a66c2\"" in wide
    assert re.search("<title>a_b [$]x\\^2[$] &lt;b", wide)


def test_ids_are_the_same_again_and_no_other_charts() -> None:
    ids: list[str] = []
    for name in CHARTS:
        chart = rendered(name)
        assert chart == rendered(name)
        ids += re.findall(' id="([^"]*)"', chart.wide + chart.narrow)
    assert len(ids) == len(set(ids))


def test_the_png_is_the_chart_below_its_title() -> None:
    svg, png = rendered("bars").wide, rendered("bars", ["DejaVu Sans"]).png
    height = float(re.findall('viewBox="0 0 720 ([0-9.]+)"', svg)[0])
    image = Image.open(io.BytesIO(png)).convert("RGB")
    assert image.size == (1440, 2 * (height + 36))
    pixels = np.asarray(image)
    assert tuple(pixels[0, 0]) == tuple(pixels[-1, -1]) == (255, 255, 255)
    assert (pixels[:72] < 100).any(axis=(0, 1)).all()
    assert rendered("bars", ["DejaVu Sans"]).wide == svg
