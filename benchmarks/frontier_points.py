"""Points of `frontier.py`: our budgets and the rivals, each file in each engine."""

from __future__ import annotations

import dataclasses
import functools
import timeit
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import tome
import torch
from accuracy_images import linked
from cpu_engines import by_kernels, has_bf16, openvino_compiled, ort_session
from fidelity_subject import weights_file
from torch import nn

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
"""Times the fastest engine's time above which an engine is left out along a front."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One image size: budgets, rivals and fidelities to compare at.

    Attributes:
        budgets: Ours, as (merging rate: see `tome.schedule`; keep).
        background_tokens: Number of background tokens.
        constant: Constant merging rates of rivals.
        falling: Falling merging rates of rivals.
        grids: Patches per side of the rivals with fewer pixels.
        compared: Fidelities to compare at.
        start: Sparse model that a search started from; None: one with these background tokens.
    """

    budgets: tuple[tuple[int | tuple[int, float] | str, Keep], ...]
    background_tokens: int
    constant: tuple[int, ...]
    falling: tuple[int | tuple[int, float] | str, ...]
    grids: tuple[int, ...]
    compared: tuple[float, ...]
    start: Path | None = None


@dataclasses.dataclass(frozen=True)
class Setting:
    """Settings shared by all points of one run."""

    size: int
    threads: int
    int8: bool
    model: str
    weights: Path

    @property
    def hints(self) -> tuple[str, ...]:
        """OpenVINO's precisions; the last is the fastest."""
        return ("f32", "bf16") if self.int8 and has_bf16() else ("f32",)

    @property
    def large(self) -> bool:
        """True if files are too large for ONNX Runtime, which then takes up to twice as long as OpenVINO."""
        return self.size > 1000

    @property
    def few(self) -> bool:
        """True if memory is too small for bf16 without int8, which is never the fastest."""
        return self.large or self.model != material.DINOV2

    @property
    def images(self) -> np.ndarray:
        return smooth_images(self.size)


@dataclasses.dataclass
class Point:
    """One file in one engine.

    Attributes:
        family: Points with which it is interpolated.
        macs: Multiply-accumulates of all layers, per image.
        infer: Returns all outputs for images.
        tokens: Name or number of the tokens among the outputs.
        images: Images to time.
        rest: Frees memory that only a run needs.
    """

    family: str
    budget: str
    infer: Callable[[np.ndarray], Any]
    tokens: str | int
    images: np.ndarray
    macs: float
    precision: str = "fp32"
    rest: Callable[[], None] = lambda: None

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
    def kind(self) -> str:
        return self.family.partition(", ")[0]


class Teacher:
    """The dense model's tokens of images, and the cosines of others to them."""

    def __init__(self, size: int, paths: Sequence[Path]) -> None:
        self.paths, self.size = paths, size
        model: Any = load_model(material.DINOV2, weights_file(), size)
        dense = tome.ToMe(model, [0] * len(model.blocks)).eval()
        self.wanted = [in_torch(dense, image)[1].numpy()[0] for image in self.images(size)]

    def images(self, side: int) -> Iterator[np.ndarray]:
        """Load images as uint8 [1,side,side,3]."""
        return (load_image(path, side)[None] for path in self.paths)

    def cosines(self, tokens: Callable[[np.ndarray], np.ndarray], side: int | None = None) -> dict[str, list[float]]:
        """Return cosines of patches (mean per image) and class token. side: None is the size's own.

        Args:
            tokens: Function from images uint8 [1,side,side,3] to tokens [1,N,C].
        """
        pairs = zip(self.images(side or self.size), self.wanted, strict=True)
        rows = [cosine(tokens(image)[0], wanted) for image, wanted in pairs]
        return {
            "patches_cosine": [float(row[1:].mean()) for row in rows],
            "class_cosine": [float(row[0]) for row in rows],
        }


def photographs(size: int, count: int | None) -> list[Path]:
    """Return publication photographs; at 1036 px (a minute each), 24 of them by default."""
    paths = split.images("publication")
    return evenly(paths, count or (24 if size > 1000 else len(paths)))


