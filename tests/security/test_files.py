"""What a signature covers is what runs: no file beside the model's, no file put in another's place."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from sparsifiner_edge.bundle.golden import check_golden
from sparsifiner_edge.bundle.sign import require_signature, sign_bundle
from sparsifiner_edge.bundle.store import Bundle, open_bundle
from sparsifiner_edge.errors import ArtifactError
from sparsifiner_edge.runtime import open_session
from tests.commands import assert_refused, process
from tests.package.reseal import reseal
from tests.tiny import make_bundle

IMAGE = {"image": np.full((1, 4, 4, 3), 200, np.uint8)}


def outside(model: onnx.ModelProto, location: str) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == "w0")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)


def outside_constant(model: onnx.ModelProto, location: str) -> None:
    tensor = onnx.TensorProto(name="c", data_type=onnx.TensorProto.FLOAT, dims=[2], data_location=1)
    tensor.external_data.add(key="location", value=location)
    model.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["unused"], value=tensor))


def outside_branch(model: onnx.ModelProto, location: str) -> None:
    """In a subgraph of a function's body."""
    inner = onnx.GraphProto(name="inner")
    inner.initializer.add(name="c", data_type=onnx.TensorProto.FLOAT, dims=[2], data_location=1).external_data.add(
        key="location", value=location
    )
    node = onnx.helper.make_node("If", ["x"], ["z"])
    node.attribute.append(onnx.helper.make_attribute("then_branch", inner))
    model.functions[0].node.append(node)


def outside_default(model: onnx.ModelProto, location: str) -> None:
    """In the default of a function's attribute, which a Constant in it refers to."""
    tensor = onnx.TensorProto(name="c", data_type=onnx.TensorProto.FLOAT, dims=[2], data_location=1)
    tensor.external_data.add(key="location", value=location)
    model.functions[0].attribute_proto.append(onnx.helper.make_attribute("v", tensor))


def outside_training(model: onnx.ModelProto, location: str) -> None:
    tensor = model.training_info.add().algorithm.initializer.add(name="c", data_type=1, dims=[2], data_location=1)
    tensor.external_data.add(key="location", value=location)


def context(model: onnx.ModelProto, location: str) -> None:
    node = onnx.helper.make_node("EPContext", [], ["unused"], domain="com.microsoft", ep_cache_context=location)
    model.graph.node.append(node)


