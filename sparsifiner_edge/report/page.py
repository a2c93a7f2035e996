"""`write_report`: result files -> one HTML page."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import msgspec

from sparsifiner_edge.errors import ConfigError, ImageError
from sparsifiner_edge.files import read_bytes, require_file_path, write_text
from sparsifiner_edge.report import measured, others
from sparsifiner_edge.report.blocks import BINS, Note, Section, Strips, Table
from sparsifiner_edge.report.reading import ReportData, report_data
from sparsifiner_edge.report.texts import Texts, templates
from sparsifiner_edge.report.values import clean
from sparsifiner_edge.report.verdict import verdict_sentences
from sparsifiner_edge.results import Result

MOST_PICTURE = 8 << 20
"""Maximum size of a picture in bytes."""
_PICTURES = {"png": b"\x89PNG\r\n\x1a\n", "jpeg": b"\xff\xd8\xff"}


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Summary of a page that was written.

    Attributes:
        page: Path of the page.
        verdict: Sentences of the verdict.
        differences: Field -> values of results that differ.
        warnings: Number of warnings.
        sections: Names of the sections.
    """

    page: str
    verdict: list[str]
    differences: dict[str, list[str]]
    warnings: int
    sections: list[str]


def write_report(
    results: Sequence[str | Path], output: str | Path, *, language: str = "en", pictures: Sequence[str | Path] = ()
) -> Report:
    """Write one self-contained page, which needs no network and runs no script.

    If machine, power mode, device, threads, backend or precision differ, a banner names the differences, and no ratio
    is given across them.

    Args:
        results: Files that `write_result` wrote.
        output: The page; an earlier file is replaced, completely or not at all.
        language: "en" or "ja".
        pictures: PNG or JPEG files to show, such as a model's output on photographs.

    Raises:
        ArtifactError: A file is no result that the page shows, is of another version, or holds impossible values; or
            the file cannot be written.
        ConfigError: There is no result, or no such language.
        ImageError: A picture is not an image, or too large.
        MissingExtraError: jinja2 is not installed.

    Example:
        >>> from sparsifiner_edge.results import write_result
        >>> write_result(Path("result.json"), evaluate_student("student", "images"))
        >>> write_report(["result.json"], "page.html").page
        'page.html'
    """
    texts, target = Texts(language), Path(output)
    require_file_path(target)
    paths = [Path(path) for path in results]
    if os.path.realpath(target) in map(os.path.realpath, paths):
        raise ConfigError(f"{target} is one of the results.", "Give the page another name.")
    data = report_data(paths, texts)
    sections = _sections(data, [_picture(Path(path)) for path in pictures])
    report = Report(
        page=str(target),
        verdict=verdict_sentences(data),
        differences=data.differences,
        warnings=sum(len(side.figures.flags) for side in data.sides),
        sections=[name for name, _ in sections],
    )
    write_text(target, _html(data, sections, report))
    return report


def page_of(result: Result) -> tuple[list[tuple[str, Table | Note]], list[str]]:
    """Return the tables of one result in English, each with a title, its remarks, and the verdict."""
    data = report_data([result], Texts("en"))
    blocks = [
        (block.title or data.texts(f"{name}.title") if isinstance(block, Table) else "", block)
        for name, blocks in _sections(data, [])
        if name not in ("accuracy", "method")
        for block in blocks
        if not isinstance(block, Strips)
    ]
    return blocks, verdict_sentences(data)


def _picture(path: Path) -> Note:
    """Return a picture with its file name."""
    content = read_bytes(path, MOST_PICTURE)
    kind = next((kind for kind, start in _PICTURES.items() if content.startswith(start)), None)
    if kind is None:
        raise ImageError(f"{path} is not a PNG or JPEG file.", "Give a picture in one of these formats.")
    return Note(clean(path.stem, 80), picture=f"data:image/{kind};base64,{base64.b64encode(content).decode()}")


def _sections(data: ReportData, pictures: Sequence[Note]) -> list[Section]:
    sections = [
        others.search_section(data),
        others.estimate_section(data),
        others.accuracy_section(data, pictures),
        others.stream_section(data),
        others.stability_section(data),
        measured.latency_section(data),
        measured.energy_section(data),
        measured.memory_section(data),
        measured.layers_section(data),
        measured.conditions_section(data),
        others.method_section(data),
    ]
    return [(name, blocks) for name, blocks in sections if blocks]


def _html(data: ReportData, sections: Sequence[Section], report: Report) -> str:
    texts, sentences = data.texts, report.verdict
    names = list(dict.fromkeys(side.bundle_name for side in data.sides))
    verdict = next((comparison.verdict for *_, comparison in data.comparisons()), "")
    text: str = (
        templates()
        .get_template("page.html")
        .render(
            t=texts,
            names=texts("names.separator").join(names[:4]) or data.files[0].name,
            created=sorted({file.result.created[:16].replace("T", " ") for file in data.files}),
            verdict=sentences[0],
            others=sentences[1:],
            tone="refused" if data.differences else {"faster": "good", "slower": "bad"}.get(verdict, "plain"),
            differences=[(texts(f"field.{name}"), values) for name, values in data.differences.items()],
            sides=data.sides,
            warnings=report.warnings,
            sections=sections,
            bins=BINS,
            clean=clean,
            version=version("sparsifiner-edge"),
        )
    )
    return text
