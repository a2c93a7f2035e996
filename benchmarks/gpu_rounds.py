"""In how many rounds `select` finds its thresholds, on real photographs: what `gpu_work.py` counts of them.

    python benchmarks/gpu_rounds.py [--size 518] [-o FOLDER]

The kernel runs in Triton's interpreter over every sixth layer of DINOv2 ViT-S/14 with an untrained predictor, on
development photographs, at each number of tiles that a program may look at together. They go on until the last of them
is found.
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
import torch

from sparsifiner_edge.artifacts import sha256
from sparsifiner_edge.cli.common import err_console, print_table
from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.demo import split
from sparsifiner_edge.ops import torch as operators
from sparsifiner_edge.ops.triton import best, plan_forward
from sparsifiner_edge.ops.triton.run import launch
from sparsifiner_edge.results import Result, Subject, write_result

GROUPS = (1, 2, 4)
KEEPS = (0.10,)


def layers(size: int, photographs: int, keep: float) -> list[tuple[list[torch.Tensor], dict[str, Any]]]:
    """What KeySelect gets in every sixth layer of each photograph."""
    subject = fidelity_subject.Subject(size, photographs=split.development()[:photographs])
    subject.configure(SparsityConfig(keep=keep, tile=64, cells=25), "weights")
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
    return found[::6]


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
    rows = []
    for keep in KEEPS:
        given = layers(size, photographs, keep)
        for group in GROUPS:
            err_console.print(f"keep {keep:g}, {group} tiles together")
            found = [rounds(inputs, settings, group) for inputs, settings in given]
            mean = sum(found) / len(found)
            rows.append({"keep": keep, "group": group, "rounds": mean, "least": min(found), "most": max(found)})
    names = ["keep", "tiles together", "rounds", "of a layer: least", "most"]
    print_table("Rounds of select", names, [[f"{x:.3g}" for x in row.values()] for row in rows])
    if output:
        output.mkdir(parents=True, exist_ok=True)
        method = {"size": size, "photographs": photographs, "tile": 64, "what": "Triton's interpreter, float32"}
        subjects = [Subject(path="sparsifiner_edge/ops/triton/best.py", sha256=sha256(Path(best.__file__)))]
        write_result(output / "gpu_rounds.json", Result("evaluation", subjects, method, {"rows": rows}, {}))


if __name__ == "__main__":
    main()
