"""In how many rounds `select` finds its thresholds, on real photographs: what `gpu_work.py` counts of them.

    python benchmarks/gpu_rounds.py [--size 518] [-o FOLDER]

The kernel runs in Triton's interpreter over every sixth layer of DINOv2 ViT-S/14 with an untrained predictor, on
development photographs, at each number of tiles that a program may look at together. They go on until the last of them
is found. Of all layers it says in how many heads logits are so great that their sums leave float32's range.
"""

from __future__ import annotations

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

from sparsifiner_edge.artifacts import sha256
from sparsifiner_edge.cli.common import err_console, print_table
from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.demo import split
from sparsifiner_edge.ops import reference
from sparsifiner_edge.ops import torch as operators
from sparsifiner_edge.ops.triton import best, plan_forward
from sparsifiner_edge.ops.triton.run import launch
from sparsifiner_edge.results import Result, Subject, write_result

GROUPS = (1, 2, 4)
KEEP = 0.10
EACH = 6
"""Every so many layers are interpreted."""
RANGE = 126
"""Exponents of float32, either way."""


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
    """Of each head of a layer, whether logits in base 2 leave float32's exponents."""
    qkv, proj_q, proj_k = (x.numpy().astype(np.float64) for x in inputs)
    q, k, _ = (x[:, :, settings["num_prefix"] :] for x in reference.split_heads(qkv, settings["num_heads"]))
    probes = reference.run_means(q, settings["probe"]) @ proj_q
    greatest = (settings["scale"] * probes @ (k @ proj_k).swapaxes(-1, -2)).max(-1) / np.log(2)
    return [bool(x) for x in (np.abs(greatest) > RANGE).any(-1).ravel()]


def rounds(inputs: list[torch.Tensor], settings: dict[str, Any], group: int) -> float:
    """Mean over the groups of tiles of a layer."""
    calls: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    kept = {name: getattr(best, name) for name in ("_first_guess", "_middle")}
    most = plan_forward.MOST_GROUP
    plan_forward.MOST_GROUP = group
    try:
        for name, function in kept.items():
            setattr(best, name, counted(name, function))
        plan = plan_forward.plan_select([x.shape for x in inputs], settings, "float32")
        launch(plan, dict(zip(("qkv", "proj_q", "proj_k"), inputs, strict=True)))
    finally:
        plan_forward.MOST_GROUP = most
        for name, function in kept.items():
            setattr(best, name, function)
    return calls["_middle"] / calls["_first_guess"]


@click.command()
@click.option("--size", default=518, show_default=True)
@click.option("--photographs", default=1, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for gpu_rounds.json.")
def main(size: int, photographs: int, output: Path | None) -> None:
    given = layers(size, photographs)
    beyond = [head for inputs, settings in given for head in far_apart(inputs, settings)]
    rows = []
    for group in GROUPS:
        err_console.print(f"{group} tiles together")
        found = [rounds(inputs, settings, group) for inputs, settings in given[::EACH]]
        rows.append({"group": group, "rounds": sum(found) / len(found), "least": min(found), "most": max(found)})
    names = ["tiles together", "rounds", "of a layer: least", "most"]
    print_table("Rounds of select", names, [[f"{x:.3g}" for x in row.values()] for row in rows])
    print(f"{sum(beyond)} of {len(beyond)} heads have logits beyond 2^{RANGE}.")
    if output:
        output.mkdir(parents=True, exist_ok=True)
        method = {"size": size, "photographs": photographs, "tile": 64, "keep": KEEP, "what": "interpreted, float32"}
        subjects = [Subject(path="sparsifiner_edge/ops/triton/best.py", sha256=sha256(Path(best.__file__)))]
        write_result(
            output / "gpu_rounds.json",
            Result("evaluation", subjects, method, {"rows": rows, "heads": len(beyond), "beyond": sum(beyond)}, {}),
        )


if __name__ == "__main__":
    main()
