"""Compares complete models on a CUDA GPU: sparse with dense, in torch, both compiled and as CUDA graphs.

    python benchmarks/model_gpu.py [--model vit_small_patch14_dinov2.lvd142m] [--size 448 ...] [-o FOLDER]

Weights are random, which does not affect time, in float16. The dense model uses the backend of
scaled_dot_product_attention that is fastest for it. Sizes 448, 672, 896 and 1344 make 1025 to 9217 tokens of 14 pixels.
Without a CUDA device the exit code is 2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch
from gpu_engines import Run, by_backend, compare, graph, require_gpu, show
from summary import write_summary

from sparsifiner_edge.cli.common import err_console
from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.results import Result, Subject
from sparsifiner_edge.sparse.hosts.timm import create, preprocessing
from sparsifiner_edge.sparse.student import Student, make_student

SIZES = (448, 672, 896, 1344)
STUDENTS = {
    "keep .25": {"keep": 0.25},
    "keep .10": {"keep": 0.10},
    "merged": {"keep": 1.0, "merge": (0.12, 0.0)},
    "merged, keep .10": {"keep": 0.10, "merge": (0.12, 0.0)},
}
"""Settings of sparse models; merge is the share of the patches in the first layer, falling to the second."""


def dense_runs(name: str, image: torch.Tensor) -> tuple[dict[str, Run], dict[str, str]]:
    """Return graphs of the dense model by attention backend, and why others cannot run."""
    torch.manual_seed(0)
    model = create(name, image.shape[-1], 0).half().cuda()
    return by_backend(lambda: model.forward_features(image))


def sparse_run(name: str, image: torch.Tensor, settings: dict[str, Any], tile: int) -> Run:
    torch.manual_seed(0)
    model = create(name, image.shape[-1], 0)
    merge = tuple(round(share * model.patch_embed.num_patches) for share in settings.get("merge", ()))
    sparsity = SparsityConfig(keep=settings["keep"], tile=tile, query_pool=min(16, tile), merge=merge)
    sparse = make_student(Student(model, name, preprocessing(model)), sparsity).model.half().cuda()
    return graph(torch.compile(lambda: sparse.forward_features(image)))


def measure(name: str, size: int, batch: int, tile: int, rounds: int) -> tuple[dict[str, Any], dict[str, Any]]:
    image = torch.rand(batch, 3, size, size, device="cuda", dtype=torch.float16)

    def ours() -> dict[str, Run]:
        return {label: sparse_run(name, image, settings, tile) for label, settings in STUDENTS.items()}

    return compare(dense_runs(name, image), ours, rounds, 5)


@click.command()
@click.option("--model", "name", default="vit_small_patch14_dinov2.lvd142m", show_default=True)
@click.option("--size", "sizes", type=int, multiple=True, default=SIZES, help="Repeatable.")
@click.option("--batch", type=int, default=8, show_default=True)
@click.option("--tile", type=int, default=64, show_default=True)
@click.option("--rounds", type=int, default=15, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for model_gpu.json.")
def main(name: str, sizes: tuple[int, ...], batch: int, tile: int, rounds: int, output: Path | None) -> None:
    method = {**require_gpu(), "model": name, "batch": batch, "tile": tile, "rounds": rounds, "dtype": "float16"}
    samples, statistics = {}, {}
    for size in sizes:
        err_console.print(f"{size} px")
        samples[str(size)], statistics[str(size)] = measure(name, size, batch, tile, rounds)
        show(f"{size} px", statistics[str(size)])
    if output:
        subjects = [Subject(path=name, sha256="random weights")]
        result = Result("comparison", subjects, method, samples, statistics)
        write_summary(output / "model_gpu.json", result)


if __name__ == "__main__":
    main()
