"""What a student read and merged on images, and whether its explanations are true."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sparsifiner_edge.report.blocks import Block, Note, Section, Table
from sparsifiner_edge.report.conditions import ReportData
from sparsifiner_edge.report.result_files import ResultFile
from sparsifiner_edge.report.texts import Texts
from sparsifiner_edge.report.values import clean, get, number, rows

MAX_EXPLAINED = 40
_CONTROLS = ("random", "moved")
_HEADS = ("image", "tokens", "averages", "saco", "saco_dense", "saco_chance", "deletion", "deletion_chance")


def explain_section(data: ReportData) -> Section:
    """Of every result a sentence, and a table of its images."""
    texts, blocks = data.texts, list[Block]()
    for file in data.explanation_files:
        blocks += [Note(said) for said in explain_sentences(file, texts)]
        table = [_row(image) for image in rows(file.result.statistics, "images")[:MAX_EXPLAINED]]
        blocks.append(Table(texts.heads("explained", _HEADS), table))
    return Section("explained", blocks, data.explanation_files)


def explain_sentences(file: ResultFile, texts: Texts) -> Iterator[str]:
    """How many explanations are better than chance."""
    images = rows(file.result.statistics, "images")
    if images:
        better = sum(get(image, "better") is True for image in images)
        what = clean(get(file.result.method, "explained") or "?", 80)
        yield texts("explained.better", what=what, better=str(better), images=str(len(images)))


def _of(image: Mapping[str, Any], name: str, kind: str) -> float | None:
    return number(get(image, "faithful", name, kind))


def _row(image: Mapping[str, Any]) -> list[str]:
    layers = rows(image, "layers")
    counts = [number(get(layer, "tokens")) for layer in (layers[:1] + layers[-1:])]
    averages = [x for layer in layers if (x := number(get(layer, "cells"))) is not None]
    saco, deletion = (
        [x for name in _CONTROLS if (x := _of(image, name, kind)) is not None] for kind in ("saco", "deletion")
    )
    figures = [
        _of(image, "ours", "saco"), _of(image, "dense", "saco"), max(saco, default=None),
        _of(image, "ours", "deletion"), min(deletion, default=None),
    ]  # fmt: skip
    return [
        clean(get(image, "image") or "?", 60), " → ".join("–" if x is None else f"{x:.0f}" for x in counts),
        f"{sum(averages) / len(averages):.0%}" if averages else "–",
        *("–" if x is None else f"{x:.3f}" for x in figures),
    ]  # fmt: skip
