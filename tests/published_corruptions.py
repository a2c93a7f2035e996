"""How the published corruptions change an image, which a test holds ours against: figures of the package
`imagecorruptions-imaug`, averaged over seeds. It replaces OpenCV by one that needs libGL, so it stays out of here:

    pip install --target FOLDER imagecorruptions-imaug
    python -m tests.published_corruptions --library FOLDER -o tests/data/corruptions.json
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image
from skimage import data

from sparsifiner_edge.corruptions import COMMON, SEVERITIES
from sparsifiner_edge.files import write_text
from sparsifiner_edge.text import dump_json

SEEDS, SIDE = 6, 224


def picture() -> Any:
    """uint8 [224,224,3]: scikit-image's photograph of an astronaut."""
    return np.array(Image.fromarray(data.astronaut()).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def figures(changed: Any, clean: Any) -> list[float]:
    """Mean difference to the clean image, mean, deviation, and mean difference of pixels above each other."""
    values = changed.astype(float)
    return [
        float(x)
        for x in (np.abs(values - clean).mean(), values.mean(), values.std(), np.abs(np.diff(values, axis=0)).mean())
    ]


@click.command()
@click.option("--library", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
def main(library: Path, output: Path) -> None:
    """See the module's documentation."""
    sys.path.append(str(library))
    published, clean, found = importlib.import_module("imagecorruptions"), picture(), {}
    for name in COMMON:
        for severity in SEVERITIES:
            rows = []
            for seed in range(SEEDS):
                np.random.seed(seed)
                with contextlib.redirect_stdout(io.StringIO()):
                    rows.append(figures(published.corrupt(clean, severity, name), clean))
            found[f"{name} {severity}"] = [round(float(x), 2) for x in np.mean(rows, 0)]
        click.echo(name)
    write_text(output, dump_json(found))


if __name__ == "__main__":
    main()
