"""Measures the fidelity of untrained sparse models: which keys to select, and how to treat the others.

    python benchmarks/fidelity.py                      the rule at 224 and 518 px
    python benchmarks/fidelity.py --all [-o FOLDER]    every variant, at 224, 518 and 1036 px: table and JSON
    python benchmarks/fidelity.py --all --group 'cells of a board' --size 518 --size 1036       some of them

Values are cosines to dense DINOv2 ViT-S/14 over the eight development photographs (for the defaults also over the
publication set, `demo/split.py`), calibrated on other images. "keys" is the share of all keys that a query reads,
background included. "MACs" compares predictor, attention and background tokens with dense attention. "error" is the
relative error of the attention output, on the teacher's own activations, mean over the layers.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import tome
import torch
import torch.nn.functional as F
from fidelity_subject import Fidelity, Subject, cell_means, local_window, random_keys, weights_file
from summary import write_summary

from sparsifiner_edge.artifacts import sha256
from sparsifiner_edge.cli.common import print_table
from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.costs import MAC_KINDS, layer_costs
from sparsifiner_edge.demo import material, split
from sparsifiner_edge.export.export import model_shape
from sparsifiner_edge.images import load_image
from sparsifiner_edge.profiles import stats
from sparsifiner_edge.results import Result
from sparsifiner_edge.results import Subject as Measured
from sparsifiner_edge.sparse.student import dense_twin

KEEP = {224: 0.25, 518: 0.10, 1036: 0.05}
CELLS = {224: 16, 518: 25, 1036: 49}
SETTINGS = ((224, 0.25, 16), (224, 0.10, 16), (518, 0.10, 25), (518, 0.0625, 36))
"""Size, keep and background tokens of the rows shown without --all."""
ALL_SIZES = (224, 518, 1036)
PAPER = "paper preset, pooled start"


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row: its departure from the defaults.

    Attributes:
        group: Group in the table.
        name: Name in the table.
        changes: Fields of SparsityConfig.
        source: Method to find the projections.
        measure: Runs a configured subject.
        sizes: Image sizes of the variant with --all.
    """

    group: str
    name: str
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    source: str = "descent"
    measure: Callable[[Subject], Fidelity] = Subject.measure
    sizes: tuple[int, ...] = (224, 518)


DEFAULT = Variant("default", "edge", sizes=ALL_SIZES)


def variants() -> list[Variant]:
    """Return all variants."""
    rows = [DEFAULT]
    # Settings other than a size's default.
    rows += [Variant("default", "keep 0.1", {"keep": 0.1}, sizes=(224,))]
    rows += [Variant("default", "keep 0.0625, 36 cells", {"keep": 0.0625, "background_tokens": 36}, sizes=(518,))]
    rows += [
        Variant("keep", f"keep {k}", {"keep": k}, sizes=ALL_SIZES if k < 0.2 else (224, 518))
        for k in (0.5, 0.25, 0.1, 0.05)
    ]
    rows += [Variant("query_pool", f"probe {p}", {"query_pool": p}) for p in (2, 4, 16)]
    rows += [Variant("tile", f"tile {t}", {"tile": t}, sizes=ALL_SIZES if t == 64 else (224, 518)) for t in (8, 32, 64)]
    rows += [Variant("channels", f"{c} channels", {"channels": c}) for c in (8, 16, 32, 48)]
    rows += [Variant("channels", "all 64 channels", {"channels": 64}, "exact")]
    rows += [Variant("projections", f"from {s}", source=s) for s in ("weights", "moments", "at size")]
    rows += [Variant("value power", f"power {p:g}", {"value_power": p}) for p in (0.0, 1.0, 3.0)]
    rows += [
        Variant(
            "background_tokens",
            f"{c} cells",
            {"background_tokens": c},
            sizes=ALL_SIZES if c in (0, 25, 100) else (224, 518),
        )
        for c in (0, 4, 9, 16, 25, 49, 100)
    ]
    rows += [
        Variant("cells of a board", f"tile 64, {c} cells", {"tile": 64, "background_tokens": c}, sizes=(518, 1036))
        for c in (49, 31)
    ]
    rows += [
        Variant("background_tokens", "mean over all tokens", measure=lambda s: s.measure(attend=cell_means)),
        Variant("baselines", "local window", measure=lambda s: s.measure(local_window(s.model)), sizes=ALL_SIZES),
        Variant("baselines", "random keys", measure=lambda s: s.measure(random_keys), sizes=ALL_SIZES),
    ]
    return rows


def base(size: int) -> SparsityConfig:
    """Return the defaults at an image size."""
    return SparsityConfig(keep=KEEP[size], background_tokens=CELLS[size])


def run(variant: Variant, subject: Subject) -> dict[str, Any]:
    """Run one row: measured fidelity and cost."""
    sparsity = dataclasses.replace(base(subject.size), **variant.changes)
    subject.configure(sparsity, variant.source)
    return row(variant.group, variant.name, subject, sparsity, variant.measure(subject), variant.source)


def row(
    group: str, name: str, subject: Subject, sparsity: SparsityConfig, found: Fidelity, source: str
) -> dict[str, Any]:
    """Return the row of a configured subject."""
    shape = model_shape(subject.model)
    costs, dense = layer_costs(shape, sparsity), layer_costs(shape, SparsityConfig(keep=1))
    dense_macs, layout = sum(c["attention"].macs for c in dense), sparsity.layout(subject.patches)
    return {
        "group": group,
        "name": name,
        "size": subject.size,
        "sparsity": sparsity.to_dict(),
        "projections": source,
        "keys_share": (layout.keys + layout.background_tokens) / layout.patches,
        "macs_share": sum(c["predictor"].macs + c["attention"].macs + c["background_tokens"].macs for c in costs)
        / dense_macs,
        "predictor_share": sum(c["predictor"].macs for c in costs) / dense_macs,
        "features_cosine": found.features,
        "patches_cosine": found.patches,
        "layer_errors": found.errors,
    }


