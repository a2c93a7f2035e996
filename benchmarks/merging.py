"""Compares all tested choices of merging and key selection on development images.

    python benchmarks/merging.py [--size 518] [--group matching] [-o FOLDER]

The model is DINOv2 ViT-S/14, real weights, untrained. Rows give the patch cosine to the dense model over the eight
development photographs and ten training photographs (40 at 224 px; `demo/split.py`), both calibrated on others, and the
multiply-accumulates of all layers. Rows of one group differ in one setting. "default" rows are the product's defaults;
"gain" of the others is the difference of their cosine, image by image.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
import unittest.mock
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import tome
import torch
import torch.nn.functional as F
from accuracy_images import linked
from fidelity_subject import weights_file
from frontier_points import Teacher, in_torch, sum_of_layers
from summary import said, write_summary
from torch import Tensor

from sparsifiner_edge import Budget
from sparsifiner_edge.cli.common import print_table, progress_bar
from sparsifiner_edge.config import Keep, keep_text
from sparsifiner_edge.demo import material, split
from sparsifiner_edge.export.deployed_model import deploy
from sparsifiner_edge.ops import torch_merge as ops
from sparsifiner_edge.ops.torch import rows_at
from sparsifiner_edge.profiles import stats
from sparsifiner_edge.records import write_record
from sparsifiner_edge.results import Result, Subject
from sparsifiner_edge.sparse.hosts.timm import load_model
from sparsifiner_edge.sparse.layer import CarriedTokens
from sparsifiner_edge.sparse.merge import Merging
from sparsifiner_edge.sparse.student import load_student, sparsify

Rate = int | tuple[int, float] | str
Pairs = Callable[..., Tensor]
USUAL: dict[int, Rate] = {224: (20, 1), 518: (160, 1), 1036: (700, 1)}
"""Merging rates when another setting is varied: see `tome.schedule`."""
SCHEDULES: dict[int, tuple[Rate, ...]] = {
    224: (8, 10, 12, (16, 1), (20, 1), (22, 1), (24, 1), (24, 1.5), (28, 1.5), (32, 2), *tome.CHOSEN),
    518: (60, 80, 100, (160, 1), (180, 1), (200, 1.5), (240, 2), (300, 3)),
    1036: (400, (700, 1), (900, 1.5), (1000, 2)),
}
KEEPS: dict[int, tuple[Keep, ...]] = {
    224: (0.5, (0.25, 0.25, 0.5, 1.0)),
    518: (0.5, 0.25, (0.1, 0.1, 1.0), (0.1, 0.1, 0.2, 1.0), (0.1, 0.1, 0.2, 0.5), (0.05, 0.05, 0.05, 1.0)),
    1036: (0.25, (0.05, 0.05, 0.1, 0.25), (0.05, 0.05, 0.1, 0.35, 0.35, 0.35, 1.0), (0.05, 0.05, 0.1, 1.0)),
}
CELLS = {224: 16, 518: 49, 1036: 49}
TRAINING_IMAGES, FEW = {224: 40, 518: 10, 1036: 10}, 4
"""Number of photographs in addition to the eight; number of the eight used at 1036 px, where one takes a minute."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row.

    Attributes:
        group: Group in the table.
        name: Name in the table.
        rate: See `tome.schedule`.
        keep: Shares of keys.
        cells: Background tokens; None for the size's default.
        pairs: Matches pairs instead of MatchTokens.
        merged: Makes the merged tokens instead of MergeTokens.
    """

    group: str
    name: str
    rate: Rate
    keep: Keep = 1.0
    background_tokens: int | None = None
    pairs: Pairs | None = None
    merged: Pairs | None = None


def pairs_by(
    part: Merging,
    qkv: Tensor,
    sizes: Tensor,
    num_heads: int,
    *,
    metric: str = "keys",
    power: float = 1,
    window: int | None = None,
    attended: float = 0,
    energy: float = 0,
) -> Tensor:
    """Run MatchTokens with another metric, window, or power of the sizes.

    Args:
        attended: Power of the class token's attention to a token, an additional weight.
        energy: Weight, in a pair's score, of the similarity of its tokens to all in their windows (PiToMe).
    """
    packed = qkv.unflatten(-1, (3, num_heads, -1))
    queries, keys, values = packed.unbind(2)
    made = {
        "keys": keys.mean(2),
        "all heads": keys.flatten(2),
        "values": values.mean(2),
        "features": part.seen,
        "keys and values": packed[:, :, 1:].flatten(2),
    }[metric]
    logits = (queries[:, :1] * keys).sum(-1) * keys.shape[-1] ** -0.5
    weights = sizes**power * logits.softmax(1).mean(2).clamp_min(1e-9) ** attended
    # MatchTokens uses the mean of the heads' keys: one head holds any metric.
    packed = torch.cat([made, made, made], -1)
    partners = functools.partial(_with_energy, energy) if energy else ops._best_partners
    with unittest.mock.patch.object(ops, "_best_partners", partners):
        return ops.match_tokens(
            packed,
            weights,
            num_heads=1,
            num_prefix=part.prefix,
            window=window or part.window,
            merged=part.merged,
        )


def _with_energy(share: float, metric: Tensor, sizes: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Raise the scores of `_best_partners` by `share` of the mean similarity of a pair to the tokens around it."""
    around = functools.partial(F.avg_pool1d, kernel_size=window + 1, stride=1, padding=window // 2)
    energy = (metric * around(metric.transpose(1, 2)).transpose(1, 2)).sum(-1)
    places = torch.arange((metric.shape[1] + 1) // 2)[:, None] + torch.arange(-window // 2, window // 2)
    outside = (places < 0) | (places >= metric.shape[1] // 2)
    places = places.clamp(0, metric.shape[1] // 2 - 1)
    a, b = sizes[:, ::2, None], sizes[:, 1::2][:, places]
    alike = (metric[:, ::2, None] * metric[:, 1::2][:, places]).sum(-1)
    scores = (a * b / (a + b)).sqrt() * (alike - 1) + share * (energy[:, ::2, None] + energy[:, 1::2][:, places])
    best, place = scores.masked_fill(outside, ops._NOBODY).max(-1)
    return best, places.expand(len(metric), -1, -1).gather(2, place[..., None])[..., 0]


def larger(x: Tensor, _: Tensor, pairs: Tensor) -> Tensor:
    """Run MergeTokens with the larger value per channel (CubistMerge)."""
    a, b = (rows_at(x, side) for side in pairs.long().unbind(-1))
    return torch.where(a.abs() >= b.abs(), a, b)


def of_mean_norm(x: Tensor, sizes: Tensor, pairs: Tensor) -> Tensor:
    """Run MergeTokens with tokens of the mean norm of their sources (ToFu)."""
    lengths = ops._merge_tokens(x.norm(dim=-1, keepdim=True), sizes, pairs)
    return F.normalize(ops._merge_tokens(x, sizes, pairs), dim=-1) * lengths


def variants(size: int) -> list[Variant]:
    """Return every row of a size."""
    usual, many = USUAL[size], size < 1000
    rows = [Variant("schedule", "default matching", rate) for rate in SCHEDULES[size]]
    rows += [Variant("keep", "default", usual, keep) for keep in KEEPS[size]]
    if many:
        tried: dict[str, dict[str, Any]] = {
            "all heads": {"metric": "all heads"},
            "values": {"metric": "values"},
            "features": {"metric": "features"},
            "sizes do not count": {"power": 0},
            "roots of sizes": {"power": 0.5},
            "sizes squared": {"power": 2},
            "window 4": {"window": 4},
            "window 64": {"window": 64},
            "window 256": {"window": 256},
            "keys and values": {"metric": "keys and values"},
            "attention of the class token": {"attended": 0.5},
            "both": {"metric": "keys and values", "attended": 0.5},
            "energy .1": {"energy": 0.1},
            "energy -.1": {"energy": -0.1},
        }
        rows.append(Variant("matching", "default", usual))
        rows += [Variant("matching", name, usual, pairs=functools.partial(pairs_by, **x)) for name, x in tried.items()]
        rows += [
            Variant("matching", name, usual, merged=merged)
            for name, merged in (("larger magnitude", larger), ("mean norm", of_mean_norm))
        ]
        rows += [
            Variant("sparse in one layer", f"layer {layer}", usual, ((1.0,) * layer + (0.1, 1.0))[:12])
            for layer in range(12)
        ]
        rows += [
            Variant("background_tokens", f"{cells} cells", usual, 0.25, background_tokens=cells)
            for cells in (9, 16, 25, 49, 100)
        ]
    return rows


def teachers(size: int) -> dict[str, Teacher]:
    """Return the measured images, and the dense model's tokens of them."""
    training = sorted(split.training())
    sets = {
        "development": split.images("development"),
        "training": training[:: len(training) // TRAINING_IMAGES[size]][: TRAINING_IMAGES[size]],
    }
    return {of: Teacher(size, paths[: FEW if size > 1000 else None]) for of, paths in sets.items()}


def cosines(judges: dict[str, Teacher], model: Any, place: int) -> dict[str, list[float]]:
    """Return patch cosines per image of either set; place: of the tokens among the model's outputs."""
    return {
        of: judge.cosines(lambda x: in_torch(model, x)[place].numpy())["patches_cosine"] for of, judge in judges.items()
    }


def run(variant: Variant, judges: dict[str, Teacher], students: dict[int, Path], size: int) -> dict[str, Any]:
    """Run one row: fidelity and cost."""
    folder = students[variant.background_tokens or CELLS[size]]
    rates, named = tome.schedule(variant.rate, 12)
    student = load_student(folder, budget=Budget(merge=rates, keep=variant.keep))
    model = deploy(student).eval()
    for part in model.modules():
        if isinstance(part, Merging) and variant.pairs:
            part.forward = functools.partial(_remembering, part)
            part.pairs = functools.partial(variant.pairs, part)
    place = model.output_names.index("tokens")
    with unittest.mock.patch.object(ops, "merge_tokens", variant.merged or ops.merge_tokens):
        found = cosines(judges, model, place)
    return {
        "group": variant.group,
        "name": variant.name,
        "merge": named,
        "keep": keep_text(variant.keep),
        "background_tokens": variant.background_tokens or CELLS[size],
        "macs": sum_of_layers(student),
        **found,
    }


def _remembering(part: Any, tokens: CarriedTokens, *given: Any) -> Any:
    part.seen = tokens.values
    return Merging.forward(part, tokens, *given)


def published(size: int, judges: dict[str, Teacher], chained: bool) -> dict[str, Any]:
    """Measure the published rules at the same rates: ToMe (partners anywhere, several into one), or chained: MAT's.

    See `tome.py`.
    """
    model: Any = load_model(material.DINOV2, weights_file(), size)
    schedule, named = tome.schedule(USUAL[size], len(model.blocks))
    rates = list(schedule)
    whole, width = model.patch_embed.num_patches + 1, model.embed_dim
    merged = tome.ToMe(model, rates, chained).eval()
    return {
        "group": "matching",
        "name": "MAT's" if chained else "ToMe's",
        "merge": named,
        "keep": "1",
        "background_tokens": 0,
        "macs": tome.macs(rates, whole, width, 4 * width),
        **cosines(judges, merged, 1),
    }


def measure(size: int, groups: tuple[str, ...]) -> list[dict[str, Any]]:
    known = list(dict.fromkeys(row.group for row in variants(size)))
    if unknown := set(groups) - set(known):
        raise click.UsageError(f"no group {', '.join(unknown)} at {size} px: {', '.join(known)}")
    rows = [row for row in variants(size) if row.group in groups or not groups]
    judges = teachers(size)
    with tempfile.TemporaryDirectory() as scratch, progress_bar(f"{size} px") as progress:
        calibration, students = linked(Path(scratch) / "calibration", split.images("calibration")), {}
        for cells in {row.background_tokens or CELLS[size] for row in rows}:
            students[cells] = sparsify(
                material.DINOV2,
                Path(scratch) / f"{cells}",
                weights=weights_file(),
                img_size=size,
                keep=0.25,
                background_tokens=cells,
                calibrate=calibration,
            )
        found = (
            []
            if size > 1000 or (groups and "matching" not in groups)
            else [published(size, judges, chained) for chained in (False, True)]
        )
        for number, row in enumerate(rows):
            progress(f"{row.group}, {row.name}", number, len(rows))
            found.append(run(row, judges, students, size))
    return found


def with_gains(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Replace samples by means, and add each matching method's gain over all images."""
    means = [row | {of: float(np.mean(row[of])) for of in ("development", "training")} for row in rows]
    for row, mean in zip(rows, means, strict=True):
        default = [other for other in rows if (other["group"], other["name"]) == (row["group"], "default")]
        if len(default) == 1 and row is not default[0]:
            gains = [np.subtract(row[of], default[0][of]) for of in ("development", "training")]
            mean["gain"] = write_record(stats.small_sample_mean(np.concatenate(gains).tolist()))
    return means


def show(size: int, rows: list[dict[str, Any]]) -> None:
    cells = [
        [
            row["group"],
            row["name"],
            row["merge"],
            row["keep"],
            str(row["background_tokens"]),
            f"{row['macs'] / 1e9:.1f}",
            f"{row['development']:.4f}",
            f"{row['training']:.4f}",
            said(row["gain"], 5, "+") if "gain" in row else "",
        ]
        for row in rows
    ]
    heads = ["", "", "merge", "keep", "background_tokens", "G MACs", "development", "training", "gain"]
    print_table(f"{size} px, patch cosine", heads, cells)


@click.command()
@click.option("--size", "sizes", type=click.Choice([str(size) for size in USUAL]), multiple=True, default=["518"])
@click.option("--group", "groups", multiple=True, help="Rows of this group alone.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for merging_<size>.json.")
def main(sizes: tuple[str, ...], groups: tuple[str, ...], output: Path | None) -> None:
    """Compare all tested choices of merging and key selection."""
    for size in map(int, sizes):
        rows = measure(size, groups)
        if output:
            count = {of: len(rows[0][of]) for of in ("development", "training")}
            subjects = [Subject(path=material.DINOV2, sha256="")]
            result = Result("comparison", subjects, count | {"size": size}, {"rows": rows}, {"rows": with_gains(rows)})
            write_summary(output / f"{'_'.join(('merging', str(size), *groups))}.json", result)
        show(size, with_gains(rows))


if __name__ == "__main__":
    main()
