"""Tests that the signed files are those that run: no additional files and no replaced ones."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from sparsifiner_edge.bundle.kernels import read_table
from sparsifiner_edge.bundle.sign import require_signature, sign_bundle
from sparsifiner_edge.bundle.store import Bundle, bundle_scratch, extend_bundle, open_bundle
from sparsifiner_edge.errors import ArtifactError
from sparsifiner_edge.runtime import verify
from sparsifiner_edge.runtime.golden import check_golden
from tests.commands import assert_refused, call
from tests.flat import open_session
from tests.seal import reseal
from tests.tiny import make_bundle

IMAGE = {"image": np.full((1, 4, 4, 3), 200, np.uint8)}


def other_file(location: str) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name="c", data_type=onnx.TensorProto.FLOAT, dims=[2], data_location=1)
    tensor.external_data.add(key="location", value=location)
    return tensor


def outside(model: onnx.ModelProto, location: str) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == "w0")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)


def outside_branch(model: onnx.ModelProto, location: str) -> None:
    """Put it in a subgraph of a function body."""
    node = onnx.helper.make_node("If", ["x"], ["z"])
    inner = onnx.GraphProto(name="inner", initializer=[other_file(location)])
    node.attribute.append(onnx.helper.make_attribute("then_branch", inner))
    model.functions[0].node.append(node)


def outside_default(model: onnx.ModelProto, location: str) -> None:
    """Put it in the default of a function's attribute, which a Constant in it refers to."""
    model.functions[0].attribute_proto.append(onnx.helper.make_attribute("v", other_file(location)))


def context(model: onnx.ModelProto, location: str) -> None:
    node = onnx.helper.make_node("EPContext", [], ["unused"], domain="com.microsoft", ep_cache_context=location)
    model.graph.node.append(node)


