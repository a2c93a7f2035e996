"""Measures the faithfulness of explanations: SaCo on the publication photographs, compared with chance.

python benchmarks/explain.py STUDENT/ [-o FOLDER]
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
from summary import write_summary

import sparsifiner_edge as se
from sparsifiner_edge.artifacts import STUDENT_FILE, sha256
from sparsifiner_edge.cli.common import print_table, progress_bar
from sparsifiner_edge.demo import split
from sparsifiner_edge.evaluate.explain import explain_image
from sparsifiner_edge.outcomes import MOVED, OURS, RANDOM
from sparsifiner_edge.profiles import stats
from sparsifiner_edge.records import write_record
from sparsifiner_edge.results import Result, Subject

ORDERS = (OURS, RANDOM, MOVED)


@click.command()
@click.argument("student", type=click.Path(exists=True, path_type=Path))
@click.option("--trust", multiple=True, help="A module that the student names.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for explain.json.")
def main(student: Path, trust: tuple[str, ...], output: Path | None) -> None:
    """Measure SaCo image by image; differences of ours to the others have Student's interval."""
    made, samples = se.load_student(student, trust=trust), {order: list[float]() for order in ORDERS}
    with progress_bar("photographs") as progress:
        for number, path in enumerate(split.images("publication")):
            for order, figure in explain_image(made, path, seed=number).summary.saco.items():
                samples[order].append(figure)
            progress("photographs", number + 1, len(split.images("publication")))
    values = {order: np.array(x) for order, x in samples.items()}
    less = {f"ours less {other}": stats.small_sample_mean(values[OURS] - values[other]) for other in (RANDOM, MOVED)}
    row = [f"{x.value:+.3f} ({x.low:+.3f} to {x.high:+.3f})" for x in less.values()]
    means = {order: float(x.mean()) for order, x in values.items()}
    count = len(samples[OURS])
    print_table(f"{count} images", ["", *ORDERS, *less], [["SaCo", *(f"{x:.3f}" for x in means.values()), *row]])
    if output:
        subject = Subject(role="subject", kind="student", path=student.name, sha256=sha256(student / STUDENT_FILE))
        statistics = means | write_record(less)
        result = Result("comparison", [subject], {"images": count}, samples, statistics)
        write_summary(output / "explain.json", result)


if __name__ == "__main__":
    main()
