"""A camera's stream beside the dense model and what else one would do: frames of a video, all of them against the dense
model's outputs of the same frame.

    python benchmarks/stream.py [--video FILE] [--start 400] [--frames 300] [--model saliency] [--size 518] [-o FOLDER]

Per way: mean cosine of the patches, of the worst frame, and of the moving tenth (the patches whose dense output differs
most from that of the frame before); share of the frames at .98; of a decoder's map the IoU; milliseconds a frame in
turn with the dense model in every engine, of which the fastest counts. Ways: a stream of fixed shares, one that keeps
to .98 by itself, and the dense model of every k-th frame, held.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
from camera_overhead import VIDEO
from fidelity_subject import weights_file
from summary import write_summary

import sparsifiner_edge as se
from sparsifiner_edge.arrays import Array
from sparsifiner_edge.bundle.store import bundle_hash
from sparsifiner_edge.cli.common import err_console, print_table
from sparsifiner_edge.demo import material
from sparsifiner_edge.errors import SparsifinerError
from sparsifiner_edge.execution import Execution
from sparsifiner_edge.fitting import Framing
from sparsifiner_edge.images import fit_image
from sparsifiner_edge.judge import THRESHOLD
from sparsifiner_edge.metrics import cosine, intersection_over_union
from sparsifiner_edge.profiles.measure.timing import call_ms
from sparsifiner_edge.results import Result, Subject

SHARES, HELD, AT_LEAST = (1 / 4, 1 / 8, 1 / 16), (2, 4, 8), 0.98
ENGINES = (Execution(backend="onnxruntime"), Execution(backend="openvino"),
           Execution(backend="openvino", precision="bf16"))  # fmt: skip
TIMED_EVERY = 10
"""Frames, of which one is timed in every engine of the dense model."""
MAP = "saliency"
Infer = Callable[[dict[str, Array]], dict[str, Array]]


def frames(video: Path, size: int, start: int, count: int) -> Iterator[Array]:
    """uint8 [1,H,W,3] of consecutive frames, cropped."""
    import av

    with av.open(str(video)) as file:
        for number, frame in enumerate(file.decode(video=0)):
            if number >= start + count:
                return
            if number >= start:
                yield np.asarray(fit_image(frame.to_image(), Framing(size)))[None]


def exported(model: str, size: int, folder: Path) -> Path:
    """The dense model with the files of a stream, and tokens."""
    name, options = material.DINOV2, se.ModelOptions(weights=weights_file(), img_size=size)
    if model == MAP:
        name, options = "sparsifiner_edge.demo.saliency:saliency", se.ModelOptions(img_size=size)
    return se.export_bundle(name, folder, model=options, options=se.ExportOptions(stream=True, tokens=True))


class Way:
    """One way to answer frames, and what came of it.

    Attributes:
        lost: 1 - cosine of each patch, frame by frame. iou: of the maps. ms: of each frame. whole: frames that were
            computed whole, or by the model.
    """

    def __init__(self, infer: Infer, stream: Any = None) -> None:
        self.infer, self.stream = infer, stream
        self.lost, self.iou, self.ms, self.whole = list[Array](), list[float](), list[float](), 0

    def answer(self, image: Array, dense: dict[str, Array], prefix: int) -> None:
        outputs: dict[str, Array] = {}
        self.ms += call_ms(lambda: outputs.update(self.infer({"image": image})), 1)
        self.lost.append(1 - cosine(outputs["tokens"], dense["tokens"])[0, prefix:])
        self.whole += self.stream is not None and self.stream.computed.by != "step"
        if MAP in dense:
            self.iou.append(intersection_over_union(outputs[MAP] > THRESHOLD, dense[MAP] > THRESHOLD))

    def figures(self, moved: Array, dense_ms: float) -> dict[str, Any]:
        """moved: how much each patch's dense output differs from the frame's before, [F-1,P]."""
        lost = np.array(self.lost)[1:]
        moving = np.argsort(-moved, 1)[:, : moved.shape[1] // 10]
        by_frame = lost.mean(1)
        row = {
            "patches": 1 - float(lost.mean()), "worst_frame": 1 - float(by_frame.max()),
            "moving_tenth": 1 - float(np.take_along_axis(lost, moving, 1).mean()),
            "frames_at_98": float((by_frame <= 1 - AT_LEAST).mean()), "whole": self.whole,
            "ms": float(np.mean(self.ms[1:])), "p99_over_dense": float(np.quantile(self.ms[1:], 0.99)) / dense_ms,
            "times": dense_ms / float(np.mean(self.ms[1:])),
        }  # fmt: skip
        return row | ({"iou": float(np.mean(self.iou[1:])), "least_iou": min(self.iou[1:])} if self.iou else {})


def held(every: int, infer: Infer) -> Infer:
    """The model's outputs of every k-th frame."""
    last, number = dict[str, Array](), iter(range(1 << 30))

    def answer(inputs: dict[str, Array]) -> dict[str, Array]:
        if next(number) % every == 0:
            last.update(infer(inputs))
        return last

    return answer


