"""Fidelity of untrained students: what to select, and what to do with the rest.

    python benchmarks/fidelity.py                      the rule at 224 and 518 px, beside what is required
    python benchmarks/fidelity.py --all [-o FOLDER]    every variant, at 224, 518 and 1036 px: table and JSON
    python benchmarks/fidelity.py --all --group 'cells of a board' --size 518 --size 1036       some of them

Cosine to dense DINOv2 ViT-S/14 over the eight development photographs (the defaults also over the publication set,
`demo/split.py`), calibrated on other images.
"keys" is the share of all keys that a query reads, background included; "MACs" counts predictor, attention and cells
against dense attention; "error" is the relative error of the attention output, on the teacher's own activations, mean
over the layers.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import tome
import torch
import torch.nn.functional as F
from fidelity_subject import (
    ORDERS,
    Fidelity,
    Subject,
    aggregated,
    cell_means,
    local_window,
    random_keys,
    reused,
    true_attention,
    weights_file,
)
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
REQUIRED = {(224, 0.25, 16): 0.993, (224, 0.10, 16): 0.975, (518, 0.10, 25): 0.987, (518, 0.0625, 36): 0.980}
"""Patch cosine that this project aims at, by size, keep and cells."""
ALL_SIZES = (224, 518, 1036)
PAPER = "paper preset, pooled start"


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row: how it departs from the defaults.

    Attributes:
        group, name: where and as what the table shows it.
        changes: fields of SparsityConfig.
        source: how the projections are found.
        measure: runs a configured subject.
        sizes: image sizes at which it is run with --all.
    """

    group: str
    name: str
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    source: str = "descent"
    measure: Callable[[Subject], Fidelity] = Subject.measure
    order: str = "Hilbert"
    sizes: tuple[int, ...] = (224, 518)


DEFAULT = Variant("default", "edge", sizes=ALL_SIZES)


def variants() -> list[Variant]:
    """Every variant that was tried."""
    rows = [DEFAULT]
    # The required settings that are not a size's default.
    rows += [Variant("default", "keep 0.1", {"keep": 0.1}, sizes=(224,))]
    rows += [Variant("default", "keep 0.0625, 36 cells", {"keep": 0.0625, "cells": 36}, sizes=(518,))]
    rows += [
        Variant("keep", f"keep {k}", {"keep": k}, sizes=ALL_SIZES if k < 0.2 else (224, 518))
        for k in (0.5, 0.25, 0.1, 0.05)
    ]
    # At most 9 % of the keys in all, dealt between listed keys and cells.
    rows += [
        Variant("budget 9 %", f"keep {k}, {c} cells", {"keep": k, "cells": c}, sizes=(518,))
        for k, c in ((0.07, 25), (0.05, 49), (0.04, 64))
    ]
    rows += [Variant("order", name, order=name) for name in ORDERS if name != "Hilbert"]
    rows += [Variant("probe", f"probe {p}", {"probe": p}) for p in (2, 4, 16)]
    rows += [Variant("tile", f"tile {t}", {"tile": t}, sizes=ALL_SIZES if t == 64 else (224, 518)) for t in (8, 32, 64)]
    rows += [
        Variant("aggregation", f"power mean {p:g}", measure=lambda s, p=p: s.measure(aggregated(p))) for p in (1, 2, 4)
    ]
    rows += [Variant("channels", f"{c} channels", {"channels": c}) for c in (8, 16, 32, 48)]
    rows += [Variant("channels", "all 64 channels", {"channels": 64}, "exact")]
    rows += [Variant("projections", f"from {s}", source=s) for s in ("weights", "moments", "at size")]
    rows += [Variant("value power", f"power {p:g}", {"value_power": p}) for p in (0.0, 1.0, 3.0)]
    rows += [
        Variant("cells", f"{c} cells", {"cells": c}, sizes=ALL_SIZES if c in (0, 25, 100) else (224, 518))
        for c in (0, 4, 9, 16, 25, 49, 100)
    ]
    rows += [
        Variant("cells of a board", f"tile 64, {c} cells", {"tile": 64, "cells": c}, sizes=(518, 1036))
        for c in (49, 31)
    ]
    rows += [
        Variant("cells", "mean over all tokens", measure=lambda s: s.measure(attend=cell_means("all"))),
        Variant("cells", "temperature 1.2", measure=lambda s: s.measure(attend=cell_means("rest", 1.2))),
        Variant("cells", "temperature 0.8", measure=lambda s: s.measure(attend=cell_means("rest", 0.8))),
        Variant("layers", "first dense", {"dense_layers": (0,)}, measure=lambda s: dense_layers(s, (0,))),
        Variant("layers", "last dense", {"dense_layers": (11,)}, measure=lambda s: dense_layers(s, (11,))),
        Variant("layers", "keep by sensitivity", measure=by_sensitivity),
        Variant("layers", "every 2nd layer chooses", measure=lambda s: s.measure(reused(2), errors=False)),
        Variant("bounds", "oracle, maximum", {"channels": 64}, "exact", lambda s: s.measure(true_attention(None))),
        Variant("bounds", "oracle, mean", {"channels": 64}, "exact", lambda s: s.measure(true_attention(1.0))),
        Variant("baselines", "local window", measure=lambda s: s.measure(local_window(s.model)), sizes=ALL_SIZES),
        Variant("baselines", "random keys", measure=lambda s: s.measure(random_keys), sizes=ALL_SIZES),
        Variant(
            "baselines", "local window, no cells", {"cells": 0}, measure=lambda s: s.measure(local_window(s.model))
        ),
    ]
    return rows


