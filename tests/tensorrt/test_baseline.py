"""Tests of the dense baseline that is derived from a sparse model when an engine is built."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest

from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.export.check import smooth_images
from sparsifiner_edge.export.deployed_model import deploy
from sparsifiner_edge.export.graph import export_graph
from sparsifiner_edge.export.sessions import file_runner
from sparsifiner_edge.runtime.tensorrt.baseline import unmerged_model
from sparsifiner_edge.sparse.patch import set_budget
from tests.everything import first
from tests.hosts.factories import MODELS, model
from tests.models import EVA, eva, sparse, vit

HOSTS: dict[str, Callable[[], Any]] = {
    "ViT": lambda: vit(img_size=(96, 160)),
    **{name: lambda name=name: model(name) for name in ("DINOv3", *MODELS)},
    **{f"Eva, {name}": lambda options=options: eva(img_size=(48, 80), **options) for name, options in EVA.items()},
}


def exported(made: Any, batch: int | None) -> onnx.ModelProto:
    deployed = deploy(made)
    return export_graph(deployed, made.img_size, batch, deployed.output_names)


@pytest.mark.parametrize("batch", [2, None])
@pytest.mark.parametrize("host", first(list(HOSTS), 2))
def test_a_file_whose_tokens_merge_has_the_dense_model_inside(host: str, batch: int | None) -> None:
    made = sparse(host, HOSTS[host](), SparsityConfig(keep=0.4, background_tokens=2, channels=8, merge=(2,)))
    merged, size = exported(made, batch), made.img_size
    set_budget(made.model, dataclasses.replace(made.sparsity, keep=1.0, merge=()))
    dense, image = exported(made, batch), smooth_images(size, 2)
    found = unmerged_model(copy.deepcopy(merged))
    assert found is not None
    assert {function.name for function in found.functions} == {"DenseAttention"}
    got, wanted = file_runner(found)(image), file_runner(dense)(image)
    for name, value in wanted.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    # There is no baseline if the pairs of one layer come from another node.
    place, node = next(pair for pair in enumerate(merged.graph.node) if pair[1].op_type == "MergeTokens")
    merged.graph.node.insert(place, onnx.helper.make_node("Identity", [node.input[2]], ["elsewhere"]))
    node.input[2] = "elsewhere"
    assert unmerged_model(merged) is None