def measure(bundle: Path, video: Path, start: int, count: int, execution: Execution) -> dict[str, Any]:
    """All ways on the same frames, in turn."""
    with contextlib.ExitStack() as stack:
        session, dense = stack.enter_context(se.open_session(bundle, execution)), dict[str, Any]()
        for engine in ENGINES:
            with contextlib.suppress(SparsifinerError):  # A processor without bf16.
                dense[str(engine)] = stack.enter_context(se.open_session(bundle, engine))
        streams = {f"stream {share:g}": session.stream(share=share) for share in SHARES}
        streams[f"stream at {AT_LEAST}"] = session.stream(AT_LEAST)
        truth = dense[str(ENGINES[0])]
        ways = {name: Way(stream.infer, stream) for name, stream in streams.items()}
        ways |= {f"hold every {every}": Way(held(every, truth.infer)) for every in HELD}
        ms, moved, before = {name: list[float]() for name in dense}, list[Array](), None
        size, prefix = int(str(session.inputs[0].shape[1])), 1
        for number, image in enumerate(frames(video, size, start, count)):
            wanted = truth.infer({"image": image})
            if before is not None:
                moved.append(1 - cosine(before, wanted["tokens"])[0, prefix:])
            before = wanted["tokens"]
            for way in ways.values():
                way.answer(image, wanted, prefix)
            if number % TIMED_EVERY == 1:
                for name, other in dense.items():
                    ms[name] += call_ms(functools.partial(other.infer, {"image": image}), 1, warm_up=1)
            err_console.print(f"frame {number + 1} of {count}", end="\r")
        medians = {name: float(np.median(taken)) for name, taken in ms.items()}
        rows = {name: way.figures(np.array(moved), min(medians.values())) for name, way in ways.items()}
        return {"ways": rows, "dense_ms": medians, "engine": str(execution), "frames": len(moved) + 1}


@click.command()
@click.option("--video", type=click.Path(path_type=Path, exists=True), default=VIDEO, show_default=True)
@click.option("--start", default=400, show_default=True, help="Frames before it are for choosing by.")
@click.option("--frames", "count", default=300, show_default=True)
@click.option("--model", type=click.Choice(["dinov2", MAP]), default="dinov2", show_default=True)
@click.option("--size", default=518, show_default=True)
@click.option("--backend", type=click.Choice(["onnxruntime", "openvino"]), default="onnxruntime", show_default=True)
@click.option("--precision", default="auto", show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for stream_MODEL_SIZE.json.")
def main(
    video: Path, start: int, count: int, model: str, size: int, backend: str, precision: str, output: Path | None
) -> None:
    """See the module's documentation."""
    with tempfile.TemporaryDirectory() as scratch:
        bundle = exported(model, size, Path(scratch) / "bundle")
        found = measure(bundle, video, start, count, Execution(backend=backend, precision=precision))
        subject = Subject(path=model, sha256=bundle_hash(bundle))
    rows = [
        [name, *(f"{row[key]:.4f}" for key in ("patches", "moving_tenth", "worst_frame", "frames_at_98")),
         f"{row['ms']:.1f}", f"{row['times']:.2f}", f"{row['p99_over_dense']:.2f}",
         f"{row['iou']:.3f}" if "iou" in row else "-"]
        for name, row in found["ways"].items()
    ]  # fmt: skip
    head = ["", "patches", "moving tenth", "worst frame", "at .98", "ms", "times dense", "p99 / dense", "IoU"]
    print_table(f"{video.name}, {size} px, {found['engine']}; dense {found['dense_ms']}", head, rows)
    if output:
        method = {"video": video.name, "start": start, "size": size, "engine": found.pop("engine")}
        write_summary(output / f"stream_{model}_{size}.json", Result("comparison", [subject], method, {}, found))


if __name__ == "__main__":
    main()
