"""Manifests that speak of no model, to whoever estimates what it would cost."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsifiner_edge.artifacts import BUNDLE_FILE
from sparsifiner_edge.errors import ArtifactError, SparsifinerError
from tests.bad_input.damage import edit_json
from tests.commands import assert_refused, call
from tests.fuzz.mutate import json_text, mutated_object
from tests.plain import estimate_bundle

Manifest = dict[str, Any]
PARTS = ("costs", "dense_costs", "shape", "sparsity", "tokens", "inputs", "precision", "name", "ops")


def test_what_is_estimated_here(counted: Path) -> None:
    assert estimate_bundle(counted, "t4", precision="fp16")["statistics"]["latency_ms"]["value"] > 0


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: m.update(inputs=3), "inputs is 3, not list"),
        (lambda m: m.update(inputs=True), "inputs is true, not list"),
        (lambda m: m.pop("inputs"), "inputs is missing"),
        (lambda m: m["inputs"][0].update(shape=4), "inputs[0].shape is 4, not list"),
        (lambda m: m["inputs"][0].update(shape={"0": 1}), 'inputs[0].shape is {"0": 1}, not list'),
        (lambda m: m["inputs"][0].update(shape=[1.5]), "inputs[0].shape[0] is 1.5, not int or str or null"),
        (lambda m: m["inputs"][0].update(shape=[2**40]), "an input's shape is"),
        (lambda m: m["inputs"][0].update(shape=[-1]), r"an input's shape is [-1]"),
        (lambda m: m.update(ops=[]), "names no operators for its sparse layers"),
        (lambda m: m.update(precision=["fp16"]), 'precision is ["fp16"], not str or null'),
        (lambda m: m["shape"].update(patches=16.5), "shape.patches is 16.5, not int"),
        (lambda m: m["shape"].update(depth=-1), "shape.depth is -1, not int >= 1"),
        (lambda m: m["shape"].update(depth=0), "shape.depth is 0, not int >= 1"),
        (lambda m: m["shape"].update(depth=1025), "shape.depth is 1025, not int <= 1024"),
        (lambda m: m["tokens"].update(grid=[-16, -16]), "tokens.grid[0] is -16, not int >= 1"),
        (lambda m: m["tokens"].update(prefix=-1), "tokens.prefix is -1, not int >= 0"),
        (lambda m: m["shape"].update(depth=10**300), "shape.depth is 1000000"),
        (lambda m: m["shape"].update(patches=255), "costs are not those of its model"),
        (lambda m: m["shape"].pop("hidden"), "shape.hidden is missing"),
        (lambda m: m["tokens"].update(grid=[16.5, 16]), "tokens.grid[0] is 16.5, not int"),
        (lambda m: m["tokens"].update(grid=[256]), "tokens.grid is [256], not list of length 2"),
        (lambda m: m["tokens"].update(grid=["16", 16]), 'tokens.grid[0] is "16", not int'),
        (lambda m: m["costs"].update(predictor_macs=0), "costs are not those of its model"),
        (lambda m: m["costs"].update(predictor_macs=10**4000), "costs are not those of its model"),
        (lambda m: m["dense_costs"].update(attention_macs=0), "costs are not those of its model"),
        (lambda m: m["dense_costs"].update(attention_macs=1e300), "not int"),
        (lambda m: m["dense_costs"].update(mlp_macs=-5), "costs are not those of its model"),
        (lambda m: m["sparsity"].update(value_power=10**400), "value_power is 1000"),
        (lambda m: m["sparsity"].update(keep=float("nan")), "sparsity.keep is nan"),
        (lambda m: m.update(more=float("inf")), "more is inf"),
    ],
)
def test_a_manifest_of_no_model(
    change: Callable[[Manifest], object], text: str, counted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_json(counted / BUNDLE_FILE, change)
    output = tmp_path / "e.json"
    outcome = call(capsys, "estimate", counted, "--board", "t4", "--precision", "fp16", "-o", output)
    assert_refused(outcome, text)
    assert not output.exists()


def test_a_name_that_is_no_text_is_not_used(counted: Path) -> None:
    edit_json(counted / BUNDLE_FILE, lambda m: m.update(name={"a": ["\x1b"]}))
    with pytest.raises(ArtifactError, match=r'name is {"a": \["\\u001b"\]}, not str'):
        estimate_bundle(counted, "t4", precision="fp16")
    edit_json(counted / BUNDLE_FILE, lambda m: m.pop("name"))
    assert estimate_bundle(counted, "t4", precision="fp16")["subjects"][0]["name"] == "counted"


def test_any_manifest_is_estimated_or_refused(counted: Path) -> None:
    """A hundred manifests that were changed at random: none of them ends in a traceback."""
    path, good, done = counted / BUNDLE_FILE, json.loads((counted / BUNDLE_FILE).read_text()), 0
    for number in range(100):
        rng = random.Random(number)
        part = rng.choice(PARTS)
        changed = mutated_object({part: good[part]}, rng)
        path.write_bytes(json_text(good | (changed if isinstance(changed, dict) else {part: changed})))
        with contextlib.suppress(SparsifinerError):
            json.dumps(estimate_bundle(counted, "t4", precision="fp16"), allow_nan=False)
            done += 1
    assert done