def dense_layers(subject: Subject, dense: tuple[int, ...]) -> Fidelity:
    """The rest sparse."""
    for number in dense:
        layer = subject.layers[number]
        layer.layout = dataclasses.replace(layer.layout, keys=layer.layout.patches)
    return subject.measure()


def by_sensitivity(subject: Subject) -> Fidelity:
    """The same keys in all, dealt to layers by the cube root of their attention error on calibration images."""
    keep = subject.layers[0].sparsity.keep
    photographs, subject.photographs = subject.photographs, subject.calibration[:4]
    errors = np.array(subject._layer_errors())
    subject.photographs = photographs
    share = errors ** (1 / 3)
    keeps = np.clip(keep * share / share.mean(), 0.01, 1.0)
    for layer, value in zip(subject.layers, keeps, strict=True):
        subject._set(layer, dataclasses.replace(layer.sparsity, keep=float(value)))
    return subject.measure()


def base(size: int) -> SparsityConfig:
    """The defaults at an image size."""
    return SparsityConfig(keep=KEEP[size], cells=CELLS[size])


def run(variant: Variant, subject: Subject) -> dict[str, Any]:
    """One row: measured fidelity, and what it costs."""
    start = time.monotonic()
    sparsity = dataclasses.replace(
        base(subject.size), **{k: v for k, v in variant.changes.items() if k != "dense_layers"}
    )
    subject.configure(sparsity, variant.source)
    found = variant.measure(subject)
    kept = variant.changes.get("dense_layers", ())
    shares = tuple(1.0 if layer in kept else sparsity.keep for layer in range(len(subject.layers)))
    priced = dataclasses.replace(sparsity, keep=shares) if kept else sparsity
    shape = model_shape(subject.model)
    costs, dense = layer_costs(shape, priced), layer_costs(shape, SparsityConfig(keep=1))
    dense_macs = sum(c.attention for c in dense)
    layout = sparsity.layout(subject.patches)
    return {
        "group": variant.group,
        "name": variant.name,
        "size": subject.size,
        "sparsity": sparsity.to_dict(),
        "projections": variant.source,
        "order": variant.order,
        "keys_share": (layout.keys + layout.cells) / layout.patches,
        "macs_share": sum(c.predictor + c.attention + c.cells for c in costs) / dense_macs,
        "predictor_share": sum(c.predictor for c in costs) / dense_macs,
        "features_cosine": found.features,
        "patches_cosine": found.patches,
        "layer_errors": found.errors or {"unavailable": "layers share a selection"},
        "seconds": time.monotonic() - start,
    }


def merged_tokens(size: int) -> dict[str, Any]:
    """ToMe (`tome.py`) at the MACs of a whole model with the defaults."""
    subject = Subject(size)
    shape = model_shape(subject.model)
    tokens, dense = shape.prefix + shape.patches, SparsityConfig(keep=1)
    wanted = sum(getattr(c, kind) for c in layer_costs(shape, base(size)) for kind in MAC_KINDS)
    rates = next(
        rates
        for rates in (tome.constant(rate, shape.depth) for rate in range(1, shape.patches))
        if tome.macs(rates, tokens, shape.width, shape.hidden) <= wanted
    )
    model = tome.ToMe(dense_twin(subject.student).model, rates).eval()
    features, patches = [], []
    with torch.no_grad():
        for path, teacher in zip(split.development(), subject.teacher, strict=True):
            found = F.cosine_similarity(model(torch.from_numpy(load_image(path, size)[None]))[1], teacher, dim=-1)[0]
            features.append(float(found[0]))
            patches.append(float(found[1:].mean()))
    counts = tome.token_counts(rates, tokens)[:-1]
    whole = sum(c.attention for c in layer_costs(shape, dense))
    return {
        "group": "baselines",
        "name": f"ToMe, r = {rates[0]} a layer",
        "size": size,
        "sparsity": {},
        "projections": "none",
        "order": "raster",
        "keys_share": sum(counts) / len(counts) / counts[0],
        "macs_share": sum(2 * n * n * shape.width for n in counts) / whole,
        "predictor_share": 0.0,
        "features_cosine": features,
        "patches_cosine": patches,
        "layer_errors": {"unavailable": "merged tokens have no counterpart in the teacher"},
        "seconds": 0.0,
    }


