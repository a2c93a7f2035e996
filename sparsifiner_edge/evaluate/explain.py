"""`explain_student`: for images, which patches each layer read, merged and averaged, what of it reached the output, and
whether that is true.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.artifacts import STUDENT_FILE, sha256
from sparsifiner_edge.bounds import size_text
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.evaluate.connections import LayerWeights, SeenLayer, look, reaching, scores_of
from sparsifiner_edge.evaluate.faithfulness import answer_of, elsewhere, faithfulness, groups_of
from sparsifiner_edge.explained import (
    CONTROLS,
    DENSE,
    MOVED,
    OURS,
    RANDOM,
    Explained,
    ExplainMethod,
    ExplainResult,
    ExplainStatistics,
    Faithful,
    ImageSummary,
    LayerMaps,
    LayerSummary,
    ReadKey,
)
from sparsifiner_edge.images import centre_text, evenly, list_images, load_image
from sparsifiner_edge.order import inverse
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.results import Subject
from sparsifiner_edge.sparse.student import Student, load_student

EXPLAINED = 4
LISTED = 24
"""Keys of a place that the result holds, of each layer: those that the most heads read."""


def explain_student(
    student: str | Path, data: str | Path, *, at: tuple[int, int] | None = None, most: int = EXPLAINED,
    trust: Sequence[str] = (), progress: Progress | None = None,
) -> tuple[ExplainResult, list[Explained]]:  # fmt: skip
    """Explain a student's features, or its token of one patch, on images.

    Args:
        student: student folder. data: an image or a folder. at: x and y in pixels of the image that the model sees;
            None: the features. most: images at most, evenly taken. trust: see `load_student`. progress: see `Progress`.

    Returns:
        The result, and what a page shows.

    Raises:
        ConfigError: the student is dense or prunes tokens, or the place lies outside.
        SparsifinerError: an unusable student or image.
    """
    folder, made, explained = Path(student), load_student(student, trust=trust), []
    place, paths = _patch(made, at), evenly(list_images(Path(data)), most)
    for number, path in enumerate(paths):
        explained.append(explain_image(made, path, place, seed=number))
        if progress:
            progress("images", number + 1, len(paths))
    method = ExplainMethod(
        explained="the features" if place is None else f"the token of the patch in row {place[0]}, column {place[1]}",
        heads=made.backbone.geometry.heads, place=at, groups=groups_of(made.backbone.grid),
        filled="the image's mean colour",
        preprocessing=f"{centre_text(made.img_size)}, bicubic to {size_text(made.img_size)} px",
        images=[path.name for path in paths],
    )  # fmt: skip
    samples = {
        f"{number} {found.path.name}": {name: known.curve for name, known in found.summary.faithful.items()}
        for number, found in enumerate(explained)
    }
    subject = Subject(
        role="subject", kind="student", path=str(folder), name=made.name, sha256=sha256(folder / STUDENT_FILE)
    )
    statistics = ExplainStatistics([found.summary for found in explained])
    return ExplainResult("explanation", [subject], method, samples, statistics), explained


def explain_image(
    student: Student, path: Path, place: tuple[int, int] | None = None, seed: int = 0, judge: bool = True
) -> Explained:
    """One image; place: row and column of a patch; seed: of what chance gives beside it; judge: whether it is true."""
    backbone, image = student.backbone, load_image(path, student.img_size)
    curve = inverse(backbone.layers[0].curve.order.numpy())
    layers, dense = look(student, image), look(student, image, densely=True)
    maps: list[LayerMaps] = []
    summaries: list[LayerSummary] = []

    def tell(seen: SeenLayer, weights: LayerWeights) -> None:
        maps.insert(0, _maps(seen, weights, curve))
        summaries.insert(0, _summary(len(layers) - len(maps), seen, weights, maps[0], backbone.grid, place))

    reached = {
        OURS: _reached(layers, backbone.grid, curve, place, tell), DENSE: _reached(dense, backbone.grid, curve, place)
    }  # fmt: skip
    random = np.random.default_rng(seed)
    chance = random.random(backbone.grid)
    against = reached | {RANDOM: chance / chance.sum(), MOVED: elsewhere(reached[OURS], random)}
    faithful = faithfulness(answer_of(student, place), image, against) if judge else {}
    summary = ImageSummary(image=path.name, layers=summaries, faithful=faithful, better=_better(faithful))
    return Explained(path, image, maps, reached, summary)


def _better(faithful: dict[str, Faithful]) -> bool:
    if not faithful:
        return False
    ours, chance = faithful[OURS], [faithful[name] for name in CONTROLS]
    return all(ours.saco > max(0.0, one.saco) and ours.deletion < one.deletion for one in chance)


def _patch(student: Student, at: tuple[int, int] | None) -> tuple[int, int] | None:
    if at is None:
        return None
    (height, width), (rows, columns) = student.backbone.image_size, student.backbone.grid
    if not (0 <= at[0] < width and 0 <= at[1] < height):
        raise ConfigError(
            f"The place {at[0]},{at[1]} lies outside of the image that the model sees.",
            f"Give x from 0 to {width - 1} and y from 0 to {height - 1}.",
        )
    return at[1] * rows // height, at[0] * columns // width


def _reached(
    seen: list[SeenLayer], grid: tuple[int, int], curve: Array, place: tuple[int, int] | None,
    tell: Callable[[SeenLayer, LayerWeights], None] | None = None,
) -> Array:  # fmt: skip
    """Of each patch, what reached the class token (of models without: all tokens), or a patch's: [rows,columns]."""
    prefix, last = seen[0].prefix, seen[-1].left
    row = torch.zeros(last.values.shape[1])
    if place is not None:
        along = int(curve[place[0] * grid[1] + place[1]])
        row[prefix + (along if last.places is None else int(last.places[0, along]))] = 1
    elif prefix:
        row[0] = 1
    else:
        row = torch.ones(len(row)) if last.sizes is None else last.sizes[0].float()
    patches = reaching(seen, row, tell=tell)[prefix:][torch.from_numpy(curve)]
    return np.asarray((patches / patches.sum()).reshape(grid).numpy())


