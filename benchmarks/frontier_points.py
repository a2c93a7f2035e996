"""What `frontier.py` measures: our budgets and the rivals, each file in each engine."""

from __future__ import annotations

import dataclasses
import functools
import timeit
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tome
import torch
from accuracy_images import linked
from cpu_engines import Run, by_kernels, has_bf16, openvino_run, ort_session
from fidelity_subject import weights_file

from sparsifiner_edge import Budget, ExportOptions
from sparsifiner_edge.config import Keep, keep_text
from sparsifiner_edge.costs import MAC_KINDS, layer_costs
from sparsifiner_edge.demo import material, split
from sparsifiner_edge.export import int8 as int8_gates
from sparsifiner_edge.export.check import smooth_images
from sparsifiner_edge.export.export import export_bundle, model_shape
from sparsifiner_edge.export.int8 import quantise
from sparsifiner_edge.images import evenly, load_image
from sparsifiner_edge.metrics import cosine
from sparsifiner_edge.runtime import open_session
from sparsifiner_edge.sparse.hosts.timm import load_model
from sparsifiner_edge.sparse.student import load_student, sparsify

SLOW = 1.25
"""Times the fastest engine's time, from which on one is left out along a front."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One image size: our budgets as (what merges: see `tome.schedule`; keep), cells, the rivals' rates, and
    fidelities to compare at. start: a student that a search made its front of; None: one of these cells.
    """

    budgets: tuple[tuple[int | tuple[int, float] | str, Keep], ...]
    cells: int
    constant: tuple[int, ...]
    falling: tuple[int, ...]
    compared: tuple[float, ...]
    start: Path | None = None


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all points of one run share."""

    size: int
    threads: int
    int8: bool

    @property
    def hints(self) -> tuple[str, ...]:
        """OpenVINO's precisions; the last is the fastest."""
        return ("f32", "bf16") if self.int8 and has_bf16() else ("f32",)

    @property
    def images(self) -> np.ndarray:
        return smooth_images(self.size)


@dataclasses.dataclass
class Point:
    """One file in one engine.

    Attributes:
        family: what it is interpolated with. macs: of all layers, per image.
        infer: all outputs for images. tokens: the name or number of the tokens among them. images: what is timed.
    """

    family: str
    budget: str
    infer: Callable[[np.ndarray], Any]
    tokens: str | int
    images: np.ndarray
    macs: float
    precision: str = "fp32"

    def run(self) -> Any:
        return self.infer(self.images)

    def tokens_of(self, images: np.ndarray) -> np.ndarray:
        return np.array(self.infer(images)[self.tokens])

    @property
    def name(self) -> str:
        return f"{self.family} | {self.budget}"

    @property
    def engine(self) -> str:
        return self.family.partition(", ")[2]

    @property
    def side(self) -> str:
        return "ours" if self.family.startswith("ours") else "rivals"


class Teacher:
    """The dense model's tokens of images, and how near others come to them."""

    def __init__(self, size: int, paths: Sequence[Path]) -> None:
        self.images = [load_image(path, size)[None] for path in paths]
        model: Any = load_model(material.DINOV2, weights_file(), size)
        dense = tome.ToMe(model, [0] * len(model.blocks)).eval()
        self.wanted = [in_torch(dense, image)[1].numpy()[0] for image in self.images]

    def cosines(self, tokens: Callable[[np.ndarray], np.ndarray]) -> dict[str, list[float]]:
        """Of patches, their mean per image, and of the class token. tokens: of images uint8 [1,H,W,3] -> [1,N,C]."""
        rows = [cosine(tokens(x)[0], y) for x, y in zip(self.images, self.wanted, strict=True)]
        return {
            "patches_cosine": [float(row[1:].mean()) for row in rows],
            "class_cosine": [float(row[0]) for row in rows],
        }


def photographs(size: int, count: int | None) -> list[Path]:
    """Of the publication set; at 1036 px, where a photograph takes a minute, 24 of them if not said otherwise."""
    paths = split.images("publication")
    return evenly(paths, count or (24 if size > 1000 else len(paths)))


def quick_engines(points: list[Point], tell: Any) -> tuple[list[Point], dict[str, float]]:
    """Those in an engine and precision that comes near the fastest, of ours and of all rivals; and by name what does
    not, with how many times the fastest's time it takes.
    """
    sides: dict[str, dict[str, float]] = {"ours": {}, "rivals": {}}
    for point in points:
        tell(f"a first look: {point.name}")
        point.run()
        engines = sides[point.side]
        engines[point.engine] = engines.get(point.engine, 0.0) + min(timeit.repeat(point.run, number=1, repeat=2))
    ratios = {
        (side, engine): seconds / min(engines.values())
        for side, engines in sides.items() for engine, seconds in engines.items()
    }  # fmt: skip
    out = {f"{side} in {engine}": ratio for (side, engine), ratio in ratios.items() if ratio > SLOW}
    return [point for point in points if ratios[point.side, point.engine] <= SLOW], out


