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
from sparsifiner_edge.errors import SparsifinerError
from sparsifiner_edge.profiles.estimate import estimate_bundle
from tests.bad_input.damage import edit_json
from tests.commands import assert_refused, call
from tests.fuzz.mutate import json_text, mutated_object

Manifest = dict[str, Any]
PARTS = ("costs", "dense_costs", "sparsity", "tokens", "inputs", "precision", "name", "ops")


def test_what_is_estimated_here(counted: Path) -> None:
    assert estimate_bundle(counted, "t4", precision="fp16")["statistics"]["latency_ms"]["value"] > 0


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: m.update(inputs=3), "inputs is 3, not list"),
        (lambda m: m.update(inputs=True), "inputs is true, not list"),
        (lambda m: m.pop("inputs"), "inputs is null, not list"),
        (lambda m: m["inputs"][0].update(shape=4), "an input's shape is 4"),
        (lambda m: m["inputs"][0].update(shape={"0": 1}), "an input's shape is {'0': 1}"),
        (lambda m: m["inputs"][0].update(shape=[1.5]), r"an input's shape is [1.5]"),
        (lambda m: m["inputs"][0].update(shape=[2**40]), "an input's shape is"),
        (lambda m: m["inputs"][0].update(shape=[-1]), r"an input's shape is [-1]"),
        (lambda m: m.update(ops={}), "names no operators for its sparse layers"),
        (lambda m: m.update(precision=["fp16"]), "precision is"),
        (lambda m: m["tokens"].update(grid=[16.0, 16]), "costs are those of no model"),
        (lambda m: m["tokens"].update(grid=[256]), "costs are those of no model"),
        (lambda m: m["tokens"].update(grid=[-16, -16]), "costs are those of no model"),
        (lambda m: m["tokens"].update(grid=["16", 16]), "costs are those of no model"),
        (lambda m: m["tokens"].update(prefix=10**300), "costs are those of no model"),
        (lambda m: m["costs"].update(predictor_macs=0), "costs are those of no model"),
        (lambda m: m["costs"].update(predictor_macs=10**4000), "costs are those of no model"),
        (lambda m: m["dense_costs"].update(attention_macs=0), "costs are those of no model"),
        (lambda m: m["dense_costs"].update(attention_macs=1e300), "not int"),
        (lambda m: m["dense_costs"].update(mlp_macs=-5), "mlp_macs is -5"),
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
