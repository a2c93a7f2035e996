"""Tests every supported architecture on the same path: sparsify, export, parity with torch, costs.

    python benchmarks/architectures.py [-o FOLDER] [NAME@SIZE ...]

Models are from timm and transformers. Weights are random, with queries and keys scaled up so that attention is not
uniform. Parity and costs do not depend on training; accuracy does, and is measured separately with real weights
(`fidelity.py`).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click
import torch
import transformers
from summary import write_summary

import sparsifiner_edge as se
from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.cli.common import print_table
from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.costs import summary
from sparsifiner_edge.records import write_record
from sparsifiner_edge.results import Result, Subject
from sparsifiner_edge.sparse.hosts import backbone_of, hugging_face
from sparsifiner_edge.sparse.hosts.timm import create

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
    "ViTModel@224",
    "Dinov2Model@518",
    "Dinov2WithRegistersModel@518",
    "DINOv3ViTModel@512",
    "SiglipVisionModel@384",
    "CLIPVisionModel@336",
    "DepthAnythingForDepthEstimation@518",
)
SMALL = {"hidden_size": 384, "num_attention_heads": 6}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "Dinov2Model": SMALL | {"image_size": 518, "patch_size": 14},
    "Dinov2WithRegistersModel": SMALL | {"image_size": 518, "patch_size": 14},
    "DINOv3ViTModel": SMALL | {"intermediate_size": 1536, "num_register_tokens": 4},
    "CLIPVisionModel": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
    },
}
"""Changes to the defaults of transformers' classes: DINOv2 and DINOv3 ViT-S, CLIP ViT-L/14."""
LOGIT_SPREAD = 3.0
"""Standard deviation of the attention logits: attention of fresh weights is nearly uniform."""
COSTS = ("projections_macs", "predictor_macs", "attention_macs", "cells_macs", "mlp_macs", "total_macs")


def random_model(name: str, size: int) -> Any:
    """Return a model of a timm name or transformers class with random weights."""
    torch.manual_seed(0)
    kind = getattr(transformers, name, None)
    if kind is None:
        return create(name, size)
    if name.startswith("DepthAnything"):
        backbone = transformers.Dinov2Config(
            **CONFIGURATIONS["Dinov2Model"], out_indices=[3, 6, 9, 12], reshape_hidden_states=False
        )
        sizes = {"neck_hidden_sizes": [48, 96, 192, 384], "reassemble_hidden_size": 384, "fusion_hidden_size": 64}
        return kind(transformers.DepthAnythingConfig(backbone_config=backbone, **sizes)).eval()
    return hugging_face.for_size(kind(kind.config_class(**CONFIGURATIONS.get(name, {}))).eval(), size)


@torch.no_grad()
def measure(name: str, size: int, folder: Path) -> dict[str, Any]:
    """Measure one row: export a model with random weights, read the check and costs from its manifest."""
    model = random_model(name, size)
    backbone = backbone_of(model)
    for attention in backbone.attentions:
        packed = getattr(attention, "qkv", None)
        parts = (
            [packed.weight[: 2 * len(packed.weight) // 3]]
            if packed is not None
            else [
                attention.q_proj.weight,
                attention.k_proj.weight,
            ]
        )
        for weight in parts:
            weight.mul_((LOGIT_SPREAD / backbone.width) ** 0.5 / float(weight.std()))
    se.sparsify_model(model, keep=0.25 if backbone.patches < 1000 else 0.10)
    example = torch.zeros(1, 3, *backbone.image_size)
    bundle = open_bundle(se.export_model(model, example, folder / "bundle", normalise=((0.5,) * 3, (0.25,) * 3)))
    manifest, sparsity = bundle.manifest, backbone.sparsity
    assert sparsity is not None
    assert manifest.shape is not None
    return {
        "name": name,
        "host": backbone.library,
        "size": size,
        "outputs": {output.name: list(output.shape) for output in manifest.outputs},
        "sparsity": sparsity.to_dict(),
        "prefix": backbone.prefix,
        "patches": backbone.patches,
        "check": write_record(manifest.check),
        "costs": summary(manifest.shape, sparsity),
        "dense_costs": summary(manifest.shape, SparsityConfig(keep=1)),
    }


def short(row: dict[str, Any]) -> dict[str, Any]:
    """Return its parity and costs for the summary."""
    check, dense = row["check"], row["dense_costs"]
    return {
        "size": row["size"],
        "tokens": row["prefix"] + row["patches"],
        "keep": row["sparsity"]["keep"],
        "error": max(check["errors_with_equal_selection"].values()),
        "least_row_cosine": min(check["least_row_cosines"].values()),
        "differing_share": check["differing_indices"] / check["selected_indices"],
        **{name: row["costs"][name] for name in COSTS},
        "dense_attention_macs": dense["attention_macs"],
        "dense_total_macs": dense["total_macs"],
    }


def table(rows: dict[str, dict[str, Any]]) -> None:
    cells = []
    for name, row in rows.items():
        dense, attention = row["dense_attention_macs"], ("predictor_macs", "attention_macs", "cells_macs")
        cells.append(
            [
                name,
                f"{row['size']}",
                f"{row['tokens']}",
                f"{row['keep']:g}",
                f"{row['error']:.0e}",
                f"{row['least_row_cosine']:.6f}",
                f"{row['differing_share']:.0e}",
                f"{row['predictor_macs'] / dense:.1%}",
                f"{sum(row[kind] for kind in attention) / dense:.1%}",
                f"{row['dense_total_macs'] / 1e9:.2f}",
                f"{row['total_macs'] / 1e9:.2f}",
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
    statistics = {row["name"]: short(row) for row in rows}
    table(statistics)
    if output:
        method = {
            "weights": "random, seed 0; q, k scaled to logits of deviation 3",
            "check": "export gate, one random image",
        }
        subjects = [Subject(path=row["name"], sha256="random weights") for row in rows]
        write_summary(output / "architectures.json", Result("evaluation", subjects, method, {"rows": rows}, statistics))


if __name__ == "__main__":
    main()
