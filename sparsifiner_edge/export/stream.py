"""Files of a stream: an embedding that measures change, a step over chosen tokens, and a golden sequence."""

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
from sparsifiner_edge.export.int8 import LEAST_MEAN_COSINE, quantise_like
from sparsifiner_edge.export.reference import mean_cosines, require_cosines, rows_alike
from sparsifiner_edge.export.sessions import runner_of
from sparsifiner_edge.metrics import agreement
from sparsifiner_edge.runtime.golden import play
from sparsifiner_edge.runtime.stream_files import (
    CACHE,
    CHANGE,
    COUNTS,
    FINAL,
    NEW,
    PLACES,
    REFERENCES,
    ROWS,
    SHIFT,
    TOKENS,
    UNCHANGED,
    Infer,
    StreamShape,
)
from sparsifiner_edge.sparse.stream import Passage, StreamModel

GOLDEN_FRAMES = 3
"""Number of frames in the golden sequence."""
_SOME = 4
"""Number of patches with which a step is traced; must differ from all other sizes."""


class _Embedding(nn.Module):
    """Embedding: image and reference patches -> tokens, and the relative change of each patch.

    The image is uint8 [1,H,W,3], references are [1,P,C], tokens [1,N,C], changes [1,P].
    """

    def __init__(self, stream: StreamModel) -> None:
        super().__init__()
        self.stream = stream

    def forward(self, image: Tensor, references: Tensor) -> tuple[Tensor, ...]:
        tokens = self.stream.embed(image)
        patches = tokens[:, self.stream.backbone.prefix :]
        return tokens, (patches - references).norm(dim=-1) / patches.norm(dim=-1).clamp_min(1e-6)


class _Step(nn.Module):
    """Step: the parts of a `Passage` -> the model's outputs, final tokens, and updated caches.

    Names are those of `StreamShape.caches`.
    """

    def __init__(self, stream: StreamModel) -> None:
        super().__init__()
        self.stream = stream

    def forward(
        self,
        image: Tensor,
        tokens: Tensor,
        rows: Tensor,
        counts: Tensor,
        places: Tensor,
        still: Tensor,
        shift: Tensor,
        *caches: Tensor,
    ) -> tuple[Tensor, ...]:
        depth = len(self.stream.backbone.layers)
        read = dict(zip(self.stream.read, caches[depth:], strict=True))
        passage = Passage(rows, tokens, counts, places, still, list(caches[:depth]), shift=shift, read=read)
        outputs = self.stream.step(image, passage)
        return (*outputs, cast(Tensor, passage.tokens), *passage.new, *passage.outputs.values())


def stream_of(deployed: DeployedModel, size: ImageSize) -> StreamModel:
    """Return the model in the form that a stream runs.

    Args:
        deployed: The deployed model; it is changed and cannot be used otherwise afterwards.
        size: Size of its images.

    Raises:
        UnsupportedModelError: The model cannot run as a stream; with the reason.
    """
    return StreamModel(deployed, torch.from_numpy(smooth_images(size)))


def write_stream(
    stream: StreamModel, names: list[str], size: ImageSize, folder: Path, like: tuple[onnx.ModelProto, ...] = ()
) -> StreamFiles:
    """Write the files of a stream into the folder of a bundle.

    Args:
        stream: The model.
        names: Names of its outputs.
        size: Size of its images.
        folder: Folder of the bundle.
        like: The bundle's file in float32 and in int8, if the step's linear layers are to be int8.

    Raises:
        GateError: The files disagree with torch.
    """
    images = [smooth_images(size, seed=seed) for seed in range(GOLDEN_FRAMES)]
    backbone, (heads, dim, _) = stream.backbone, stream.backbone.geometry
    shape = StreamShape(len(backbone.layers), backbone.width, heads * dim, backbone.prefix, backbone.grid, stream.read)
    embedding, step = _Embedding(stream).eval(), _Step(stream).eval()
    models = _embedding_file(embedding, shape, images[0]), _step_file(step, shape, images[0], names)
    sequence = np.stack(images), _some_patches(shape)
    golden = dict(zip(("input.image", "input.patches"), sequence, strict=True))
    outputs = [*names, FINAL, *(NEW + name for name in shape.caches)]
    with torch.no_grad():
        inner = _of_torch(embedding, [TOKENS, CHANGE]), _of_torch(step, outputs)
        wanted = list(play(shape, *inner, *sequence))
    ran = _compare_with_torch(wanted, list(play(shape, runner_of(models[0]), runner_of(models[1]), *sequence)))
    if like:
        models, shape = (models[0], _keep_halves(quantise_like(models[1], *like))), shape._replace(halves=True)
        wanted, ran = ran, list(play(shape, runner_of(models[0]), runner_of(models[1]), *sequence))
        rows = [rows_alike(got, frame) for got, frame in zip(ran, wanted, strict=True)]
        require_cosines(mean_cosines(rows), LEAST_MEAN_COSINE, "int8 stream's", "", "Export fp32.")
    golden |= {f"output.{name}": np.stack([frame[name] for frame in ran]) for name in names}
    files = StreamFiles(read=stream.read)
    (folder / files.step).parent.mkdir()
    for name, model in zip((files.embedding, files.step), models, strict=True):
        (folder / name).write_bytes(model.SerializeToString())
    np.savez_compressed(folder / files.golden, **cast(Any, golden))
    return files


