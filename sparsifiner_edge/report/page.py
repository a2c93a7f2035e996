"""`write_report`: result files -> one HTML page and its figures as PNGs."""

from __future__ import annotations

import importlib.resources
import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import msgspec

from sparsifiner_edge.errors import ConfigError, GateError, MissingExtraError
from sparsifiner_edge.files import require_file_path, write_bytes, write_text
from sparsifiner_edge.records import Unavailable
from sparsifiner_edge.report import details, sections
from sparsifiner_edge.report.blocks import Figure, Section
from sparsifiner_edge.report.compare import comparisons_in, differences, fields_named, flags_of, groups_of, lead
from sparsifiner_edge.report.details import Prices
from sparsifiner_edge.report.figures import PALETTE, Drawn, drawn, fonts
from sparsifiner_edge.report.read import Described, Source, accuracies_of, manifests_of, read_sources, sides_of
from sparsifiner_edge.report.sections import Page
from sparsifiner_edge.report.texts import Texts
from sparsifiner_edge.report.tiles import tiles_of


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What was written, and what it says.

    Attributes:
        images: PNGs beside the page. verdict: sentences. differences: field -> values of results that differ.
    """

    page: str
    images: list[str] | Unavailable = msgspec.field(name="pictures")
    verdict: list[str]
    differences: dict[str, list[str]]
    flags: list[dict[str, str]]
    sections: list[str]


def write_report(
    results: Sequence[str | Path],
    output: str | Path,
    *,
    bundles: Sequence[str | Path] = (),
    language: str = "en",
    prices: Prices | None = None,
    strict: bool = False,
    images: bool = True,
) -> Report:
    """Write one self-contained page, and beside it its figures as `<stem>-<figure>.png`.

    Results of different machines, power modes, devices, threads, backends or precisions are shown apart, under a banner
    that names the differences; no ratio is given across them. The page needs no network and runs no script.

    Args:
        results: files that `write_result` wrote.
        output: the page; an earlier file there is replaced, whole or not at all.
        bundles: folders of bundles in the results, for what was sparse; those still at their place are found by hash.
        language: "en" or "ja".
        prices: None: no costs.
        strict: refuse results that differ as above, and write nothing.
        images: also write PNGs.

    Raises:
        ArtifactError: a file is no result, of a newer schema, or holds NaN; or the disk refuses.
        ConfigError: no result, no such language, an impossible price, a bundle in none of the results.
        GateError: `strict`, and the results cannot be compared.
        MissingExtraError: jinja2 is not installed.
    """
    texts, target = Texts(language), Path(output)
    prices = (prices or Prices()).checked()
    require_file_path(target)
    paths = [Path(path) for path in results]
    if os.path.realpath(target) in map(os.path.realpath, paths):
        raise ConfigError(f"{target} is one of the results.", "Give the page another name.")
    sources = read_sources(paths)
    sides = sides_of(sources)
    page = Page(groups_of(sides), sides, accuracies_of(sources, sides), texts)
    manifests = manifests_of(sides, [Path(folder) for folder in bundles])
    found = differences(sides)
    if strict and found:
        values = "; ".join(f"{fields_named([name], Texts('en'))}: {' against '.join(v)}" for name, v in found.items())
        raise GateError(f"The results cannot be compared: {values}.", "Measure all of them under the same conditions.")
    content = _content(page, sources, manifests, prices)
    charts, why_none = _charts(content, language, images)
    text = _render(page, sources, content, found, charts)
    written = _write_images(target, charts)
    write_text(target, text)
    return Report(
        page=str(target),
        images=Unavailable(why_none) if why_none else written,
        verdict=lead(page.groups, sides, page.accuracies, texts),
        differences=found,
        flags=flags_of(sides, texts),
        sections=[section.name for section in content],
    )


def _content(page: Page, sources: Sequence[Source], manifests: Sequence[Described], prices: Prices) -> list[Section]:
    found = [
        sections.accuracy_section(page),
        sections.latency_section(page),
        sections.energy_section(page),
        sections.memory_section(page),
        sections.layers_section(page),
        details.sparsity_section(page, manifests),
        details.cost_section(page, prices),
        details.sweep_section(page),
        details.estimate_section(page),
        details.others_section(page, sources),
        details.method_section(page, sources),
    ]
    return [section for section in found if section is not None and section.blocks]


def _charts(content: Sequence[Section], language: str, images: bool) -> tuple[dict[str, Drawn], str]:
    """Every chart by its name, without matplotlib none, and why there is no PNG."""
    try:
        families = fonts(language)
    except MissingExtraError as error:
        return {}, f"{error.what} {error.fix}" if images else "not asked for"
    why = "" if images else "not asked for"
    if images and families is None:
        why = "no installed font has Japanese characters; install one, such as Noto Sans CJK (fonts-noto-cjk)"
    figures = [block for section in content for block in section.blocks if isinstance(block, Figure)]
    return {figure.name: drawn(figure, None if why else families) for figure in figures}, why


def _write_images(target: Path, charts: dict[str, Drawn]) -> list[str]:
    """Paths of the PNGs written."""
    paths = {target.with_name(f"{target.stem}-{name}.png"): chart.png for name, chart in charts.items() if chart.png}
    for path, content in paths.items():
        write_bytes(path, content)
    return [str(path) for path in paths]


def _render(
    page: Page,
    sources: Sequence[Source],
    content: Sequence[Section],
    found: dict[str, list[str]],
    charts: dict[str, Drawn],
) -> str:
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtraError("jinja2", "report") from error
    folder = importlib.resources.files("sparsifiner_edge.report") / "template"
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    texts = page.texts
    names = list(dict.fromkeys(side.label.partition(" · ")[0] for side in page.sides))
    first, *others = lead(page.groups, page.sides, page.accuracies, texts)
    verdict = next((c.verdict for group in page.groups for c in comparisons_in(group)), "")
    return environment.from_string((folder / "page.html").read_text(encoding="utf-8")).render(
        t=texts,
        style=(folder / "style.css").read_text(encoding="utf-8"),
        palette=PALETTE,
        names=texts("names.separator").join(names[:4]) or sources[0].about,
        created=sorted({str(source.result.created)[:16].replace("T", " ") for source in sources}),
        verdict=first,
        tone="refused" if found else {"faster": "good", "slower": "bad"}.get(verdict, "plain"),
        others=others,
        tiles=tiles_of(page),
        differences=[(texts(f"field.{name}"), values) for name, values in found.items()],
        flags=flags_of(page.sides, texts),
        measured=bool(page.groups),
        sections=content,
        charts=charts,
        undrawn=not charts and any(isinstance(block, Figure) for section in content for block in section.blocks),
        joined=_joined,
        version=version("sparsifiner-edge"),
    )


def _joined(cell: str) -> str:
    """A cell whose intervals never break at their dash."""
    for dash in "–～":
        cell = cell.replace(dash, f"\N{WORD JOINER}{dash}\N{WORD JOINER}")
    return cell