def _maps(seen: SeenLayer, weights: LayerWeights, curve: Array) -> LayerMaps:
    places = torch.arange(len(curve)) if seen.tokens.places is None else seen.tokens.places[0]
    scores, count = scores_of(seen), seen.tokens.positions.shape[1]
    whole = torch.full((1, count), seen.attention.geometry.heads)
    heads = whole if weights.read is None else weights.read.sum(0)
    nothing = (torch.zeros(1, count), torch.zeros(count))
    probe, deviation = nothing if scores is None else (scores.probe.mean(0), scores.deviation.mean(0))
    sparse = seen.sparse
    tile = count if sparse is None else 1 if scores is None else sparse.sparsity.tile
    cells = weights.cells[:, seen.prefix :].mean(0)
    arrays = places[torch.from_numpy(curve)], heads, probe, deviation, cells
    token, *others = (np.asarray(x.numpy()) for x in arrays)
    return LayerMaps(token, tile, *others)


def _summary(
    number: int, seen: SeenLayer, weights: LayerWeights, maps: LayerMaps, grid: tuple[int, int],
    place: tuple[int, int] | None,
) -> LayerSummary:  # fmt: skip
    sparse, count = seen.sparse, seen.tokens.positions.shape[1]
    return LayerSummary(
        layer=number, tokens=count, merged=count - seen.left.positions.shape[1],
        keys=None if sparse is None else sparse.layout.keys, cells=round(float(maps.cells.mean()), 6),
        place=None if place is None else _place(seen, weights, maps, grid, place),
    )  # fmt: skip


def _place(
    seen: SeenLayer, weights: LayerWeights, maps: LayerMaps, grid: tuple[int, int], place: tuple[int, int]
) -> list[ReadKey]:
    token = int(maps.token[place[0] * grid[1] + place[1]])
    tile = token // maps.tile
    attention = weights.attention[:, seen.prefix + token, seen.prefix :].mean(0)
    first: dict[int, int] = {}
    for raster, owner in enumerate(maps.token.tolist()):
        first.setdefault(owner, raster)
    order = sorted(range(len(attention)), key=lambda n: (-int(maps.heads[tile, n]), -float(attention[n])))
    return [
        ReadKey(
            patch=divmod(first[n], grid[1]), heads=int(maps.heads[tile, n]), probe=round(float(maps.probe[tile, n]), 6),
            deviation=round(float(maps.deviation[n]), 6), attention=round(float(attention[n]), 6),
        )
        for n in order[:LISTED]
    ]  # fmt: skip
