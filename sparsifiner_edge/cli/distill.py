"""`sparsifiner-edge distill`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparsifiner_edge.artifacts import export_line
from sparsifiner_edge.cli import common
from sparsifiner_edge.config import keep_text, merge_text
from sparsifiner_edge.text import printable

if TYPE_CHECKING:
    from sparsifiner_edge.distill.distill import BudgetFidelity, TrainingSummary


@click.command()
@click.argument("student", type=common.PATH)
@click.option("--data", type=common.PATH, required=True, help="Folder of images; labels are not needed.")
@click.option(
    "--teacher",
    metavar="MODEL",
    help="Dense teacher model.  [default: the student's own weights, if it was never trained]",
)
@common.weights_option
@click.option("--labels", is_flag=True, help="Also learn from labels: --data has one subfolder per class.")
@click.option(
    "--held-out",
    type=common.PATH,
    help="Validation images that choose the checkpoint.  [default: some of --data]",
)
@click.option(
    "--recipe", default="cpu", show_default=True, help="Training recipe: cpu, imagenet-deit-s, or a TOML file."
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="NAME=VALUE",
    help="Override a value of the recipe, such as distil.steps=500. Repeatable.",
)
@click.option(
    "--budgets",
    type=common.PATH,
    metavar="FRONT.json",
    help="Train for up to six plans near the answer in this front.json, which `optimize` writes.",
)
@click.option("--resume", is_flag=True, help="Continue from the last checkpoint in the output folder.")
@common.trust_option
@common.json_option
@common.output_option("Student folder to write.")
def command(*, student: Path, data: Path, output: Path, as_json: bool, **options: Any) -> None:
    """Train STUDENT towards its dense teacher and write the best checkpoint.

    The best checkpoint is the one with the highest score on held-out images. If none beats the untrained model, the
    untrained model is written.
    """
    import sparsifiner_edge as se

    groups = common.group(options, model=se.ModelOptions, options=se.TrainingOptions)
    first = os.environ.get("RANK", "0") == "0"  # of the processes that accelerate or torchrun launched
    with common.progress_bar("preparing", visible=first) as progress:
        summary = se.distill_student(student, data, output, progress=progress, **groups)
    if first:
        common.print_result(summary, as_json, lambda trained: _print(trained, output))


def _print(summary: TrainingSummary, output: Path) -> None:
    """Print what was trained and which images could not be read."""
    if summary.best is not None:
        what = "top-1" if summary.metric.startswith("top-1") else "cosine to the teacher"
        click.echo(
            f"{output}: kept the weights of {summary.kept} ({summary.steps} steps in total). "
            f"{what[0].upper()}{what[1:]} on held-out images, over all budgets: {summary.best:.4f}; "
            f"untrained: {summary.start:.4f}."
        )
        rows = [[_budget(row), f"{row.start:.4f}", f"{row.best:.4f}"] for row in summary.budgets]
        common.print_table(f"{what[0].upper()}{what[1:]}, held-out images", ["budget", "untrained", "kept"], rows)
    if summary.unreadable:
        listed = "\n  ".join(map(printable, summary.unreadable[:10]))
        click.echo(f"{len(summary.unreadable)} images could not be read and were skipped:\n  {listed}", err=True)
    click.echo(f"Next: {export_line(output)}")


def _budget(row: BudgetFidelity) -> str:
    """Format a budget, such as "keep 0.1, tokens 3:0.7,6:0.7" or "keep 0.1, merge 20..0"."""
    places = ",".join(f"{layer}:{share:g}" for layer, share in row.token_keep)
    merge = f"merge {merge_text(row.merge)}" if row.merge else ""
    return ", ".join(filter(None, [f"keep {keep_text(row.keep)}", f"tokens {places}" if places else "", merge]))
