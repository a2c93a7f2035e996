"""Real results of small real bundles, made once."""

from __future__ import annotations

import json

import pytest

from sparsifiner_edge.results import write_result


@pytest.fixture(scope="session")
def real(once, tiny_bundle, tiny_weights, pictures):
    """Result files by kind, of a sparse bundle and its dense one; `dense` is the dense bundle."""
    from sparsifiner_edge.profiles.estimate import estimate_bundle
    from tests.flat import evaluate_student, export_bundle, profile_bundle
    from tests.models import TINY

    def make(folder):
        dense = export_bundle(TINY, folder / "dense", weights=tiny_weights)
        results = {
            "comparison": profile_bundle(tiny_bundle, against=dense, seconds=0.3, threads=1),
            "profile": profile_bundle(dense, seconds=0.2, threads=1, layers=False, power=False),
            "evaluation": evaluate_student(tiny_bundle, pictures, against=dense),
            "estimate": estimate_bundle(tiny_bundle, "jetson-orin-nano-8gb", against=dense, jetpack="6"),
            "robustness": evaluate_student(tiny_bundle, pictures, against=dense, corruptions="fog,snow"),
        }
        for name, result in results.items():
            write_result(folder / f"{name}.json", result)

    folder = once("report", make)
    return {path.stem: path for path in folder.glob("*.json")} | {"dense": folder / "dense"}


@pytest.fixture
def changed(real, tmp_path):
    """Write a real result, changed by a function, to a separate file."""

    def write(name, change, file="changed.json"):
        result = json.loads(real[name].read_text(encoding="utf-8"))
        change(result)
        path = tmp_path / file
        path.write_text(json.dumps(result), encoding="utf-8")
        return path

    return write
