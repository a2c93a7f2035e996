"""Our cost model beside the published counts (Sparsifiner, CVPR 2023, tables 1 and 2; EViT, DynamicViT for dense rows).

    python benchmarks/published.py [-o FOLDER]

Published "MHSA FLOPs" are MACs of logits and weighted sums plus the predictor. Their counter is not published; 6.12 M a
layer at 197 tokens fits every row of table 1, and is scaled by the square of the tokens for pruned layers: its products
are between tokens and landmarks, whose number follows the tokens. "own count" takes the MACs of the published
predictor's products as `costs.py` counts them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sparsifiner_edge import costs as costs_module
from sparsifiner_edge.artifacts import sha256
from sparsifiner_edge.cli.common import print_table
from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.costs import ModelShape, layer_costs
from sparsifiner_edge.results import Result, Subject, write_result

DEIT_S = ModelShape(depth=12, heads=6, width=384, hidden=1536, prefix=1, patches=196, patch=16)
LV_S = ModelShape(depth=16, heads=6, width=384, hidden=1152, prefix=1, patches=196, patch=16)
FITTED = 6.12e6
"""MACs of the published predictor per layer at 197 tokens, fitted to table 1."""
TABLE_1 = {
    0.9: 396.8, 0.8: 360.6, 0.7: 324.6, 0.6: 290.3, 0.5: 254.2, 0.4: 218.0, 0.3: 183.6, 0.2: 147.5, 0.1: 111.4,
    0.05: 93.3, 0.01: 78.9,
}  # fmt: skip
ROWS = (
    ("DeiT-S dense", DEIT_S, 1.0, 1.0, 357.7),
    *((f"Sparsifiner, keep {keep:g}", DEIT_S, 1.0, keep, macs) for keep, macs in TABLE_1.items()),
    ("EViT, DynamicViT, tokens .7", DEIT_S, 0.7, 1.0, 193.1),
    ("EViT, DynamicViT, tokens .5", DEIT_S, 0.5, 1.0, 149.1),
    ("Sparsifiner, tokens .7, keep .25", DEIT_S, 0.7, 0.25, 113.3),
    ("Sparsifiner, tokens .5, keep .25", DEIT_S, 0.5, 0.25, 86.6),
    ("LV-ViT-S dense", LV_S, 1.0, 1.0, 476.9),
    *((f"Sparsifiner-LV-S, keep {k:g}", LV_S, 1.0, k, m) for k, m in ((0.5, 339.7), (0.25, 221.7), (0.1, 149.5))),
)
"""Name, shape, token keep rate in layers 3, 6 and 9, attention keep rate, published M."""


def row(name: str, shape: ModelShape, tokens: float, keep: float, published: float) -> dict[str, Any]:
    """MACs in millions, predictor fitted and as we count it."""
    pruned = tuple((layer, tokens) for layer in (3, 6, 9)) if tokens < 1 else ()
    paper = SparsityConfig.for_preset("paper", keep=keep, channels=32, token_keep=pruned)
    sparsity = paper if keep < 1 else SparsityConfig(keep=1, token_keep=pruned)
    costs = layer_costs(shape, sparsity)
    patches = [count for count, _ in sparsity.layer_tokens(shape.depth, shape.patches, shape.prefix)][:-1]
    core = sum(c.attention + c.cells for c in costs) / 1e6
    fitted = sum(FITTED * ((count + 1) / 197) ** 2 for count in patches) / 1e6 if keep < 1 else 0.0
    own = sum(c.predictor for c in costs) / 1e6
    return {
        "name": name,
        "core": core,
        "fitted": core + fitted,
        "own": core + own,
        "published": published,
        "difference": (core + fitted) / published - 1,
    }


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for published.json.")
def main(output: Path | None) -> None:
    rows = [row(*entry) for entry in ROWS]
    cells = [
        [r["name"], *(f"{r[k]:.1f}" for k in ("core", "own", "fitted", "published")), f"{r['difference']:+.2%}"]
        for r in rows
    ]
    print_table("Millions of MACs", ["", "core", "own count", "fitted", "published", "fitted / published"], cells)
    if output:
        output.mkdir(parents=True, exist_ok=True)
        statistics = {r["name"]: {"difference": r["difference"]} for r in rows}
        subject = Subject(path="sparsifiner_edge/costs.py", sha256=sha256(Path(costs_module.__file__)))
        result = Result("evaluation", [subject], {"unit": "million MACs"}, {"rows": rows}, statistics)
        write_result(output / "published.json", result)


if __name__ == "__main__":
    main()
