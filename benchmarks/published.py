"""Every published row that gives multiply-adds: what this tool makes of it, and the commands for it.

    python benchmarks/published.py [-o FOLDER]    # Sparsifiner, CVPR 2023

Published "MHSA FLOPs" are MACs of logits and weighted sums plus the predictor. Their counter is not published; 6.12 M a
layer at 197 tokens fits every row of table 1. The channel reduction of queries and keys is 4.84 M of that and follows
the tokens; what is left follows their square. With keys counted as the published code counts them, of all the image's
tokens, that gives the rows that prune as well; students that prune count keys of the tokens that are left, so these
rows are arithmetic alone, without commands. "own count" takes the MACs of the published predictor's products as
`costs.py` counts them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import click
from summary import write_summary

from sparsifiner_edge import costs as costs_module
from sparsifiner_edge.artifacts import sha256
from sparsifiner_edge.cli.common import print_table
from sparsifiner_edge.config import SparsityConfig, share_of
from sparsifiner_edge.costs import ModelShape, layer_costs
from sparsifiner_edge.plan import plan_of
from sparsifiner_edge.results import Result, Subject

DEIT_S = ModelShape(depth=12, heads=6, width=384, hidden=1536, prefix=1, patches=196, patch=16)
LV_S = ModelShape(depth=16, heads=6, width=384, hidden=1152, prefix=1, patches=196, patch=16)
TOKENS, CHANNELS = 197, 32
FITTED = 6.12e6
"""MACs of the published predictor per layer at 197 tokens, fitted to table 1."""
REDUCTION = 2.0 * TOKENS * 384 * CHANNELS
"""Of these, the channel reduction."""
TABLE_1 = {
    0.9: (396.8, 80.02), 0.8: (360.6, 79.97), 0.7: (324.6, 79.96), 0.6: (290.3, 79.98), 0.5: (254.2, 79.94),
    0.4: (218.0, 79.92), 0.3: (183.6, 79.83), 0.2: (147.5, 79.71), 0.1: (111.4, 79.42), 0.05: (93.3, 78.75),
    0.01: (78.9, 73.03),
}  # fmt: skip


class Row(NamedTuple):
    """A published row: its name, model, share of tokens kept in layers 3, 6 and 9, share of keys, M of MACs, top-1."""

    name: str
    shape: ModelShape
    tokens: float
    keep: float
    macs: float
    top1: float


ROWS = (
    Row("DeiT-S dense", DEIT_S, 1.0, 1.0, 357.7, 79.82),
    *(Row(f"Sparsifiner, keep {keep:g}", DEIT_S, 1.0, keep, *found) for keep, found in TABLE_1.items()),
    Row("EViT, tokens .7", DEIT_S, 0.7, 1.0, 193.1, 79.5),
    Row("EViT, tokens .5", DEIT_S, 0.5, 1.0, 149.1, 78.5),
    Row("DynamicViT, tokens .7", DEIT_S, 0.7, 1.0, 193.1, 79.3),
    Row("DynamicViT, tokens .5", DEIT_S, 0.5, 1.0, 149.1, 77.3),
    Row("Sparsifiner-EViT, tokens .7, keep .25", DEIT_S, 0.7, 0.25, 113.3, 79.5),
    Row("Sparsifiner-EViT, tokens .5, keep .25", DEIT_S, 0.5, 0.25, 86.6, 78.7),
    Row("Sparsifiner (DynamicViT), tokens .7, keep .25", DEIT_S, 0.7, 0.25, 113.3, 79.3),
    Row("Sparsifiner (DynamicViT), tokens .5, keep .25", DEIT_S, 0.5, 0.25, 86.6, 78.4),
    Row("LV-ViT-S dense", LV_S, 1.0, 1.0, 476.9, 83.3),
    Row("Sparsifiner-LV-S, keep 0.5", LV_S, 1.0, 0.5, 339.7, 83.4),
    Row("Sparsifiner-LV-S, keep 0.25", LV_S, 1.0, 0.25, 221.7, 83.3),
    Row("Sparsifiner-LV-S, keep 0.1", LV_S, 1.0, 0.1, 149.5, 82.8),
)
TRAIN = (
    "accelerate launch --num_processes 8 --multi_gpu -m sparsifiner_edge distill STUDENT/ --data IMAGENET/train "
    "--held-out IMAGENET/val --labels --recipe imagenet-deit-s -o TRAINED/"
)
MEASURE = "sparsifiner-edge evaluate TRAINED/ --against deit_small_patch16_224 --data IMAGENET/val --metric top1"


def sparsity_of(row: Row) -> SparsityConfig:
    """As the published code prunes and counts."""
    pruned = tuple((layer, row.tokens) for layer in (3, 6, 9)) if row.tokens < 1 else ()
    if row.keep == 1:
        return SparsityConfig(keep=1, token_keep=pruned)
    plan = plan_of(SparsityConfig(keep=1, token_keep=pruned), row.shape.depth, row.shape.patches)
    counts = plan.tokens(row.shape.patches)[:-1]
    shares = tuple(min(share_of(row.keep, TOKENS), patches) / (patches + 1) for patches in counts)
    return SparsityConfig.for_preset("paper", keep=shares, channels=CHANNELS, token_keep=pruned)


def made_by(row: Row) -> str:
    """The command that makes the row's student; "" where there is none."""
    if (
        row.shape is LV_S
        or (row.keep, row.tokens) == (1, 1)
        or "DynamicViT" in row.name
        or max(row.keep, row.tokens) < 1
    ):
        return ""  # The dense model is the teacher.
    pruned = ",".join(f"{layer}:{share:g}" for layer, share in sparsity_of(row).token_keep)
    words = ["--preset paper"] * (row.keep < 1) + [f"--keep {row.keep:g}"] + [f"--token-keep {pruned}"] * bool(pruned)
    return f"sparsifiner-edge sparsify deit_small_patch16_224 {' '.join(words)} -o STUDENT/"