def ours(case: Case, of: Setting, folder: Path, tell: Any) -> list[Point]:
    """Our budgets."""
    tell("sparsify")
    images = linked(folder / "calibration", split.images("calibration"))
    student = case.start or sparsify(
        material.DINOV2, folder / "student", weights=weights_file(), img_size=of.size, keep=0.25, cells=case.cells,
        merge=(case.constant[0],), calibrate=images,
    )  # fmt: skip
    points: list[Point] = []
    depth = len(load_student(student).model.blocks)
    for rate, keep in case.budgets:
        merge, named = tome.schedule(rate, depth)
        budget = f"merge {named}, keep {keep_text(keep)}"
        for precision in ("fp32", "int8") if of.int8 else ("fp32",):
            tell(f"export ours, {budget}, {precision}")
            spent = Budget(merge=merge, keep=keep)
            options = ExportOptions(precision=precision, calibrate=images if precision == "int8" else None)
            bundle = export_bundle(student, folder / f"ours-{len(points)}", budget=spent, options=options)
            macs = sum_of_layers(load_student(student, budget=spent))
            for family, backend, computes, ran in _our_engines(of, precision):
                if (backend, computes) == ("onnxruntime", "auto"):
                    points.append(_ort_point(bundle / "model.onnx", True, family, budget, macs, ran, of))
                    continue
                session = open_session(bundle, by_kernels(backend, computes, of.threads))
                infer = functools.partial(lambda session, x: session.infer({"image": x}), session)
                points.append(Point(family, budget, infer, "tokens", of.images, macs, ran))
    return points


def _our_engines(of: Setting, precision: str) -> list[tuple[str, str, str, str]]:
    """Families, their backends, what they compute in, and precisions, of our files in one precision."""
    found = [(f"ours, ONNX Runtime {precision}", "onnxruntime", "auto", precision)]
    if precision == "fp32":
        found.append(("ours, OpenVINO f32", "openvino", "auto", "fp32"))
        return found + [("ours, OpenVINO bf16", "openvino", "bf16", "bf16")] * ("bf16" in of.hints)
    rest = of.hints[-1]
    found.append((f"ours, OpenVINO int8, rest {rest}", "openvino", "auto" if rest == "f32" else "bf16", "int8"))
    return found + [("ours, ONNX Runtime int8, attention bf16", "onnxruntime", "bf16", "int8")] * ("bf16" in of.hints)


def sum_of_layers(student: Any) -> float:
    """Multiply-accumulates of all layers."""
    costs = layer_costs(model_shape(student.model), student.sparsity)
    return float(sum(layer[kind].macs for layer in costs for kind in MAC_KINDS))


def rivals(case: Case, of: Setting, folder: Path, tell: Any) -> list[Point]:
    """Dense and merging by its published rule in every engine."""
    model: Any = load_model(material.DINOV2, weights_file(), of.size)
    depth, tokens, width = len(model.blocks), model.patch_embed.num_patches + 1, model.embed_dim
    settings = [("dense", "dense", [0] * depth)]
    settings += [("ToMe", f"{rate} a layer", [rate] * depth) for rate in case.constant]
    settings += [("ToMe falling", f"{first}..0", list(tome.schedule((first, 1), depth)[0])) for first in case.falling]
    calibration = [load_image(path, of.size)[None] for path in split.images("calibration")]
    torch.set_num_threads(of.threads)
    points = []
    for kind, budget, rates in settings:
        plain = {f"{kind}, ONNX Runtime fp32": "", **{f"{kind}, OpenVINO {hint}": hint for hint in of.hints}}
        family, rest = f"{kind}, torch fp32", of.hints[-1]
        quantised = {f"{kind}, ONNX Runtime int8": "", f"{kind}, OpenVINO int8, rest {rest}": rest} if of.int8 else {}
        tell(f"export {kind}, {budget}")
        path = tome.export(model, rates, of.size, folder / f"{kind}-{budget}.onnx")
        macs = float(tome.macs(rates, tokens, width, 4 * width))
        points += _in_engines(path, plain, budget, macs, of)
        merged = functools.partial(in_torch, tome.ToMe(model, rates).eval())
        points.append(Point(family, budget, merged, 1, of.images, macs))
        if quantised:
            tell(f"quantise {kind}, {budget}")
            loaded = onnx.load(path)
            del loaded.graph.value_info[:]  # torch's exporter leaves some that shape inference contradicts
            made, _ = quantise(loaded, calibration, goal=int8_gates.LEAST_MEAN_COSINE)
            path8 = folder / f"{kind}-{budget}-int8.onnx"
            onnx.save(made, path8)
            points += _in_engines(path8, quantised, budget, macs, of, "int8")
    return points


@torch.inference_mode()
def in_torch(module: Any, images: np.ndarray) -> Any:
    """What a module answers to uint8 [B,H,W,3]."""
    return module(torch.from_numpy(images))


def _in_engines(
    path: Path, families: dict[str, str], budget: str, macs: float, of: Setting, precision: str = ""
) -> list[Point]:
    """One file by family: OpenVINO's hint, or "" for ONNX Runtime."""
    points = []
    for family, hint in families.items():
        if not hint:
            points.append(_ort_point(path, False, family, budget, macs, precision or "fp32", of))
            continue
        feed = {"image": of.images}
        run = openvino_run(str(path), feed, of.threads, hint)

        def infer(x: np.ndarray, feed: dict[str, np.ndarray] = feed, run: Run = run) -> Any:
            feed["image"] = x
            return run()

        computed = precision or ("fp32" if hint == "f32" else "bf16")
        points.append(Point(family, budget, infer, "tokens", of.images, macs, computed))
    return points


def _ort_point(
    path: Path, kernels: bool, family: str, budget: str, macs: float, precision: str, of: Setting
) -> Point:  # fmt: skip
    session = ort_session(str(path), of.threads, kernels)
    place = [output.name for output in session.get_outputs()].index("tokens")
    return Point(family, budget, lambda x: session.run(None, {"image": x}), place, of.images, macs, precision)