def quick_engines(points: list[Point], by_precision: bool, tell: Any) -> tuple[list[Point], dict[str, float]]:
    """Return the points of engines near the fastest, and the time ratios of the other engines.

    Engines are compared among ours and within each kind of rival.

    Args:
        by_precision: Compare only engines of one precision.
    """
    taken: dict[tuple[str, str], dict[str, float]] = {}
    for point in points:
        tell(f"a first look: {point.name}")
        point.run()
        engines = taken.setdefault((point.kind, point.precision if by_precision else ""), {})
        engines[point.engine] = engines.get(point.engine, 0.0) + min(timeit.repeat(point.run, number=1, repeat=2))
        point.rest()
    ratios = {
        (kind, engine): seconds / min(engines.values())
        for (kind, _), engines in taken.items()
        for engine, seconds in engines.items()
    }
    left = {engine for (_, engine), ratio in ratios.items() if ratio <= SLOW}
    out = {
        (kind, engine): ratio
        for (kind, engine), ratio in ratios.items()
        if ratio > SLOW and not (kind == "dense" and engine in left)  # It is the end of the others' fronts.
    }
    quick = [point for point in points if (point.kind, point.engine) not in out]
    return quick, {f"{kind} in {engine}": ratio for (kind, engine), ratio in out.items()}


def ours(case: Case, of: Setting, folder: Path, tell: Any) -> list[Point]:
    """Return the points of our budgets."""
    tell("sparsify")
    images = linked(folder / "calibration", split.images("calibration"))
    student = case.start or folder / "student"
    if not student.exists():
        sparsify(
            of.model,
            student,
            weights=of.weights,
            img_size=of.size,
            keep=0.25,
            background_tokens=case.background_tokens,
            merge=(case.falling[0],),
            calibrate=images,
        )
    points: list[Point] = []
    depth = len(load_student(student).model.blocks)
    for rate, keep in case.budgets:
        merge, named = tome.schedule(rate, depth)
        budget = f"merge {named}, keep {keep_text(keep)}"
        for precision in ("fp32", "int8") if of.int8 else ("fp32",):
            tell(f"export ours, {budget}, {precision}")
            spent = Budget(merge=merge, keep=keep)
            options = ExportOptions(precision=precision, calibrate=images if precision == "int8" else None)
            bundle = folder / f"ours, {budget}, {precision}"
            if not bundle.exists():
                export_bundle(student, bundle, budget=spent, options=options)
            macs = sum_of_layers(load_student(student, budget=spent))
            for family, backend, computes, ran in _our_engines(of, precision):
                if (backend, computes) == ("onnxruntime", "auto"):
                    file = bundle / "model.onnx"
                    points.append(_ort_point(file, True, family, budget, macs, ran, of.images, of.threads))
                    continue
                session = open_session(bundle, by_kernels(backend, computes, of.threads))
                infer = functools.partial(lambda session, x: session.infer({"image": x}), session)
                points.append(Point(family, budget, infer, "tokens", of.images, macs, ran))
    return points


def _our_engines(of: Setting, precision: str) -> list[tuple[str, str, str, str]]:
    """Return families, backends, compute precisions and precisions of our files in one weight precision."""
    rest = of.hints[-1]
    found = {
        "fp32": [("ours, OpenVINO f32", "openvino", "auto", "fp32")],
        "int8": [(f"ours, OpenVINO int8, rest {rest}", "openvino", "auto" if rest == "f32" else "bf16", "int8")],
    }[precision]
    if of.large:
        return found
    found.append((f"ours, ONNX Runtime {precision}", "onnxruntime", "auto", precision))
    bf16 = {
        "fp32": ("ours, OpenVINO bf16", "openvino", "bf16", "bf16"),
        "int8": ("ours, ONNX Runtime int8, attention bf16", "onnxruntime", "bf16", "int8"),
    }
    return found + [bf16[precision]] * ("bf16" in of.hints and not (of.few and precision == "fp32"))


def sum_of_layers(student: Any) -> float:
    """Return the multiply-accumulates of all layers."""
    costs = layer_costs(model_shape(student.model), student.sparsity)
    return float(sum(layer[kind].macs for layer in costs for kind in MAC_KINDS))


class Rival(NamedTuple):
    """One module for stock engines; side: of its images."""

    kind: str
    budget: str
    module: nn.Module
    side: int
    macs: float


