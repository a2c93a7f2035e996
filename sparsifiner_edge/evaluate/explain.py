"""`explain_student`: tokens that the layers read and merged, and patches that the features depend on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from sparsifiner_edge.arrays import Array, Pixels
from sparsifiner_edge.artifacts import STUDENT_FILE, sha256
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.evaluate.faithfulness import answer_of, elsewhere, faithfulness, groups_of, importance_of
from sparsifiner_edge.fitting import Framing
from sparsifiner_edge.images import evenly, list_images, load_image
from sparsifiner_edge.outcomes import (
    MOVED,
    OURS,
    RANDOM,
    Explained,
    ExplainMethod,
    ExplainResult,
    ImageSummary,
    LayerSummary,
)
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.results import Subject
from sparsifiner_edge.sparse.attention import LandmarkAttention, SparseAttention
from sparsifiner_edge.sparse.layer import CarriedTokens, SparseLayer
from sparsifiner_edge.sparse.outputs import outputs_of
from sparsifiner_edge.sparse.student import Student, load_student
from sparsifiner_edge.sparse.weights import normalise

EXPLAINED = 4
"""Default number of images."""
Layer: TypeAlias = tuple[Array, Array, LayerSummary]
"""An entry of `Explained.merged`, an entry of `Explained.read`, and the layer's figures."""


def explain_student(
    student: str | Path,
    data: str | Path,
    *,
    most: int = EXPLAINED,
    trust: Sequence[str] = (),
    progress: Progress | None = None,
) -> tuple[ExplainResult, list[Explained]]:
    """Explain a sparse model's features on images.

    Args:
        student: Folder of the sparse model.
        data: An image or a folder.
        most: Maximum number of images, evenly spaced.
        trust: Modules whose code may run; see `load_student`.
        progress: Progress callback; counts images.

    Returns:
        The result, and what a page shows.

    Raises:
        ConfigError: The model is dense or prunes tokens.
        SparsifinerError: The model or an image is unusable.

    Example:
        >>> result, images = explain_student("student", "images", most=1)
        >>> images[0].importance.shape
        (10, 10)
    """
    folder, model, explained = Path(student), load_student(student, trust=trust), []
    paths = evenly(list_images(Path(data)), most)
    for number, path in enumerate(paths):
        explained.append(explain_image(model, path, seed=number))
        if progress:
            progress("images", number + 1, len(paths))
    method = ExplainMethod(
        groups=groups_of(model.backbone.grid),
        filled="the image's mean colour",
        preprocessing=str(Framing(model.img_size)),
        images=[path.name for path in paths],
    )
    named = {f"{number} {image.path.name}": image for number, image in enumerate(explained)}
    samples = {name: image.drops for name, image in named.items()}
    statistics = {name: image.summary for name, image in named.items()}
    subject = Subject(
        role="subject", kind="student", path=str(folder), name=model.name, sha256=sha256(folder / STUDENT_FILE)
    )
    return ExplainResult("explanation", [subject], method, samples, statistics), explained


def explain_image(student: Student, path: Path, seed: int = 0) -> Explained:
    """Explain one image; `seed` draws the random baselines.

    Raises:
        ConfigError: See `look`.
    """
    image, answer, random = load_image(path, student.img_size), answer_of(student), np.random.default_rng(seed)
    layers = look(student, image)
    importance = importance_of(answer, image, student.backbone.grid)
    orders = {OURS: importance, RANDOM: random.random(importance.shape), MOVED: elsewhere(importance, random)}
    results = {name: faithfulness(answer, image, values) for name, values in orders.items()}
    saco = {name: figure for name, (figure, _) in results.items()}
    better = saco[OURS] > max(0.0, saco[RANDOM], saco[MOVED])
    merged, read, summaries = map(list, zip(*layers, strict=True))
    summary = ImageSummary(image=path.name, layers=summaries, saco=saco, better=better)
    drops = {name: drop.tolist() for name, (_, drop) in results.items()}
    return Explained(path, image, merged, read, importance, summary, drops)


@torch.no_grad()
def look(student: Student, image: Pixels, patch: int | None = None) -> list[Layer]:
    """Return what each layer reads and merges of an image.

    Args:
        student: The sparse model.
        image: uint8 [H,W,3].
        patch: Position of a patch in raster order: count only what its query tile reads. None counts all.

    Raises:
        ConfigError: No layer is sparse or merges, or the model prunes tokens.
    """
    layers = [layer for layer in student.backbone.layers if isinstance(layer, SparseLayer)]
    if not layers:
        raise ConfigError(f"{student.name} is dense: all tokens attend to all.", "Give a sparse student.")
    if student.sparsity.token_keep:
        raise ConfigError(f"{student.name} prunes tokens.", 'Explain it without: --token-keep "".')
    records: list[Layer] = []
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(_watch(layer, records, patch))
        outputs_of(student.model.eval(), normalise(torch.from_numpy(image)[None], student.normalisation), tokens=True)
    return records


def _places(layer: SparseLayer, entered: CarriedTokens) -> torch.Tensor:
    """Return the token of each patch, in raster order."""
    places = torch.arange(entered.positions.shape[1]) if entered.places is None else entered.places[0]
    return places[layer.curve.raster]


@contextlib.contextmanager
def _watch(layer: SparseLayer, records: list[Layer], patch: int | None) -> Iterator[None]:
    entered: CarriedTokens | None = None
    read: torch.Tensor | None = None

    def enter(_: Any, inputs: Any) -> None:
        nonlocal entered, read
        entered, read = layer.receive(inputs[0]), None

    def attend(attention: Any, _: Any, outputs: Any) -> None:
        nonlocal read
        if isinstance(attention, SparseAttention) and attention.sparsity.keep != 1 and entered is not None:
            lists, patches = attention.indices(outputs[1], entered.sizes)[0], entered.positions.shape[1]
            if patch is not None:
                queries = 1 if isinstance(attention, LandmarkAttention) else attention.sparsity.tile
                tile = int(_places(layer, entered)[patch]) // queries
                lists = lists[:, tile : tile + 1]
            # The published method lists all tokens, the preset "edge" only patches.
            listed = entered.values.shape[1] if isinstance(attention, LandmarkAttention) else patches
            read = torch.bincount(lists.long().flatten(), minlength=listed)[listed - patches :] / lists.shape[1]

    def leave(_: Any, __: Any, output: Any) -> None:
        assert entered is not None
        patches = entered.positions.shape[1]
        share = np.ones(patches) if read is None else np.asarray(read.numpy())
        sparse = layer.packed_attention if read is not None else None
        summary = LayerSummary(
            layer=len(records),
            tokens=patches,
            merged=patches - layer.receive(output).positions.shape[1],
            keys=sparse.layout.keys if isinstance(sparse, SparseAttention) else None,
        )
        records.append((np.asarray(_places(layer, entered).numpy()), share, summary))

    hooks = [
        layer.register_forward_pre_hook(enter),
        layer.packed_attention.register_forward_hook(attend),
        layer.register_forward_hook(leave),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
