"""What the kernels do as often as photographs make them: in how many rounds `select` finds its thresholds, and how many
tiles `attend` takes again. `gpu_work.py` counts with it.

    python benchmarks/gpu_rounds.py [--size 518 --size 672] [-o FOLDER]

At the first size `select` runs in Triton's interpreter over every sixth layer of DINOv2 ViT-S/14 with an untrained
predictor, on development photographs, at each number of tiles that a program may look at together. They go on until the
last of them is found. Of all layers it says in how many heads a logit is further above those of the first block of
keys than sums hold; and of all layers at all sizes in what share of tiles a logit is so far above those of the sample
that float16 overflows.
"""

from __future__ import annotations

import dataclasses
import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import fidelity_subject
import numpy as np
import torch
from summary import write_summary

from sparsifiner_edge.artifacts import sha256
from sparsifiner_edge.cli.common import err_console, print_table
from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.demo import split
from sparsifiner_edge.ops import reference
from sparsifiner_edge.ops import torch as operators
from sparsifiner_edge.ops.triton import attend, best, plan_layer, select
from sparsifiner_edge.ops.triton.run import launch
from sparsifiner_edge.results import Result, Subject

GROUPS = (1, 2, 4)
KEEP = 0.10
EACH = 6
"""Every so many layers are interpreted."""
TILE = 128
"""Of what `attend` takes again."""
HALF_RANGE = 16
"""Exponents of float16, upward."""
FIRST = 2 * plan_layer.ENTRIES
"""Keys of the block that `select` begins its sums by."""


def layers(size: int, photographs: int) -> list[tuple[list[torch.Tensor], dict[str, Any]]]:
    """What KeySelect gets in each layer of each photograph."""
    subject = fidelity_subject.Subject(size, photographs=split.development()[:photographs])
    subject.configure(SparsityConfig(keep=KEEP, tile=64, cells=25), "weights")
    found: list[tuple[list[torch.Tensor], dict[str, Any]]] = []
    plain = operators.key_select

    def watched(*inputs: torch.Tensor, **settings: Any) -> torch.Tensor:
        found.append(([x.detach() for x in inputs], {k: v for k, v in settings.items() if k != "sizes"}))
        return plain(*inputs, **settings)

    operators.key_select = watched
    try:
        with torch.no_grad():
            for image in subject.photographs:
                subject.model.forward_features(image)
    finally:
        operators.key_select = plain
    return found


def far_apart(inputs: list[torch.Tensor], settings: dict[str, Any]) -> list[bool]:
    """Of each head of a layer, whether a logit in base 2 is further above those of the first block than is summed."""
    qkv, proj_q, proj_k = (x.numpy().astype(np.float64) for x in inputs)
    q, k, _ = (x[:, :, settings["num_prefix"] :] for x in reference.split_heads(qkv, settings["num_heads"]))
    probes = reference.run_means(q, settings["probe"], np.ones((q.shape[0], q.shape[2]))) @ proj_q
    logits = settings["scale"] * probes @ (k @ proj_k).swapaxes(-1, -2) / np.log(2)
    above = logits.max(-1) - logits[..., :FIRST].max(-1)
    return [bool(x) for x in (above > select.MOST_ABOVE.value).any(-1).ravel()]


def taken_again(inputs: list[torch.Tensor], settings: dict[str, Any]) -> list[bool]:
    """Of each tile of each head of a layer, whether a logit is too far above the greatest of the sample's."""
    lists = operators.key_select(*inputs, **settings | {"tile": TILE})[0].numpy()
    qkv, prefix = inputs[0].numpy(), settings["num_prefix"]
    q, k, _ = (x[0, :, prefix:] for x in reference.split_heads(qkv, settings["num_heads"]))
    apart, most = max(lists.shape[2] // attend.SAMPLE.value, 1), attend.HEADROOM.value + HALF_RANGE
    found = []
    for head, tiles in enumerate(lists):
        for number, listed in enumerate(tiles):
            rows = q[head, number * TILE : (number + 1) * TILE]
            logits = settings["scale"] / np.log(2) * rows @ k[head, listed].T
            sampled = logits[:, : attend.SAMPLE.value * apart : apart]
            found.append(bool((logits.max(1) - sampled.max(1)).max() > most))
    return found


def rounds(inputs: list[torch.Tensor], settings: dict[str, Any], group: int) -> float:
    """Mean over the groups of tiles of a layer."""
    calls: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    kept = {name: getattr(best, name) for name in ("_first_guess", "_middle")}
    most = plan_layer.MOST_GROUP
    plan_layer.MOST_GROUP = group
    try:
        for name, function in kept.items():
            setattr(best, name, counted(name, function))
        plan = plan_layer.plan_layer([x.shape for x in inputs], settings, "float16")
        plan = dataclasses.replace(plan, launches=plan.launches[:2])
        launch(plan, dict(zip(("qkv", "proj_q", "proj_k"), (inputs[0].half(), *inputs[1:]), strict=True)))
    finally:
        plan_layer.MOST_GROUP = most
        for name, function in kept.items():
            setattr(best, name, function)
    return calls["_middle"] / calls["_first_guess"]


@click.command()
@click.option("--size", "sizes", default=(518, 672), multiple=True, show_default=True)
@click.option("--photographs", default=1, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for gpu_rounds.json.")
def main(sizes: tuple[int, ...], photographs: int, output: Path | None) -> None:
    given = {size: layers(size, photographs) for size in sizes}
    first = given[sizes[0]]
    beyond = [head for inputs, settings in first for head in far_apart(inputs, settings)]
    again = []
    for size, found in given.items():
        tiles = [tile for inputs, settings in found for tile in taken_again(inputs, settings)]
        again.append({"size": size, "tiles": len(tiles), "again": sum(tiles), "share": sum(tiles) / len(tiles)})
    rows = []
    for group in GROUPS:
        err_console.print(f"{group} tiles together")
        counted = [rounds(inputs, settings, group) for inputs, settings in first[::EACH]]
        rows.append(
            {"group": group, "rounds": sum(counted) / len(counted), "least": min(counted), "most": max(counted)}
        )
    names = ["tiles together", "rounds", "of a layer: least", "most"]
    print_table("Rounds of select", names, [[f"{x:.3g}" for x in row.values()] for row in rows])
    print_table("Tiles that attend takes again", list(again[0]), [[f"{x:.4g}" for x in row.values()] for row in again])
    print(f"{sum(beyond)} of {len(beyond)} heads have logits {select.MOST_ABOVE.value:g} above their first block's.")
    if output:
        method = {
            "sizes": sizes, "photographs": photographs, "tile": {"select": 64, "attend": TILE}, "keep": KEEP,
            "what": "interpreted, float16",
        }  # fmt: skip
        sources = (best, attend)
        subjects = [
            Subject(path=f"sparsifiner_edge/ops/triton/{Path(x.__file__).name}", sha256=sha256(Path(x.__file__)))
            for x in sources
        ]
        statistics = {"rows": rows, "heads": len(beyond), "beyond": sum(beyond), "again": again}
        write_summary(output / "gpu_rounds.json", Result("evaluation", subjects, method, {}, statistics))


if __name__ == "__main__":
    main()
