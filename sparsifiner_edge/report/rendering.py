"""A chart as SVG in the page's colours, and as PNG: both of one matplotlib figure, drawn in the light palette."""

from __future__ import annotations

import contextlib
import html
import importlib.resources
import io
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from sparsifiner_edge.errors import MissingExtraError
from sparsifiner_edge.files import import_matplotlib
from sparsifiner_edge.report.blocks import Figure

PALETTE = {
    "ink": ("#15191e", "#eef1f4"),
    "muted": ("#566070", "#a3afbd"),
    "grid": ("#dfe3e8", "#303843"),
    "card": ("#ffffff", "#181d24"),
    "s1": ("#0a66c2", "#5ab0ff"),
    "s2": ("#c85a00", "#ff9d4d"),
    "s3": ("#16784c", "#4fca8d"),
    "s4": ("#7d3fb8", "#c39bf5"),
    "s5": ("#b02379", "#f57fc0"),
    "s6": ("#5a6b7b", "#9db0c2"),
}
"""Colour name -> (light, dark), as the page and the PNGs use them."""
INK, MUTED, GRID, CARD, *SERIES = (light for light, _ in PALETTE.values())
WIDE, NARROW = 720.0, 340.0
"""Widths of a chart in pixels, on a desk and on a telephone: the same text size on either."""
PIXELS_PER_INCH = 72
"""A pixel is a point, the unit of matplotlib's sizes and of its SVG."""
NOTE = "note:"
"""What an artist's `gid` begins with if the rest of it is to be shown on hovering."""
_CJK = ["Noto Sans CJK JP", "Noto Sans JP", "IPAexGothic", "IPAGothic", "TakaoGothic", "VL Gothic"]
_CJK += ["Source Han Sans JP"]
_COLOURS = {
    "text.color": INK,
    "figure.facecolor": CARD,
    "grid.color": GRID,
    **{f"axes.{part}": MUTED for part in ("edgecolor", "labelcolor", "titlecolor")},
    **{f"{axis}tick.labelcolor": MUTED for axis in "xy"},
}
_NAMES = {light: f"var(--{name})" for name, (light, _) in PALETTE.items()}


class RenderedChart(NamedTuple):
    """`<svg>` elements for either width, and the bytes of a PNG of the wide one."""

    wide: str
    narrow: str
    png: bytes


def templates() -> Any:
    """The pages' templates, a `jinja2.Environment`.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtraError("jinja2", "report") from error
    return jinja2.Environment(
        loader=jinja2.PackageLoader("sparsifiner_edge.report", "template"), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip


def fonts(language: str) -> list[str] | None:
    """Font families for a language, or None where no installed font has its characters.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    import_matplotlib("report")
    from matplotlib.font_manager import findSystemFonts, fontManager

    # Also those installed after matplotlib made its list, which it keeps in the user's cache.
    for path in sorted(set(findSystemFonts()) - {entry.fname for entry in fontManager.ttflist}):
        with contextlib.suppress(OSError, RuntimeError, ValueError):  # A font that it cannot read it does not need.
            fontManager.addfont(path)
    installed = {entry.name for entry in fontManager.ttflist}
    eastern = [name for name in _CJK if name in installed]
    if language == "ja":
        return [*eastern[:1], "DejaVu Sans"] if eastern else None
    return ["DejaVu Sans", *eastern[:1]]


def render(chart: Figure, families: list[str] | None) -> RenderedChart:
    """The chart at both widths, and as PNG in these fonts; None: no PNG, `png` is empty."""
    from matplotlib import style

    sheet_style = Path(str(importlib.resources.files("sparsifiner_edge.report") / "template" / "chart.mplstyle"))
    given = _COLOURS | {"font.family": families or ["DejaVu Sans"]}
    with style.context([sheet_style, given], after_reset=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # A name may hold characters that no font has; they become boxes.
        sheet = chart.draw(WIDE)
        wide, narrow = _svg(chart, sheet, "wide"), _svg(chart, chart.draw(NARROW), "narrow")
        return RenderedChart(wide, narrow, _png(sheet, chart.title) if families else b"")


def _png(sheet: Any, title: str, above: float = 36) -> bytes:
    """The figure on white, below its title, at twice its size in pixels."""
    from matplotlib.transforms import Bbox

    width, height = sheet.bbox.size
    sheet.text(8 / width, 1 + 13 / height, title, fontsize=15, fontweight="bold")
    frame = Bbox([[0, 0], [width / PIXELS_PER_INCH, (height + above) / PIXELS_PER_INCH]])
    buffer = io.BytesIO()
    sheet.savefig(buffer, format="png", dpi=2 * PIXELS_PER_INCH, bbox_inches=frame)
    return buffer.getvalue()


def _svg(chart: Figure, sheet: Any, kind: str) -> str:
    """An `<svg>` element of class `kind`, whose ids no other chart has and whose colours are the page's properties."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": f"{chart.name}-{kind}"}):
        sheet.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    body = re.sub(r"<defs>\s*<clipPath.*?</defs>", "", text[text.index("<g id=") : text.rindex("</svg>")], flags=re.S)
    shapes = re.sub(r"\n *", " ", re.sub("<[^>]*>", lambda tag: _fitted_to_page(tag[0]), body))
    width, height = sheet.bbox.size
    frame = f'viewBox="0 0 {width:g} {height:g}" style="max-width:{width:g}px"'
    return f'<svg class="{kind}" {frame} role="img" aria-label="{html.escape(chart.label)}">{shapes}</svg>'


def _fitted_to_page(tag: str) -> str:
    """A tag with the page's fonts and colours, and without the ids of groups; text holds no `<`."""
    group = re.match('<g id="([^"]*)"', tag)
    if group and tag.endswith("/>"):
        return ""
    if group:
        return f"<g><title>{group[1].removeprefix(NOTE)}</title>" if group[1].startswith(NOTE) else "<g>"
    tag = re.sub(' clip-path="[^"]*"', "", tag)
    tag = re.sub(r"font: ((?:\d+ )?)([\d.]+px)[^;\"]*", r"font-weight: \1; font-size: \2", tag)  # Of older versions.
    tag = re.sub(r"font-family: [^;\"]*(; )?", "", tag)
    return re.sub("#[0-9a-f]{6}", lambda colour: _NAMES.get(colour[0], colour[0]), tag)