@pytest.mark.parametrize("location", ["/etc/passwd", "../weights.bin", "weights.bin"])
@pytest.mark.parametrize(
    "change", [outside, outside_constant, outside_branch, outside_default, outside_training, context]
)
@pytest.mark.parametrize("listed", [True, False])
def test_a_model_that_names_other_files_is_refused(
    listed: bool, change: Callable[[Any, str], None], location: str, tmp_path: Path, keys: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    bundle = make_bundle(tmp_path / "bundle", function=True, preprocessing={"size": 4})
    model = onnx.load(bundle / "model.onnx")
    change(model, location)
    (bundle / "model.onnx").write_bytes(model.SerializeToString())
    weights = np.ones((8, 8), np.float32).tobytes()
    (tmp_path / "weights.bin").write_bytes(weights)
    if listed:
        (bundle / "weights.bin").write_bytes(weights)
    reseal(bundle)
    with pytest.raises(ArtifactError, match=r"another file|names other files"):
        sign_bundle(bundle, keys / "key.pem")
    with monkeypatch.context() as patch:  # As one who signs by other means.
        patch.setattr(Bundle, "model", lambda _: None)
        sign_bundle(bundle, keys / "key.pem")
    for options in ({}, {"public_key": keys / "key.pub"}):
        with pytest.raises(ArtifactError, match=r"another file|names other files"):
            open_session(bundle, **options)
    if (change, listed, location) == (outside, True, "weights.bin"):
        image = tmp_path / "image.png"
        image.write_bytes(b"")
        for line in (["run", bundle, "--source", "test", "--frames", "1"], ["profile", bundle, "--seconds", ".1"],
                     ["build", bundle], ["package", bundle, "--for", "triton", "-o", tmp_path / "out"]):  # fmt: skip
            assert_refused(process(*line), "weights.bin")


class Swapper:
    """Puts another model in a bundle's place and back again, as fast as it can."""

    def __init__(self, bundle: Path, other: bytes, way: str) -> None:
        self._path, self._contents, self._way = (
            bundle / "model.onnx",
            [other, (bundle / "model.onnx").read_bytes()],
            way,
        )
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        scratch = self._path.parent.parent / "scratch"
        while not self._stop.is_set():
            for content in self._contents:
                if self._way == "renamed":
                    scratch.write_bytes(content)
                    scratch.replace(self._path)
                else:
                    with self._path.open("r+b") as file:
                        file.write(content)
                        file.truncate()

    def __enter__(self) -> Swapper:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


@pytest.mark.parametrize("way", ["renamed", "rewritten"])
def test_a_model_swapped_while_it_is_opened_never_runs(way: str, tmp_path: Path, keys: Path) -> None:
    found = swapped_while_opened(tmp_path, keys, way, tries=150)
    assert found["altered"] == 0
    assert found["opened"] > 0
    assert found["refused"] > 0


def swapped_while_opened(folder: Path, keys: Path, way: str, tries: int) -> dict[str, int]:
    """Open a signed bundle, again and again, while its model is swapped: which model answered."""
    bundle = make_bundle(folder / way / "bundle", preprocessing={"size": 4})
    sign_bundle(bundle, keys / "key.pem")
    with open_session(bundle) as session:
        wanted = session.infer(IMAGE)["features"]
    model = onnx.load(bundle / "model.onnx")
    weights = next(t for t in model.graph.initializer if t.name == "w0")
    weights.raw_data = bytes(bytearray(weights.raw_data)[::-1])
    found = {"opened": 0, "refused": 0, "altered": 0}
    with Swapper(bundle, model.SerializeToString(), way):
        for _ in range(tries):
            try:
                with open_session(bundle, public_key=keys / "key.pub") as session:
                    same = bool(np.array_equal(session.infer(IMAGE)["features"], wanted))
                found["opened" if same else "altered"] += 1
            except ArtifactError:
                found["refused"] += 1
    return found


def test_everything_is_read_as_the_manifest_says(tmp_path: Path, keys: Path) -> None:
    """Labels, golden pair and model changed after the signature was checked reach nobody."""
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


def test_a_bundle_stays_what_was_checked(tmp_path: Path) -> None:
    """Its folder may hold another whole bundle later: the value that was checked reads nothing of it."""
    folder = make_bundle(tmp_path / "bundle", name="m")
    (folder / "labels.txt").write_text("cat\n")
    reseal(folder)
    checked = open_bundle(folder)
    (folder / "labels.txt").write_text("dog\n")
    reseal(folder)
    assert open_bundle(folder).labels() == ["dog"]
    for read in (checked.labels, checked.sealed_copy("labels.txt").__enter__):
        with pytest.raises(ArtifactError, match=r"labels\.txt does not match its SHA-256"):
            read()
    with checked.sealed_copy("model.onnx") as copy:
        assert Path(copy).read_bytes() == (folder / "model.onnx").read_bytes()
        with pytest.raises(PermissionError):
            Path(copy).write_bytes(b"")
    assert checked.required(checked.manifest.name, "name") == "m"
    with pytest.raises(ArtifactError, match="bundle: tokens is missing"):
        checked.required(checked.manifest.tokens, "tokens")


def test_kernels_that_the_manifest_does_not_list_are_not_the_bundles(tmp_path: Path) -> None:
    from sparsifiner_edge.bundle.kernels import read_table

    bundle = make_bundle(tmp_path / "bundle")
    (bundle / "kernels").mkdir()
    (bundle / "kernels" / "sm87.json").write_text('{"schema_version": 1, "launches": {}, "nodes": {}}')
    assert read_table(open_bundle(bundle), 87) is None
    reseal(bundle)
    assert read_table(open_bundle(bundle), 87) is not None


def test_labels_are_shown_harmless(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    (bundle / "labels.txt").write_bytes("cat\x1b[31m\n\u202edog\nu\u2028v\n\u732b\n".encode())
    reseal(bundle)
    assert open_bundle(bundle).labels() == ["cat\\x1b[31m", "\\u202edog", "u\\u2028v", "\u732b"]
    shutil.rmtree(bundle)


def test_links_in_a_bundle_lead_nowhere(tmp_path: Path) -> None:
    """What a build cleans up is its own: links of those names are left, and what they lead to."""
    from sparsifiner_edge.bundle.store import bundle_scratch, extend_bundle

    victim = tmp_path / "victim"
    (victim / "docs").mkdir(parents=True)
    for name in ("a.engine", "docs/thesis.txt", "top.txt"):
        (victim / name).write_text("mine")
    bundle = make_bundle(tmp_path / "bundle")
    (bundle / ".build.x").symlink_to(victim)
    (bundle / "engines").symlink_to(victim)
    with bundle_scratch(bundle) as scratch:
        (scratch / "new").write_text("engine")
        with pytest.raises(ArtifactError, match="outside itself"):
            extend_bundle(bundle, {"engines/new.engine": scratch / "new"}, lambda manifest: manifest)
    assert {p.name for p in victim.rglob("*")} == {"a.engine", "docs", "thesis.txt", "top.txt"}


def test_what_nobody_vouches_for_is_not_run(tmp_path: Path, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsifiner_edge.runtime import verify

    bundle = make_bundle(tmp_path / "bundle")
    sign_bundle(bundle, keys / "key.pem")
    monkeypatch.setattr(verify, "open_checked", lambda *_, **__: pytest.fail("it was opened"))
    found = verify.verify_bundle(bundle, public_key=keys / "other.pub")
    assert not found.passed
    assert [check.name for check in found.checks] == ["files", "signature"]


@pytest.mark.parametrize(
    "nodes",
    [
        5,
        {"n": 5},
        {"n": [5]},
        {"n": [{"launch": "l"}]},
        {"n": [{"launch": "l", "name": "n", "inputs": [1], "outputs": []}]},
    ],
)
def test_a_table_of_kernels_that_is_none(nodes: Any, tmp_path: Path) -> None:
    from sparsifiner_edge.bundle.kernels import read_table

    bundle = make_bundle(tmp_path / "bundle")
    (bundle / "kernels").mkdir()
    launch = {"symbol": "s", "grid": [1, 1], "threads": 1, "shared": 0, "inputs": [], "outputs": [], "tensors": {}}
    for launches in ({"l": launch}, {"l": launch | {"grid": [1]}}, {"l": launch | {"inputs": ["x"]}}, {"l": 3}, []):
        table = {"schema_version": 1, "launches": launches, "nodes": nodes}
        (bundle / "kernels" / "sm87.json").write_text(json.dumps(table))
        reseal(bundle)
        with pytest.raises(ArtifactError):
            read_table(open_bundle(bundle), 87)
