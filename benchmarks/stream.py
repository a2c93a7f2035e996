"""Compares streaming inference with the dense model and with alternatives, on the frames of a video.

    python benchmarks/stream.py [--video FILE] [--start 400] [--frames 300] [--model saliency] [--size 518] [--int8]
        [--every 1] [-o FOLDER]

All are compared with the dense model's outputs of the same frame. Each way gives the mean cosine of the patches, of the
worst frame, and of the moving tenth (the patches whose dense output differs most from that of the frame before); the
share of the frames at .98; the IoU of a decoder's map; and milliseconds per frame in turn with the dense model in every
engine, of which the fastest counts. Ways: streams of fixed shares, one that adapts to keep .98, the dense model on
every k-th frame with its answer held, and the dense model in fp32 for fewer pixels, whose tokens are enlarged. With
--int8 the streams run a file in int8, which the dense model's engines may use too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from camera_overhead import VIDEO
from fidelity_subject import weights_file
from summary import write_summary

import sparsifiner_edge as se
from sparsifiner_edge.arrays import Array
from sparsifiner_edge.bundle.store import bundle_hash
from sparsifiner_edge.cli.common import err_console, print_table
from sparsifiner_edge.demo import material, split
from sparsifiner_edge.errors import SparsifinerError
from sparsifiner_edge.execution import Execution
from sparsifiner_edge.fitting import Framing
from sparsifiner_edge.images import fit_image
from sparsifiner_edge.metrics import cosine, intersection_over_union
from sparsifiner_edge.profiles.measure.timing import call_ms
from sparsifiner_edge.results import Result, Subject
from sparsifiner_edge.scoring import THRESHOLD

SHARES, HELD, AT_LEAST = (1 / 8, 1 / 16), (2, 4, 8), 0.98
FEWER = 0.5
"""Share of the pixels per side: a quarter of the tokens."""
FP32 = (Execution(backend="onnxruntime"), Execution(backend="openvino"))
ANY = (Execution(backend="openvino", compute_precision="bf16"),)
BLOCK = 10
"""Frames that a way answers before the next one; after each, every engine's dense model is timed once."""
MAP = "saliency"
Infer = Callable[[dict[str, Array]], dict[str, Array]]


def frames(video: Path, size: int, start: int, count: int) -> Iterator[Array]:
    """Yield uint8 [1,H,W,3] of consecutive frames, cropped."""
    import av

    with av.open(str(video)) as file:
        for number, frame in enumerate(file.decode(video=0)):
            if number >= start + count:
                return
            if number >= start:
                yield np.asarray(fit_image(frame.to_image(), Framing(size)))[None]


def exported(model: str, size: int, folder: Path, int8: bool = False) -> Path:
    """Export the dense model with stream files and tokens; int8: calibrated with development photographs."""
    name, options = material.DINOV2, se.ModelOptions(weights=weights_file(), img_size=size)
    if model == MAP:
        name, options = "sparsifiner_edge.demo.saliency:saliency", se.ModelOptions(img_size=size)
    form = se.ExportOptions(stream=True, tokens=True)
    if int8:
        images = folder.parent / "calibration"
        images.mkdir(exist_ok=True)
        for path in split.images("development"):
            shutil.copy(path, images / path.name)
        form = dataclasses.replace(form, precision="int8", calibrate=images)
    return se.export_bundle(name, folder, model=options, options=form)


