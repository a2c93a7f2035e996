"""Tests of files that are derived from the file of another plan: agreement with torch, size, int8 and refusals."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest

from sparsifiner_edge.errors import GateError
from sparsifiner_edge.export import int8
from sparsifiner_edge.export.check import smooth_images
from sparsifiner_edge.export.export import float_file
from sparsifiner_edge.export.replan import replan
from sparsifiner_edge.export.sessions import file_session
from sparsifiner_edge.images import Normalisation
from sparsifiner_edge.metrics import cosine
from sparsifiner_edge.optimizer.family import everything
from sparsifiner_edge.plan import LayerPlan
from sparsifiner_edge.sparse.patch import set_budget
from sparsifiner_edge.sparse.student import Student, make_student
from tests.everything import first
from tests.hosts.factories import Depth, depth_anything, model
from tests.models import TINY_CONFIG, eva, student

PIXELS = Normalisation((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
FEW = 12
"""Maximum number of nodes of a derived file beyond those of its own export, which folds constants such as rotations."""


def made(module: Any) -> Student:
    """Return a sparse model with projections computed from its weights."""
    return make_student(Student(module.eval(), type(module).__name__, PIXELS), TINY_CONFIG)


STUDENTS: dict[str, Callable[[], Student]] = {
    "timm": student,
    "rotary": lambda: made(model("DINOv3")),
    "with a decoder": lambda: made(Depth()),
    "rotary, timm": lambda: made(eva()),
    "with a decoder that reads all layers": lambda: made(depth_anything()),
    "CLIP": lambda: made(model("CLIP")),
    "SigLIP": lambda: made(model("SigLIP")),
}
"""All have at most 100 patches."""
MADE = first(STUDENTS, 3)


@functools.cache
def _whole(kind: str) -> tuple[Student, bytes]:
    start = STUDENTS[kind]()
    return start, float_file(planned(start, everything(start)), tokens=True).model.SerializeToString()


def whole(kind: str) -> tuple[Student, onnx.ModelProto]:
    """Return a model, and its file in which all layers merge and the early ones are sparse."""
    start, content = _whole(kind)
    return start, onnx.load_from_string(content)


def planned(start: Student, plan: LayerPlan) -> Student:
    """Return a copy of a model with a plan."""
    sparsity = plan.config(start.sparsity)
    changed = dataclasses.replace(start, model=copy.deepcopy(start.model), sparsity=sparsity)
    set_budget(changed.model, sparsity)
    return changed


def plan_for(start: Student, name: str) -> LayerPlan:
    """Return one of `PLANS`, whose first layers are sparse only where those of every model may be."""
    depth, half = len(start.backbone.layers), len(start.backbone.layers) // 2
    dense, rest = (1.0,) * depth, (1.0,) * (depth - half)
    few = max(1, start.backbone.patches // 20)
    return {
        "merges only": LayerPlan((few,) * depth, dense),
        "no merges in the first layers": LayerPlan((*(0,) * half, *(few,) * (depth - half)), (*(0.2,) * half, *rest)),
        "no merges in the last layers": LayerPlan((*(few,) * half, *(0,) * (depth - half)), (*(0.1,) * half, *rest)),
        "merges in the last layer only": LayerPlan((*(0,) * (depth - 1), few), dense),
        "dense": LayerPlan.dense(depth),
        "nothing merges": LayerPlan((0,) * depth, (*(0.35,) * half, *rest)),
        "other rates and shares": LayerPlan(
            tuple(max(1, 3 * few - 2 * layer) for layer in range(depth)), (0.5, *(1.0,) * (depth - 1))
        ),
    }[name]


PLANS = [
    "other rates and shares",
    "merges only",
    "no merges in the first layers",
    "no merges in the last layers",
    "merges in the last layer only",
    "nothing merges",
]


@pytest.mark.parametrize("name", [*PLANS, "dense"])
@pytest.mark.parametrize("kind", MADE)
def test_a_derived_file_agrees_with_torch(kind: str, name: str) -> None:
    start, base = whole(kind)
    before, plan = base.SerializeToString(), plan_for(start, name)
    file = float_file(planned(start, plan), tokens=True, other=base)  # It raises if they disagree.
    assert base.SerializeToString() == before
    onnx.checker.check_model(file.model)
    kinds = [node.op_type for node in file.model.graph.node]
    assert kinds.count("MatchTokens") == kinds.count("MergeTokens") == sum(rate > 0 for rate in plan.merge)
    assert kinds.count("KeySelect") == kinds.count("SparseAttention") == len(plan.sparse_layers)
    assert {function.name for function in file.model.functions} == {
        node.op_type for node in file.model.graph.node if node.domain == "sparsifiner"
    }
    tensors = [tensor.name for tensor in file.model.graph.initializer]
    assert len(set(tensors)) == len(tensors)


@pytest.mark.parametrize("name", PLANS)
def test_a_derived_file_may_be_derived_from(name: str) -> None:
    start, base = whole("timm")
    sizes, plan = (start.backbone.patches, start.backbone.prefix), plan_for(start, name)
    again = replan(base, start.sparsity, everything(start), *sizes)
    files = [replan(model, start.sparsity, plan, *sizes) for model in (base, again)]
    image = smooth_images(start.img_size)
    for one, other in zip(*(file_session(file).run(None, {"image": image}) for file in files), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("kind", "name"),
    first([(kind, name) for name in reversed(PLANS) for kind in list(STUDENTS)[:3]]),
)
def test_a_derived_file_has_as_many_nodes_as_its_own_export(kind: str, name: str) -> None:
    start, base = whole(kind)
    own = planned(start, plan_for(start, name))
    derived, fresh = (float_file(own, tokens=True, other=other).model for other in (base, None))
    assert len(fresh.graph.node) <= len(derived.graph.node) <= len(fresh.graph.node) + FEW


@pytest.mark.parametrize("kind", MADE)
def test_an_int8_file_of_another_plan_runs(kind: str) -> None:
    """It keeps the scales that were calibrated for the first plan."""
    start, base = whole(kind)
    size, backbone = start.img_size, start.backbone
    quantised, _ = int8.quantise(base, [smooth_images(size, seed=seed) for seed in range(4)])
    image = smooth_images(size, seed=9)
    for name in PLANS:
        plan = plan_for(start, name)
        derived = replan(quantised, start.sparsity, plan, backbone.patches, backbone.prefix)
        exact = replan(base, start.sparsity, plan, backbone.patches, backbone.prefix)
        outputs = [output.name for output in derived.graph.output]
        got, wanted = (file_session(file).run(outputs, {"image": image}) for file in (derived, exact))
        for values, others in zip(got, wanted, strict=True):
            assert values.shape == others.shape
            assert np.isfinite(values).all()
        tokens = outputs.index("tokens")
        assert cosine(got[tokens], wanted[tokens]).mean() > 0.9
        kinds, before = ([node.op_type for node in file.graph.node] for file in (derived, quantised))
        assert kinds.count("QuantizeLinear") == before.count("QuantizeLinear") > 0


def test_what_a_file_lacks_is_said() -> None:
    start, base = whole("timm")
    backbone = start.backbone
    sizes = backbone.patches, backbone.prefix
    last = LayerPlan((4,) * 6, (*(1.0,) * 5, 0.5))
    with pytest.raises(GateError, match="Layer 5 of the file cannot select keys"):
        replan(base, start.sparsity, last, *sizes)
    merged = replan(base, start.sparsity, plan_for(start, "merges only"), *sizes)
    with pytest.raises(GateError, match="Layer 0 of the file cannot select keys"):
        replan(merged, start.sparsity, plan_for(start, "nothing merges"), *sizes)
    sparse = replan(base, start.sparsity, plan_for(start, "nothing merges"), *sizes)
    with pytest.raises(GateError, match="Layer 0 of the file cannot merge tokens"):
        replan(sparse, start.sparsity, plan_for(start, "merges only"), *sizes)
