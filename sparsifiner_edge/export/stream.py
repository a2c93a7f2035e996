"""The files of a stream: an embedding that says what changed, a step over chosen tokens, and a golden sequence."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.bounds import ImageSize
from sparsifiner_edge.bundle.manifest import StreamFiles
from sparsifiner_edge.errors import GateError
from sparsifiner_edge.export.check import SAME, smooth_images
from sparsifiner_edge.export.deployed_model import DeployedModel
from sparsifiner_edge.export.graph import check_structure, tidy, to_onnx
from sparsifiner_edge.export.sessions import runner_of
from sparsifiner_edge.metrics import agreement
from sparsifiner_edge.runtime.stream import (
    CHANGE,
    COUNTS,
    FINAL,
    NEW,
    PLACES,
    REFERENCES,
    ROWS,
    TOKENS,
    Infer,
    StreamShape,
    play,
)
from sparsifiner_edge.sparse.stream import Passage, StreamModel

GOLDEN_FRAMES = 3
_SOME = 4
"""Patches, and kept ones, that a step is traced with: any numbers that differ from all others."""


class _Embedding(nn.Module):
    """uint8 [1,H,W,3], and what patches were, [1,P,C] -> tokens [1,N,C], and how far each patch is from what it was,
    relative to its length: [1,P].
    """

    def __init__(self, stream: StreamModel) -> None:
        super().__init__()
        self.stream = stream

    def forward(self, image: Tensor, references: Tensor) -> tuple[Tensor, ...]:
        tokens = self.stream.embed(image)
        patches = tokens[:, self.stream.backbone.prefix :]
        return tokens, (patches - references).norm(dim=-1) / patches.norm(dim=-1)


class _Step(nn.Module):
    """The parts of a `Passage`, one by one -> the model's outputs, the final tokens of the rows, then what is new, as
    `StreamShape.caches` names it.
    """

    def __init__(self, stream: StreamModel) -> None:
        super().__init__()
        self.stream = stream

    def forward(
        self, image: Tensor, tokens: Tensor, rows: Tensor, counts: Tensor, places: Tensor, *caches: Tensor
    ) -> tuple[Tensor, ...]:
        depth = len(self.stream.backbone.layers)
        read = dict(zip(self.stream.read, caches[depth:], strict=True))
        passage = Passage(rows, tokens, counts, places, list(caches[:depth]), read=read)
        outputs = self.stream.step(image, passage)
        return (*outputs, cast(Tensor, passage.tokens), *passage.new, *passage.outputs.values())


def write_stream(deployed: DeployedModel, size: ImageSize, folder: Path) -> StreamFiles:
    """Write the files of a stream into the folder of a bundle.

    Args:
        deployed: the model as it is exported; it is changed, and serves nothing else then. size: of its images.

    Raises:
        UnsupportedModelError: no stream runs it; with the reason.
        GateError: the files disagree with torch.
    """
    images = [smooth_images(size, seed=seed) for seed in range(GOLDEN_FRAMES)]
    stream, names = StreamModel(deployed, torch.from_numpy(images[0])), deployed.output_names
    backbone, (heads, dim, _) = stream.backbone, stream.backbone.geometry
    shape = StreamShape(
        len(backbone.layers), backbone.width, heads * dim, backbone.prefix, backbone.patches, stream.read
    )
    embedding, step = _Embedding(stream).eval(), _Step(stream).eval()
    models = _embedding_file(embedding, shape, images[0]), _step_file(step, shape, images[0], names)
    sequence = np.stack(images), _some_patches(shape)
    golden = dict(zip(("input.image", "input.patches"), sequence, strict=True))
    outputs = [*names, FINAL, *(NEW + name for name in shape.caches)]
    with torch.no_grad():
        inner = _of_torch(embedding, [TOKENS, CHANGE]), _of_torch(step, outputs)
        wanted = list(play(shape, *inner, *sequence))
    golden |= {f"output.{name}": np.stack([frame[name] for frame in wanted]) for name in names}
    ran = play(shape, runner_of(models[0]), runner_of(models[1]), *sequence)
    for number, (got, frame) in enumerate(zip(ran, wanted, strict=True)):
        for name, expected in frame.items():
            if (stats := agreement(name, got[name], expected, SAME.error)).error > SAME.error:
                what = f"Output {name!r} of frame {number} of a stream differs from torch by {stats.error:.2e}."
                raise GateError(what, "Nothing was written. Report this with the command.")
    files = StreamFiles(read=stream.read)
    (folder / files.step).parent.mkdir()
    for name, model in zip((files.embedding, files.step), models, strict=True):
        (folder / name).write_bytes(model.SerializeToString())
    np.savez_compressed(folder / files.golden, **cast(Any, golden))
    return files


def _embedding_file(module: _Embedding, shape: StreamShape, image: Array) -> onnx.ModelProto:
    references = torch.zeros(1, shape.patches, shape.width)
    model = to_onnx(module, {"image": torch.from_numpy(image), REFERENCES: references}, [TOKENS, CHANGE])
    tidy(model, module)
    check_structure(model)
    return model


def _step_file(module: _Step, shape: StreamShape, image: Array, outputs: list[str]) -> onnx.ModelProto:
    some = shape.prefix + _SOME
    inputs = {
        "image": torch.from_numpy(image), TOKENS: torch.zeros(1, some, shape.width), ROWS: torch.arange(some),
        COUNTS: torch.ones(1, _SOME), PLACES: torch.arange(shape.tokens) % _SOME,
    }  # fmt: skip
    caches = {name: torch.zeros(1, _SOME, width) for name, width in shape.caches.items()}
    rows, known = torch.export.Dim("rows"), torch.export.Dim("stored")
    axes = {"image": None, "tokens": {1: rows}, "rows": {0: rows}, "counts": {1: known}, "places": None}
    lengths = ({1: known},) * len(caches)
    names = [*outputs, FINAL, *(NEW + name for name in caches)]
    model = to_onnx(module, inputs | caches, names, {**axes, "caches": lengths})
    tidy(model, module)
    check_structure(model)
    return model


def _some_patches(shape: StreamShape) -> Array:
    """A quarter for each frame but the first, ascending."""
    random, count = np.random.default_rng(0), max(1, shape.patches // 4)
    return np.stack([np.sort(random.permutation(shape.patches)[:count]) for _ in range(GOLDEN_FRAMES - 1)])


def _of_torch(module: nn.Module, names: list[str]) -> Infer:
    """A module as a session would run it."""

    def infer(inputs: dict[str, Array]) -> dict[str, Array]:
        tensors = (torch.from_numpy(np.ascontiguousarray(x)) for x in inputs.values())
        return dict(zip(names, (x.numpy() for x in module(*tensors)), strict=True))

    return infer