def _rivals(case: Case, of: Setting) -> Iterator[Rival]:
    """Return the dense model, merging by both rules, and fewer pixels."""
    model: Any = load_model(of.model, of.weights, of.size)
    depth, grid, width = len(model.blocks), model.patch_embed.grid_size[0], model.embed_dim

    def merged(kind: str, budget: str, rates: list[int], chained: bool = False) -> Rival:
        module = tome.ToMe(model, rates, chained).eval()
        return Rival(kind, budget, module, of.size, float(tome.macs(rates, grid**2 + 1, width, 4 * width)))

    yield merged("dense", "dense", [0] * depth)
    for kind in ("ToMe", "MAT"):
        for rate in case.constant:
            yield merged(kind, f"{rate} a layer", [rate] * depth, kind == "MAT")
        for first in case.falling:
            rates, named = tome.schedule((first, 1) if isinstance(first, int) else first, depth)
            yield merged(f"{kind} falling", named, list(rates), kind == "MAT")
    for fewer in case.grids:
        side = of.size // grid * fewer
        small = tome.FewerPixels(load_model(of.model, of.weights, side), grid).eval()
        yield Rival(
            "fewer pixels", f"{side} px", small, side, float(tome.macs([0] * depth, fewer**2 + 1, width, 4 * width))
        )


def rivals(case: Case, of: Setting, folder: Path, tell: Any) -> list[Point]:
    """Return rivals in every engine; torch only for the dense model, as it was never the fastest.

    Above 1,000 px only OpenVINO is used: ONNX Runtime takes up to twice as long there.
    """
    torch.set_num_threads(of.threads)
    points: list[Point] = []
    for kind, budget, module, side, macs in _rivals(case, of):
        images, rest = smooth_images(side), of.hints[-1]
        plain = {} if of.large else {f"{kind}, ONNX Runtime fp32": ""}
        plain |= {f"{kind}, OpenVINO {hint}": hint for hint in of.hints[: 1 if of.few else None]}
        tell(f"export {kind}, {budget}")
        path, path8 = (folder / f"{kind}, {budget}{end}.onnx" for end in ("", ", int8"))
        if not path.exists():
            tome.export(module, side, path)
        points += _in_engines(path, plain, budget, macs, images, of.threads)
        if kind == "dense" and not of.few:
            points.append(Point(f"{kind}, torch fp32", budget, functools.partial(in_torch, module), 1, images, macs))
        if of.int8:
            if not path8.exists():
                tell(f"quantise {kind}, {budget}")
                _quantise(path, path8, side)
            quantised = {} if of.large else {f"{kind}, ONNX Runtime int8": ""}
            quantised |= {f"{kind}, OpenVINO int8, rest {rest}": rest}
            points += _in_engines(path8, quantised, budget, macs, images, of.threads, "int8")
    return points


def _quantise(path: Path, output: Path, side: int) -> None:
    """Quantise by the rules of our own files."""
    loaded = onnx.load(path)
    del loaded.graph.value_info[:]  # torch's exporter leaves some that shape inference contradicts
    calibration = [load_image(image, side)[None] for image in split.images("calibration")]
    made, _ = quantise(loaded, calibration, goal=int8_gates.LEAST_MEAN_COSINE)
    part = output.with_suffix(".part")
    onnx.save(made, part)
    part.rename(output)


@torch.inference_mode()
def in_torch(module: Any, images: np.ndarray) -> Any:
    """Return a function with a module's answers to uint8 [B,H,W,3]."""
    return module(torch.from_numpy(images))


def _in_engines(
    path: Path,
    families: dict[str, str],
    budget: str,
    macs: float,
    images: np.ndarray,
    threads: int,
    precision: str = "",
) -> list[Point]:
    """Return one file by family: OpenVINO's hint, or "" for ONNX Runtime."""
    points = []
    for family, hint in families.items():
        if not hint:
            points.append(_ort_point(path, False, family, budget, macs, precision or "fp32", images, threads))
            continue
        compiled = openvino_compiled(str(path), threads, hint)
        infer = functools.partial(lambda request, x: request.infer({"image": x}), compiled.create_infer_request())
        computed = precision or ("fp32" if hint == "f32" else "bf16")
        points.append(Point(family, budget, infer, "tokens", images, macs, computed, rest=compiled.release_memory))
    return points


def _ort_point(
    path: Path, kernels: bool, family: str, budget: str, macs: float, precision: str, images: np.ndarray, threads: int
) -> Point:
    session = ort_session(str(path), threads, kernels)
    place = [output.name for output in session.get_outputs()].index("tokens")
    return Point(family, budget, lambda x: session.run(None, {"image": x}), place, images, macs, precision)