@pytest.mark.parametrize(
    "change",
    [
        outside,
        outside_branch,
        outside_default,
        context,
        lambda m, x: m.graph.node.append(onnx.helper.make_node("Constant", [], ["unused"], value=other_file(x))),
        lambda m, x: m.training_info.add().algorithm.initializer.append(other_file(x)),
    ],
)
def test_a_model_that_names_other_files_is_refused(
    change: Callable[[Any, str], None], tmp_path: Path, keys: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The files lie in the bundle, listed, or elsewhere."""
    weights = np.ones((8, 8), np.float32).tobytes()
    for number, location in enumerate(("/etc/passwd", "../weights.bin", "weights.bin")):
        bundle = make_bundle(tmp_path / f"bundle{number}", function=True, preprocessing={"size": 4})
        model = onnx.load(bundle / "model.onnx")
        change(model, location)
        (bundle / "model.onnx").write_bytes(model.SerializeToString())
        for folder in (tmp_path, bundle):
            (folder / "weights.bin").write_bytes(weights)
        reseal(bundle)
        with pytest.raises(ArtifactError, match=r"another file|names other files"):
            sign_bundle(bundle, keys / "key.pem")
        with monkeypatch.context() as patch:  # Signed by other means.
            patch.setattr(Bundle, "model", lambda _: None)
            sign_bundle(bundle, keys / "key.pem")
        for options in ({}, {"public_key": keys / "key.pub"}):
            with pytest.raises(ArtifactError, match=r"another file|names other files"):
                open_session(bundle, **options)
    for line in ("run {} --source test", "profile {}", "bundle verify {}", "package {} --for triton -o {}.out"):
        assert_refused(call(capsys, *line.format(bundle, bundle).split()), "model.onnx", "file")


@pytest.mark.parametrize("way", ["renamed", "rewritten"])
def test_a_model_swapped_while_it_is_opened_never_runs(way: str, tmp_path: Path, keys: Path) -> None:
    """A signed bundle is opened repeatedly while its model is swapped."""
    bundle = make_bundle(tmp_path / "bundle", preprocessing={"size": 4})
    sign_bundle(bundle, keys / "key.pem")
    with open_session(bundle) as session:
        wanted = session.infer(IMAGE)["features"]
    model = onnx.load(bundle / "model.onnx")
    weights = next(t for t in model.graph.initializer if t.name == "w0")
    weights.raw_data = bytes(bytearray(weights.raw_data)[::-1])
    stop, path = threading.Event(), bundle / "model.onnx"
    contents = model.SerializeToString(), path.read_bytes()

    def swap() -> None:
        """Swap in another model and back again, as fast as possible."""
        while not stop.is_set():
            for content in contents:
                if way == "renamed":
                    (tmp_path / "scratch").write_bytes(content)
                    (tmp_path / "scratch").replace(path)
                else:
                    with path.open("r+b") as file:
                        file.write(content)
                        file.truncate()

    outcomes = []
    with concurrent.futures.ThreadPoolExecutor() as pool:
        swapping = pool.submit(swap)
        try:
            for _ in range(150):
                with contextlib.suppress(ArtifactError), open_session(bundle, public_key=keys / "key.pub") as session:
                    outcomes.append(np.array_equal(session.infer(IMAGE)["features"], wanted))
        finally:
            stop.set()
        swapping.result()
    assert set(outcomes) == {True}
    assert len(outcomes) < 150


def test_everything_is_read_as_the_manifest_says(tmp_path: Path, keys: Path) -> None:
    """Labels, golden pair and model are changed after the signature was checked, without effect."""
    bundle = make_bundle(tmp_path / "bundle")
    (bundle / "labels.txt").write_text("cat\n")
    reseal(bundle)
    sign_bundle(bundle, keys / "key.pem")
    checked = require_signature(bundle, keys / "key.pub")
    assert checked.labels() == ["cat"]
    with open_session(bundle) as session:
        for name, read in (
            ("labels.txt", checked.labels),
            ("golden.npz", lambda: check_golden(session, checked)),
            ("model.onnx", lambda: checked.read("model.onnx")),
        ):
            kept = (bundle / name).read_bytes()
            (bundle / name).write_bytes(kept + b"x")
            with pytest.raises(ArtifactError, match=f"{name} does not match its SHA-256"):
                read()
            (bundle / name).unlink()
            with pytest.raises(ArtifactError, match=f"{name} is missing"):
                read()
            os.mkfifo(bundle / name)
            with pytest.raises(ArtifactError, match=name):
                read()
            (bundle / name).unlink()
            (bundle / name).write_bytes(kept)
    with pytest.raises(ArtifactError, match=r"has no kernels/sm87\.json"):
        checked.read("kernels/sm87.json")


def test_kernels_that_the_manifest_does_not_list_are_not_the_bundles(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    (bundle / "kernels").mkdir()
    (bundle / "kernels" / "sm87.json").write_text('{"schema_version": 4, "launches": {}, "nodes": {}}')
    assert read_table(open_bundle(bundle), 87) is None
    reseal(bundle)
    assert read_table(open_bundle(bundle), 87) is not None


def test_links_in_a_bundle_lead_nowhere(tmp_path: Path) -> None:
    """A build removes only its own files: links of those names and their targets are left."""
    victim = tmp_path / "victim"
    (victim / "docs").mkdir(parents=True)
    for name in ("a.engine", "docs/thesis.txt", "top.txt"):
        (victim / name).write_text("mine")
    bundle = make_bundle(tmp_path / "bundle")
    (bundle / ".build.x").symlink_to(victim)
    (bundle / "engines").symlink_to(victim)
    with bundle_scratch(bundle) as scratch:
        (scratch / "new").write_text("engine")
        with pytest.raises(ArtifactError, match="outside the bundle"):
            extend_bundle(bundle, {"engines/new.engine": scratch / "new"}, lambda manifest: manifest)
    assert {p.name for p in victim.rglob("*")} == {"a.engine", "docs", "thesis.txt", "top.txt"}


def test_what_nobody_vouches_for_is_not_run(tmp_path: Path, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    sign_bundle(bundle, keys / "key.pem")
    monkeypatch.setattr(verify, "session_on", lambda *_, **__: pytest.fail("it was opened"))
    found = verify.verify_bundle(bundle, public_key=keys / "other.pub")
    assert not found.passed
    assert [check.name for check in found.checks] == ["files", "signature"]