def merged_tokens(size: int) -> dict[str, Any]:
    """Measure ToMe (`tome.py`) at the MACs of a complete model with the defaults."""
    subject = Subject(size)
    shape = model_shape(subject.model)
    tokens, dense = shape.prefix + shape.patches, SparsityConfig(keep=1)
    wanted = sum(c[kind].macs for c in layer_costs(shape, base(size)) for kind in MAC_KINDS)
    rates = next(
        rates
        for rates in ([rate] * shape.depth for rate in range(1, shape.patches))
        if tome.macs(rates, tokens, shape.width, shape.hidden) <= wanted
    )
    model = tome.ToMe(dense_twin(subject.student).model, rates).eval()
    features, patches = [], []
    with torch.no_grad():
        for path, teacher in zip(split.images("development"), subject.teacher, strict=True):
            found = F.cosine_similarity(model(torch.from_numpy(load_image(path, size)[None]))[1], teacher, dim=-1)[0]
            features.append(float(found[0]))
            patches.append(float(found[1:].mean()))
    counts = tome.token_counts(rates, tokens)[:-1]
    whole = sum(c["attention"].macs for c in layer_costs(shape, dense))
    return {
        "group": "baselines",
        "name": f"ToMe, r = {rates[0]} a layer",
        "size": size,
        "sparsity": {},
        "projections": "none",
        "keys_share": sum(counts) / len(counts) / counts[0],
        "macs_share": sum(2 * n * n * shape.width for n in counts) / whole,
        "predictor_share": 0.0,
        "features_cosine": features,
        "patches_cosine": patches,
        "layer_errors": {"unavailable": "merged tokens have no counterpart in the teacher"},
    }


def paper_preset(size: int) -> dict[str, Any]:
    """Measure the published method before training: pooled start, projections from images."""
    subject = Subject(size, "paper")
    sparsity = SparsityConfig.for_preset("paper", keep=KEEP[size], channels=32)
    subject.configure(sparsity, "moments")
    return row("baselines", PAPER, subject, sparsity, subject.measure(), "moments")


def defaults() -> list[dict[str, Any]]:
    """Measure some settings, also on the photographs that were not used for any choice."""
    rows = []
    for size in (224, 518):
        for group, photographs in (("default", None), ("publication", split.images("publication"))):
            subject = Subject(size, photographs=photographs)
            for keep, cells in ((keep, cells) for wanted, keep, cells in SETTINGS if wanted == size):
                settings = {"keep": keep, "background_tokens": cells}
                rows.append(run(Variant(group, f"keep {keep}, {cells} cells", settings), subject))
    return rows


def everything(sizes: tuple[int, ...], groups: tuple[str, ...]) -> list[dict[str, Any]]:
    """Measure every variant at its sizes; groups: restrict to these."""
    rows = []
    for size in sizes:
        subject = Subject(size)
        for variant in variants():
            if size in variant.sizes and (variant.group in groups or not groups):
                rows.append(run(variant, subject))
                click.echo(f"{size} px, {variant.group}: {variant.name}", err=True)
        if "baselines" in groups or not groups:
            # Lists of one query each take an hour at 1036 px.
            rows += [merged_tokens(size), *([paper_preset(size)] if size < 1000 else [])]
    return rows


def table(rows: list[dict[str, Any]]) -> None:
    cells = [
        [
            f"{x['group']}: {x['name']}",
            str(x["size"]),
            *(f"{x[share]:.1%}" for share in ("keys_share", "macs_share", "predictor_share")),
            f"{np.mean(x['layer_errors']):.3f}" if isinstance(x["layer_errors"], list) else "",
            *(f"{np.mean(x[cosine]):.4f}" for cosine in ("features_cosine", "patches_cosine")),
        ]
        for x in rows
    ]
    columns = ["", "px", "keys", "MACs", "predictor", "error", "CLS", "patches"]
    print_table("Untrained DINOv2 ViT-S/14 against dense, eight photographs", columns, cells)


def result(rows: list[dict[str, Any]]) -> dict[str, Any]:
    method = {
        "metric": "cosine to the dense teacher, patches and class token, untrained",
        "photographs": len(split.images("development")),
        "publication": len(split.images("publication")),
        "calibration": len(split.images("calibration")),
        "intervals": "Student's t over photographs",
    }
    statistics = {
        f"{x['size']} px / {x['group']} / {x['name']}": {
            "patches_cosine": stats.small_sample_mean(x["patches_cosine"]),
            "features_cosine": float(np.mean(x["features_cosine"])),
            **{share: x[share] for share in ("keys_share", "macs_share", "predictor_share")},
        }
        for x in rows
    }
    subject = Measured(path=material.DINOV2, sha256=sha256(weights_file()))
    return Result("evaluation", [subject], method, {"rows": rows}, statistics)


@click.command()
@click.option("--all", "every", is_flag=True, help="Every variant; about half an hour on two cores.")
@click.option("--size", "sizes", type=int, multiple=True, help="Image sizes, with --all; by default all three.")
@click.option("--group", "groups", multiple=True, help="Groups of the table, with --all; by default all.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for fidelity.json.")
def main(every: bool, sizes: tuple[int, ...], groups: tuple[str, ...], output: Path | None) -> None:
    rows = everything(sizes or ALL_SIZES, groups) if every else defaults()
    table(rows)
    if output:
        rows = json.loads(json.dumps(rows, default=float))  # some figures are NumPy's
        write_summary(output / "fidelity.json", result(rows))


if __name__ == "__main__":
    main()
