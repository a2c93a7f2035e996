"""`write_report`: result files -> one HTML page and its figures as PNGs."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import msgspec

from sparsifiner_edge.errors import ConfigError, GateError, ImageError, MissingExtraError
from sparsifiner_edge.files import read_bytes, require_file_path, write_bytes, write_text
from sparsifiner_edge.records import Unavailable
from sparsifiner_edge.report import measured_sections, other_sections
from sparsifiner_edge.report.blocks import Figure, Picture, Section
from sparsifiner_edge.report.conditions import ReportData, report_data
from sparsifiner_edge.report.explain_section import explain_section
from sparsifiner_edge.report.other_sections import Prices
from sparsifiner_edge.report.rendering import PALETTE, RenderedChart, fonts, render, templates
from sparsifiner_edge.report.result_files import LabelledManifest, manifests_of, read_result_files
from sparsifiner_edge.report.search_section import search_section
from sparsifiner_edge.report.stability_section import stability_section
from sparsifiner_edge.report.texts import Texts
from sparsifiner_edge.report.values import clean
from sparsifiner_edge.report.verdict import field_names, flags_of, verdict_sentences

MOST_PICTURE = 8 << 20
"""Bytes of a picture that a page takes."""
_PICTURES = {"png": b"\x89PNG\r\n\x1a\n", "jpeg": b"\xff\xd8\xff"}


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What was written, and what it says.

    Attributes:
        images: PNGs beside the page. verdict: sentences. differences: field -> values of results that differ.
    """

    page: str
    images: list[str] | Unavailable
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
    pictures: Sequence[str | Path] = (),
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
        strict: reject results that differ as above, and write nothing.
        images: also write PNGs.
        pictures: PNG or JPEG files that the page shows, such as what a model makes of photographs.

    Raises:
        ArtifactError: a file is not a result, of another version, or holds NaN; or the disk refuses.
        ConfigError: no result, no such language, an impossible price, a bundle in none of the results.
        ImageError: a picture is none, or too large.
        GateError: `strict`, and the results cannot be compared.
        MissingExtraError: jinja2 is not installed.
    """
    texts, target = Texts(language), Path(output)
    prices = (prices or Prices()).checked()
    require_file_path(target)
    paths = [Path(path) for path in results]
    if os.path.realpath(target) in map(os.path.realpath, paths):
        raise ConfigError(f"{target} is one of the results.", "Give the page another name.")
    data = report_data(read_result_files(paths), texts)
    manifests = manifests_of(data.sides, [Path(folder) for folder in bundles])
    if strict and data.differences:
        names = {name: field_names([name], Texts("en")) for name in data.differences}
        said = "; ".join(f"{names[name]}: {' against '.join(values)}" for name, values in data.differences.items())
        raise GateError(f"The results cannot be compared: {said}.", "Measure all of them under the same conditions.")
    sections = _sections(data, manifests, prices, [_picture(Path(path)) for path in pictures])
    charts, why_none = _charts(sections, language, images)
    text = _html(data, sections, charts)
    written = _write_images(target, charts)
    write_text(target, text)
    return Report(
        page=str(target),
        images=Unavailable(why_none) if why_none else written,
        verdict=verdict_sentences(data),
        differences=data.differences,
        flags=flags_of(data),
        sections=[section.name for section in sections],
    )


def _picture(path: Path) -> Picture:
    """A picture as the page holds it, under its file's name."""
    content = read_bytes(path, MOST_PICTURE)
    kind = next((kind for kind, start in _PICTURES.items() if content.startswith(start)), None)
    if kind is None:
        raise ImageError(f"{path} is no PNG or JPEG.", "Give one that is.")
    return Picture(clean(path.stem, 80), f"data:image/{kind};base64,{base64.b64encode(content).decode()}")


def _sections(
    data: ReportData, manifests: Sequence[LabelledManifest], prices: Prices, pictures: Sequence[Picture]
) -> list[Section]:
    sections = [
        other_sections.task_section(data, pictures),
        search_section(data),
        measured_sections.accuracy_section(data),
        stability_section(data),
        explain_section(data),
        measured_sections.latency_section(data),
        measured_sections.energy_section(data),
        measured_sections.memory_section(data),
        measured_sections.layers_section(data),
        other_sections.sparsity_section(data, manifests),
        other_sections.cost_section(data, prices),
        other_sections.estimate_section(data),
        other_sections.method_section(data),
    ]
    return [section for section in sections if section.blocks]


def _charts(sections: Sequence[Section], language: str, images: bool) -> tuple[dict[str, RenderedChart], str]:
    """Every chart by its name, without matplotlib none, and why there is no PNG."""
    try:
        families = fonts(language)
    except MissingExtraError as error:
        return {}, f"{error.what} {error.fix}" if images else "not asked for"
    why = "" if images else "not asked for"
    if images and families is None:
        why = "no installed font has Japanese characters; install one, such as Noto Sans CJK (fonts-noto-cjk)"
    figures = [block for section in sections for block in section.blocks if isinstance(block, Figure)]
    return {figure.name: render(figure, None if why else families) for figure in figures}, why


def _write_images(target: Path, charts: dict[str, RenderedChart]) -> list[str]:
    """Paths of the PNGs written."""
    paths = {target.with_name(f"{target.stem}-{name}.png"): chart.png for name, chart in charts.items() if chart.png}
    for path, content in paths.items():
        write_bytes(path, content)
    return [str(path) for path in paths]


def _html(data: ReportData, sections: Sequence[Section], charts: dict[str, RenderedChart]) -> str:
    texts, sentences = data.texts, verdict_sentences(data)
    names = list(dict.fromkeys(side.bundle_name for side in data.sides))
    verdict = next((compared.verdict for group in data.groups for compared in group.compared()), "")
    page = templates().get_template("page.html")
    text: str = page.render(
        t=texts,
        palette=PALETTE,
        names=texts("names.separator").join(names[:4]) or data.files[0].name,
        created=sorted({str(file.result.created)[:16].replace("T", " ") for file in data.files}),
        verdict=sentences[0],
        tone="refused" if data.differences else {"faster": "good", "slower": "bad"}.get(verdict, "plain"),
        others=sentences[1:],
        differences=[(texts(f"field.{name}"), values) for name, values in data.differences.items()],
        flags=flags_of(data),
        measured=bool(data.groups),
        sections=sections,
        charts=charts,
        undrawn=not charts and any(isinstance(block, Figure) for section in sections for block in section.blocks),
        version=version("sparsifiner-edge"),
    )
    return text
