"""Every supported architecture through the same path: sparsify, export, parity with torch, costs.

    python benchmarks/architectures.py [-o FOLDER] [NAME@SIZE ...]

Weights are random, queries and keys scaled up so that heads attend to something: parity and costs do not depend on what
was learnt; accuracy does, and is measured elsewhere on real weights (`fidelity.py`).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click
import torch

from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.cli.common import print_table
from sparsifiner_edge.config import SparsityConfig, default_cells
from sparsifiner_edge.export.export import export_bundle
from sparsifiner_edge.records import write_record
from sparsifiner_edge.results import Result, Subject, write_result
from sparsifiner_edge.sparse.hosts.timm import TimmAttention, create
from sparsifiner_edge.sparse.student import make_student, save_student

MODELS = (
    "deit_tiny_patch16_224@224",
    "deit_small_patch16_224@224",
    "deit_base_patch16_224@224",
    "deit_small_distilled_patch16_224@224",
    "vit_base_patch16_224@224",
    "vit_large_patch16_224@224",
    "vit_small_patch14_dinov2@518",
    "vit_small_patch14_reg4_dinov2@518",
    "eva02_tiny_patch14_224@336",
    "vit_small_patch16_dinov3@512",
    "vit_small_patch16_rope_mixed_224@224",
)
LOGIT_SPREAD = 3.0
"""Standard deviation of the attention logits: fresh weights would attend to everything alike."""
COSTS = ("projections_macs", "predictor_macs", "attention_macs", "cells_macs", "mlp_macs", "total_macs")


@torch.no_grad()
def measure(name: str, size: int, folder: Path) -> dict[str, Any]:
    """One row: export a student with random weights, read the check and costs that its manifest records."""
    torch.manual_seed(0)
    model: Any = create(name, size)
    for block in model.blocks:
        weight = TimmAttention.projection(block.attn)[0]
        weight[: 2 * len(weight) // 3] *= (LOGIT_SPREAD / model.embed_dim) ** 0.5 / float(weight.std())
    keep = 0.25 if model.patch_embed.num_patches < 1000 else 0.10
    sparsity = SparsityConfig(keep=keep, cells=default_cells(model.patch_embed.num_patches))
    student = make_student(name, model, sparsity)
    heads = {type(block.attn).__bases__[-1].__name__ for block in model.blocks}
    manifest = open_bundle(export_bundle(save_student(student, folder / "student"), folder / "bundle")).manifest
    return {
        "name": name,
        "size": size,
        "attention": sorted(heads),
        "sparsity": sparsity.to_dict(),
        "prefix": manifest.tokens.prefix,
        "patches": model.patch_embed.num_patches,
        "check": write_record(manifest.check),
        "costs": manifest.costs,
        "dense_costs": manifest.dense_costs,
    }


def table(rows: list[dict[str, Any]]) -> None:
    cells = []
    for row in rows:
        outputs = row["check"]["outputs"].values()
        dense, ours = row["dense_costs"], row["costs"]
        attention = sum(ours[k] for k in ("predictor_macs", "attention_macs", "cells_macs")) / dense["attention_macs"]
        cells.append(
            [
                row["name"],
                f"{row['size']}",
                f"{row['prefix'] + row['patches']}",
                f"{row['sparsity']['keep']:g}",
                f"{max(o['error_with_equal_selection'] for o in outputs):.0e}",
                f"{min(o['least_row_cosine'] for o in outputs):.6f}",
                f"{row['check']['differing_indices'] / row['check']['selected_indices']:.0e}",
                f"{ours['predictor_macs'] / dense['attention_macs']:.1%}",
                f"{attention:.1%}",
                f"{dense['total_macs'] / 1e9:.2f}",
                f"{ours['total_macs'] / 1e9:.2f}",
            ]
        )
    columns = ["", "px", "tokens", "keep", "error", "cosine", "keys off", "pred.", "attn.", "dense", "sparse"]
    print_table(
        "Exported file against torch; predictor and attention as shares of dense attention; GMACs", columns, cells
    )


@click.command()
@click.argument("models", nargs=-1)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for architectures.json.")
def main(models: tuple[str, ...], output: Path | None) -> None:
    rows = []
    for model in models or MODELS:
        name, _, size = model.partition("@")
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(name, int(size), Path(folder)))
        click.echo(f"{name} done", err=True)
    table(rows)
    if output:
        output.mkdir(parents=True, exist_ok=True)
        method = {
            "weights": "random, seed 0; q, k scaled to logits of deviation 3",
            "check": "export gate, one random image",
        }
        statistics = {
            row["name"]: {k: row["costs"][k] for k in COSTS} | {"dense_total_macs": row["dense_costs"]["total_macs"]}
            for row in rows
        }
        subjects = [Subject(path=row["name"], sha256="random weights") for row in rows]
        write_result(output / "architectures.json", Result("evaluation", subjects, method, {"rows": rows}, statistics))


if __name__ == "__main__":
    main()