class Way:
    """One way to answer frames, and its results.

    Attributes:
        lost: 1 - cosine of each patch, per frame.
        iou: IoU of the map, per frame.
        ms: Milliseconds, per frame.
        whole: Number of frames computed in full, or by the full model.
    """

    def __init__(self, infer: Infer, stream: Any = None) -> None:
        self.infer, self.stream = infer, stream
        self.lost, self.iou, self.ms, self.whole = list[Array](), list[float](), list[float](), 0

    def answer(self, image: Array, dense: dict[str, Array], prefix: int) -> None:
        outputs: dict[str, Array] = {}
        taken = call_ms(lambda: outputs.update(self.infer({"image": image})), 1)[0]
        self.whole += self.stream is not None and self.stream.computed.by != "incremental"
        self.judge(outputs, taken, dense, prefix)

    def judge(self, outputs: dict[str, Array], ms: float, dense: dict[str, Array], prefix: int) -> None:
        """Score an answer that took `ms`."""
        self.ms.append(ms)
        self.lost.append(1 - cosine(outputs["tokens"], dense["tokens"])[0, prefix:])
        if MAP in dense and outputs[MAP].shape == dense[MAP].shape:
            self.iou.append(intersection_over_union(outputs[MAP] > THRESHOLD, dense[MAP] > THRESHOLD))

    def figures(self, moved: Array, dense_ms: float) -> dict[str, Any]:
        """Return the figures; moved: difference of each patch's dense output to the previous frame, [F-1,P]."""
        lost = np.array(self.lost)[1:]
        moving = np.argsort(-moved, 1)[:, : moved.shape[1] // 10]
        by_frame = lost.mean(1)
        row = {
            "patches": 1 - float(lost.mean()),
            "worst_frame": 1 - float(by_frame.max()),
            "moving_tenth": 1 - float(np.take_along_axis(lost, moving, 1).mean()),
            "frames_at_98": float((by_frame <= 1 - AT_LEAST).mean()),
            "whole": self.whole,
            "ms": float(np.mean(self.ms[1:])),
            "p99_over_dense": float(np.quantile(self.ms[1:], 0.99)) / dense_ms,
            "times": dense_ms / float(np.mean(self.ms[1:])),
        }
        return row | ({"iou": float(np.mean(self.iou[1:])), "least_iou": min(self.iou[1:])} if self.iou else {})


def enlarged(tokens: Array, size: int, prefix: int) -> Array:
    """Interpolate tokens [1,N,C] of fewer patches to a larger square grid."""
    side = round(math.sqrt(tokens.shape[1] - prefix))
    grid = torch.from_numpy(tokens[:, prefix:]).reshape(1, side, side, -1).permute(0, 3, 1, 2)
    whole = torch.nn.functional.interpolate(grid, (size, size), mode="bilinear", align_corners=False)
    return np.concatenate([tokens[:, :prefix], whole.flatten(2).transpose(1, 2).numpy()], 1)


def engines(bundles: list[Path], stack: contextlib.ExitStack) -> dict[str, Any]:
    """Open the dense model in each engine; the first gives the reference outputs."""
    dense = dict[str, Any]()
    for bundle in (bundles[0], *bundles[2:]):
        for engine in (*FP32, *(ANY if bundles[2:] else ())):
            with contextlib.suppress(SparsifinerError):  # A CPU without bf16.
                name = f"{engine.backend}, {engine.compute_precision}" + ", int8" * (bundle is not bundles[0])
                dense[name] = stack.enter_context(se.open_session(bundle, engine))
    return dense


class Beside:
    """Alternatives to a stream: the dense model for fewer pixels, and held frames.

    Attributes:
        ways: Ways by name.
        moved: Difference of each patch's dense output to the previous frame.
    """

    def __init__(self, fewer: se.Session, prefix: int) -> None:
        self._fewer, self._prefix = fewer, prefix
        self.ways = {f"hold every {k}": Way(lambda _: {}) for k in HELD} | {"fewer pixels": Way(fewer.infer)}
        self.moved, self._before, self._held = list[Array](), None, dict[int, dict[str, Array]]()

    def take(self, number: int, small: Array, dense: dict[str, Array]) -> None:
        """Process a frame, given in fewer pixels and with its dense outputs."""
        if self._before is not None:
            self.moved.append(1 - cosine(self._before, dense["tokens"])[0, self._prefix :])
        self._before = dense["tokens"]
        for k in HELD:
            self._held[k] = self._held[k] if number % k else dense
            self.ways[f"hold every {k}"].judge(self._held[k], 0.0, dense, self._prefix)
        answer: dict[str, Array] = {}
        taken = call_ms(lambda: answer.update(self._fewer.infer({"image": small})), 1)[0]
        side = math.isqrt(dense["tokens"].shape[1] - self._prefix)
        answer["tokens"] = enlarged(answer["tokens"], side, self._prefix)
        self.ways["fewer pixels"].judge(answer, taken, dense, self._prefix)


def measure(
    bundles: list[Path], video: Path, start: int, count: int, execution: Execution, every: int
) -> dict[str, Any]:
    """Measure all ways on the same consecutive frames, in turn by blocks of frames.

    Args:
        bundles: In fp32; for fewer pixels; and optionally in int8, which streams then run.
    """
    prefix, number = 1, 0
    with contextlib.ExitStack() as stack:
        dense = engines(bundles, stack)
        truth = next(iter(dense.values()))
        session = stack.enter_context(se.open_session(bundles[-1 if bundles[2:] else 0], execution))
        fewer = stack.enter_context(se.open_session(bundles[1], FP32[0]))
        streams = {f"stream {share:g}": session.stream(share=share) for share in SHARES}
        streams[f"stream at {AT_LEAST}"] = session.stream(AT_LEAST)
        ways = {name: Way(stream.infer, stream) for name, stream in streams.items()}
        beside, ms = Beside(fewer, prefix), {name: list[float]() for name in dense}
        size, few = (int(str(one.inputs[0].shape[1])) for one in (session, fewer))
        pairs = zip(frames(video, size, start, count), frames(video, few, start, count), strict=True)
        while block := list(itertools.islice(pairs, BLOCK)):
            compared = [place for place in range(len(block)) if (number + place) % every == 0]
            wanted = {place: truth.infer({"image": block[place][0]}) for place in compared}
            for way in ways.values():
                for place, (image, _) in enumerate(block):
                    if place in wanted:
                        way.answer(image, wanted[place], prefix)
                    else:
                        way.infer({"image": image})
            for place, answer in wanted.items():
                beside.take(number + place, block[place][1], answer)
            for name, other in dense.items():
                ms[name] += call_ms(functools.partial(other.infer, {"image": block[0][0]}), 1, warm_up=1)
            number += len(block)
            err_console.print(f"frame {number} of {count}", end="\r")
    medians = {name: float(np.median(taken)) for name, taken in ms.items()}
    for k in HELD:  # In the fastest engine, as anyone would.
        way = beside.ways[f"hold every {k}"]
        way.ms = [0.0 if place % k else min(medians.values()) for place in range(len(way.lost))]
    ways |= {name: way for name, way in beside.ways.items() if every == 1 or not name.startswith("hold")}
    rows = {name: way.figures(np.array(beside.moved), min(medians.values())) for name, way in ways.items()}
    return {
        "ways": rows,
        "dense_ms": medians,
        "engine": f"{execution.backend}, {execution.compute_precision}",
        "frames": number,
    }


@click.command()
@click.option("--video", type=click.Path(path_type=Path, exists=True), default=VIDEO, show_default=True)
@click.option("--start", default=400, show_default=True, help="Frames before it are for choosing by.")
@click.option("--frames", "count", type=click.IntRange(2 * max(HELD)), default=300, show_default=True)
@click.option("--model", type=click.Choice(["dinov2", MAP]), default="dinov2", show_default=True)
@click.option("--size", default=518, show_default=True)
@click.option("--backend", type=click.Choice(["onnxruntime", "openvino"]), default="onnxruntime", show_default=True)
@click.option("--compute-precision", "precision", default="auto", show_default=True)
@click.option("--int8", is_flag=True)
@click.option("--every", default=1, show_default=True, help="Compare one of so many frames.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for stream_MODEL_SIZE.json.")
def main(
    video: Path,
    start: int,
    count: int,
    model: str,
    size: int,
    backend: str,
    precision: str,
    int8: bool,
    every: int,
    output: Path | None,
) -> None:
    """Compare streaming inference with the dense model and with alternatives."""
    with tempfile.TemporaryDirectory() as scratch:
        small = round(size * FEWER / 14) * 14
        bundles = [exported(model, side, Path(scratch) / f"bundle{side}") for side in (size, small)]
        bundles += [exported(model, size, Path(scratch) / "int8", True)] if int8 else []
        found = measure(bundles, video, start, count, Execution(backend=backend, compute_precision=precision), every)
        subject = Subject(path=model, sha256=bundle_hash(bundles[-1]))
    rows = [
        [
            name,
            *(f"{row[key]:.4f}" for key in ("patches", "moving_tenth", "worst_frame", "frames_at_98")),
            f"{row['ms']:.1f}",
            f"{row['times']:.2f}",
            f"{row['p99_over_dense']:.2f}",
            f"{row['iou']:.3f}" if "iou" in row else "-",
        ]
        for name, row in found["ways"].items()
    ]
    head = ["", "patches", "moving tenth", "worst frame", "at .98", "ms", "times dense", "p99 / dense", "IoU"]
    print_table(f"{video.name}, {size} px, {found['engine']}; dense {found['dense_ms']}", head, rows)
    if output:
        method = {"video": video.name, "start": start, "size": size, "engine": found.pop("engine")}
        write_summary(
            output / f"stream_{model}_{size}{'_int8' * int8}_{video.stem}.json",
            Result("comparison", [subject], method, {}, found),
        )


if __name__ == "__main__":
    main()