def _compare_with_torch(wanted: list[dict[str, Array]], ran: list[dict[str, Array]]) -> list[dict[str, Array]]:
    """Return what the files gave, frame by frame, after comparing it with torch."""
    for number, (got, frame) in enumerate(zip(ran, wanted, strict=True)):
        for name, expected in frame.items():
            if (stats := agreement(name, got[name], expected, SAME.error)).error > SAME.error:
                what = f"Output {name!r} of frame {number} of a stream differs from torch by {stats.error:.2e}."
                raise GateError(what, "Nothing was written. Report this with the command.")
    return ran


def _embedding_file(module: _Embedding, shape: StreamShape, image: Array) -> onnx.ModelProto:
    references = torch.zeros(1, shape.patches, shape.width)
    model = to_onnx(module, {"image": torch.from_numpy(image), REFERENCES: references}, [TOKENS, CHANGE])
    tidy(model, module)
    check_structure(model)
    return model


def _step_file(module: _Step, shape: StreamShape, image: Array, outputs: list[str]) -> onnx.ModelProto:
    some = shape.prefix + _SOME
    inputs = {
        "image": torch.from_numpy(image),
        TOKENS: torch.zeros(1, some, shape.width),
        ROWS: torch.arange(some),
        COUNTS: torch.ones(1, _SOME),
        PLACES: torch.arange(shape.tokens),
        UNCHANGED: torch.ones(1, some),
        SHIFT: torch.zeros(2),
    }
    sizes = {name: _SOME if name.startswith(CACHE) else shape.tokens for name in shape.caches}
    caches = {name: torch.zeros(1, sizes[name], width) for name, width in shape.caches.items()}
    rows, known = torch.export.Dim("rows"), torch.export.Dim("stored")
    axes = {
        "image": None,
        "tokens": {1: rows},
        "rows": {0: rows},
        "counts": {1: known},
        "places": None,
        "still": {1: rows},
        "shift": None,
    }
    lengths = tuple({1: known} if name.startswith(CACHE) else None for name in caches)
    names = [*outputs, FINAL, *(NEW + name for name in caches)]
    model = to_onnx(module, inputs | caches, names, {**axes, "caches": lengths})
    tidy(model, module)
    check_structure(model)
    return model


def _keep_halves(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the step with keys and values stored in float16, which halves most of the memory traffic."""
    graph = model.graph
    for value in graph.input:
        if value.name.startswith(CACHE):
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    for value in graph.output:
        if value.name.startswith(NEW + CACHE):
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
            wide = f"{value.name}.float32"
            for node in graph.node:
                node.input[:] = [wide if name == value.name else name for name in node.input]
                node.output[:] = [wide if name == value.name else name for name in node.output]
            graph.node.append(onnx.helper.make_node("Cast", [wide], [value.name], to=onnx.TensorProto.FLOAT16))
    check_structure(model)
    return model


def _some_patches(shape: StreamShape) -> Array:
    """Return the patches to compute: a quarter in each frame but the first, ascending."""
    random, count = np.random.default_rng(0), max(1, shape.patches // 4)
    return np.stack([np.sort(random.permutation(shape.patches)[:count]) for _ in range(GOLDEN_FRAMES - 1)])


def _of_torch(module: nn.Module, names: list[str]) -> Infer:
    """Return a function that runs a module as a session would."""

    def infer(inputs: dict[str, Array]) -> dict[str, Array]:
        tensors = (torch.from_numpy(np.ascontiguousarray(x)) for x in inputs.values())
        return dict(zip(names, (x.numpy() for x in module(*tensors)), strict=True))

    return infer