def paper_preset(size: int) -> dict[str, Any]:
    """The published method before training: pooled start, projections from images."""
    subject = Subject(size, "paper")
    sparsity = SparsityConfig.for_preset("paper", keep=KEEP[size], channels=32)
    subject.configure(sparsity, "moments")
    found = subject.measure()
    shape = model_shape(subject.model)
    dense_macs = sum(c.attention for c in layer_costs(shape, SparsityConfig(keep=1)))
    costs = layer_costs(shape, sparsity)
    return {
        "group": "baselines",
        "name": PAPER,
        "size": size,
        "sparsity": sparsity.to_dict(),
        "projections": "moments",
        "order": "raster",
        "keys_share": sparsity.keep,
        "macs_share": sum(c.predictor + c.attention for c in costs) / dense_macs,
        "predictor_share": sum(c.predictor for c in costs) / dense_macs,
        "features_cosine": found.features,
        "patches_cosine": found.patches,
        "layer_errors": found.errors,
        "seconds": 0.0,
    }


def defaults() -> list[dict[str, Any]]:
    """The settings of `REQUIRED`, and each on the photographs that nothing was chosen by."""
    rows = []
    for size in (224, 518):
        for group, photographs in (("default", None), ("publication", split.publication())):
            subject = Subject(size, photographs=photographs)
            for keep, cells in ((keep, cells) for wanted, keep, cells in REQUIRED if wanted == size):
                settings = {"keep": keep, "cells": cells}
                rows.append(run(Variant(group, f"keep {keep}, {cells} cells", settings), subject))
    return rows


def everything(sizes: tuple[int, ...], groups: tuple[str, ...]) -> list[dict[str, Any]]:
    """Every variant at its sizes, of these groups if any are named."""
    rows = []
    for size in sizes:
        for order in ORDERS:
            chosen = [v for v in variants() if size in v.sizes and v.order == order]
            chosen = [v for v in chosen if v.group in groups or not groups]
            if not chosen:
                continue
            subject = Subject(size)
            subject.reorder(ORDERS[order](*subject.model.patch_embed.grid_size))
            for variant in chosen:
                rows.append(run(variant, subject))
                click.echo(f"{size} px, {variant.group}: {variant.name}", err=True)
        if "baselines" in groups or not groups:
            # Lists of one query each take an hour at 1036 px.
            rows += [merged_tokens(size), *([paper_preset(size)] if size < 1000 else [])]
    return rows


def table(rows: list[dict[str, Any]]) -> None:
    cells = []
    for row in rows:
        sparsity = row["sparsity"] or {}
        wanted = REQUIRED.get((row["size"], sparsity.get("keep"), sparsity.get("cells")))
        errors = row["layer_errors"]
        cells.append(
            [
                f"{row['group']}: {row['name']}",
                str(row["size"]),
                f"{row['keys_share']:.1%}",
                f"{row['macs_share']:.1%}",
                f"{row['predictor_share']:.1%}",
                f"{np.mean(errors):.3f}" if isinstance(errors, list) else "",
                f"{np.mean(row['features_cosine']):.4f}",
                f"{np.mean(row['patches_cosine']):.4f}",
                f"{wanted:.3f}" if wanted and row["group"] == "default" else "",
            ]
        )
    columns = ["", "px", "keys", "MACs", "predictor", "error", "CLS", "patches", "aim"]
    print_table("Untrained DINOv2 ViT-S/14 against dense, eight photographs", columns, cells)


def result(rows: list[dict[str, Any]]) -> dict[str, Any]:
    method = {
        "metric": "cosine to the dense teacher, patches and class token, untrained",
        "photographs": len(split.development()),
        "publication": len(split.publication()),
        "calibration": len(split.calibration()),
        "intervals": "Student's t over photographs",
    }
    statistics = {}
    for row in rows:
        key = f"{row['size']} px / {row['group']} / {row['name']}"
        statistics[key] = {
            "patches_cosine": stats.small_sample_mean(row["patches_cosine"]),
            "features_cosine": float(np.mean(row["features_cosine"])),
            **{k: row[k] for k in ("keys_share", "macs_share", "predictor_share")},
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