def counted(row: Row) -> dict[str, Any]:
    """MACs in millions, predictor fitted and as we count it."""
    sparsity = sparsity_of(row)
    costs = layer_costs(row.shape, sparsity)
    patches = plan_of(sparsity, row.shape.depth, row.shape.patches).tokens(row.shape.patches)[:-1]
    core = sum(c["attention"].macs + c["cells"].macs for c in costs) / 1e6
    shares = [(count + 1) / TOKENS for count in patches] if row.keep < 1 else []
    fitted = sum(REDUCTION * share + (FITTED - REDUCTION) * share**2 for share in shares) / 1e6
    made, train = made_by(row), TRAIN + " --set reconstruct.epochs=0" * (row.keep == 1)  # No predictor to begin with.
    return {
        "name": row.name,
        "core": core,
        "fitted": core + fitted,
        "own": core + sum(c["predictor"].macs for c in costs) / 1e6,
        "published": row.macs,
        "difference": (core + fitted) / row.macs - 1,
        "top1_published": row.top1,
        "commands": [made, train, MEASURE] if made else [],
    }


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for published.json.")
def main(output: Path | None) -> None:
    """See the module's documentation."""
    rows = [counted(row) for row in ROWS]
    cells = [
        [r["name"], *(f"{r[k]:.1f}" for k in ("core", "own", "fitted", "published")), f"{r['difference']:+.2%}",
         f"{r['top1_published']:.2f}"]
        for r in rows
    ]  # fmt: skip
    head = ["", "core", "own count", "fitted", "published", "fitted / published", "published top-1"]
    print_table("Millions of MACs", head, cells)
    click.echo("The students (timm has no LV-ViT, a module of your own can be one; tokens are pruned as EViT does it):")
    for r in rows:
        if r["commands"]:
            click.echo(f"  {r['commands'][0]}")
    click.echo(
        f"Each is trained by\n  {TRAIN}\n(with --keep 1: --set reconstruct.epochs=0) and measured by\n  {MEASURE}"
    )
    if output:
        statistics = {r["name"]: {k: v for k, v in r.items() if k not in ("name", "commands")} for r in rows}
        subject = Subject(path="sparsifiner_edge/costs.py", sha256=sha256(Path(costs_module.__file__)))
        result = Result("evaluation", [subject], {"unit": "million MACs"}, {"rows": rows}, statistics)
        write_summary(output / "published.json", result)


if __name__ == "__main__":
    main()
