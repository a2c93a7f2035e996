"""`package` for any target: written whole or not at all, in its own folder, and nothing of others touched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsifiner_edge.artifacts import sha256
from sparsifiner_edge.bundle.store import bundle_hash
from sparsifiner_edge.errors import ArtifactError, ConfigError, SparsifinerError
from sparsifiner_edge.package import TARGETS, package_bundle
from sparsifiner_edge.package.common import read_bundle
from sparsifiner_edge.text import file_name
from tests.commands import assert_refused, call, snapshot
from tests.tiny import make_bundle


def tiny(folder: Path, **manifest: Any) -> Path:
    return make_bundle(folder, preprocessing={"size": 4}, **manifest)


@pytest.mark.parametrize("target", TARGETS)
def test_every_target(target: str, tmp_path: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / target
    outcome = call(capsys, "package", tiny_bundle, "--for", target, "-o", out)
    assert (outcome.code, outcome.err) == (0, "")
    record = json.loads((out / "package.json").read_text())
    assert (record["target"], record["bundle"]) == (target, bundle_hash(tiny_bundle))
    files = {str(path.relative_to(out)): sha256(path) for path in out.rglob("*") if path.is_file()}
    assert record["files"] == {name: digest for name, digest in files.items() if name != "package.json"}
    assert "    " in (out / "README.md").read_text()
    assert [path.name for path in out.parent.iterdir()] == [target]
    printed = json.loads(call(capsys, "package", tiny_bundle, "--for", target, "-o", tmp_path / "b", "--json").out)
    assert set(printed["files"]) == set(record["files"])
    assert printed["remarks"]


RECTANGLE = {
    "deepstream": {
        "config_infer_primary.txt": "infer-dims=3;4;6\n",
        "config_infer_secondary.txt": "infer-dims=3;4;6\n",
        "README.md": "float32 [B,3,4,6]",
    },
    "triton": {"models/b/config.pbtxt": "dims: 4\n  dims: 6\n  dims: 3\n", "README.md": "4 px high and 6 px wide"},
    "gstreamer": {"README.md": "aspect-ratio=3/2 ! videoscale ! video/x-raw,format=RGB,width=6,height=4,"},
}
SQUARE = {
    "deepstream": {"config_infer_primary.txt": "infer-dims=3;4;4\n", "README.md": "takes the centre square of a frame"},
    "triton": {"models/b/config.pbtxt": "dims: 4\n  dims: 4\n  dims: 3\n", "README.md": "4 px square"},
    "gstreamer": {"README.md": "aspect-ratio=1/1 ! videoscale ! video/x-raw,format=RGB,width=4,height=4,"},
}


@pytest.mark.parametrize(("size", "expected"), [((4, 6), RECTANGLE), (4, SQUARE)], ids=["rectangle", "square"])
@pytest.mark.parametrize("target", TARGETS)
def test_sizes_in_configurations(target: str, size: Any, expected: dict[str, dict[str, str]], tmp_path: Path) -> None:
    shape = "centre square" if size == 4 else "centre rectangle"
    bundle = make_bundle(tmp_path / "b", size=size, preprocessing={"size": size, "resize": f"{shape}, bicubic"})
    remarks = package_bundle(bundle, target, tmp_path / "out").remarks
    for name, text in expected[target].items():
        assert text in (tmp_path / "out" / name).read_text(), name
    if target == "deepstream":
        assert any(f"takes the {shape} of a frame" in remark for remark in remarks)
    if target == "triton":
        height, width = (size, size) if size == 4 else size
        assert len((tmp_path / "out" / "models" / "b" / "warmup" / "image").read_bytes()) == height * width * 3


def test_a_package_is_replaced(tmp_path: Path, tiny_bundle: Path) -> None:
    out = tmp_path / "out"
    package_bundle(tiny_bundle, "triton", out)
    package_bundle(tiny_bundle, "gstreamer", out)
    assert not (out / "models").exists()
    assert json.loads((out / "package.json").read_text())["target"] == "gstreamer"


@pytest.mark.parametrize(
    "change",
    [
        lambda out: (out / "mine.txt").write_text("mine"),
        lambda out: (out / "package.json").unlink(),
        lambda out: (out / "package.json").write_text('{"schema_version": 1, "kind": "package"}'),
    ],
)
def test_what_is_not_ours_stays(change: Callable[[Path], object], tmp_path: Path) -> None:
    bundle, out = tiny(tmp_path / "bundle"), tmp_path / "out"
    package_bundle(bundle, "triton", out)
    change(out)
    before = snapshot(tmp_path)
    with pytest.raises(ArtifactError, match=r"(not|of) ours"):
        package_bundle(bundle, "triton", out)
    assert snapshot(tmp_path) == before


def test_a_package_around_its_own_bundle_stays(tmp_path: Path) -> None:
    """The bundle in a package for GStreamer, packaged into that very place."""
    out = tmp_path / "out"
    package_bundle(tiny(tmp_path / "bundle"), "gstreamer", out)
    (tmp_path / "link").symlink_to(out)
    before = snapshot(tmp_path)
    for bundle in (out / "bundle", tmp_path / "link" / "bundle"):
        with pytest.raises(ArtifactError, match="or the bundle in it"):
            package_bundle(bundle, "triton", out)
    assert snapshot(tmp_path) == before


def test_neither_a_bundle_nor_a_place_in_it_is_replaced(tmp_path: Path) -> None:
    bundle, other = tiny(tmp_path / "bundle"), tiny(tmp_path / "other")
    before = snapshot(tmp_path)
    for output, said in ((bundle, "is in the bundle"), (bundle / "in", "is in the bundle"), (other, "not a package")):
        with pytest.raises(ArtifactError, match=said):
            package_bundle(bundle, "triton", output)
    assert snapshot(tmp_path) == before


def test_links_in_a_circle(tmp_path: Path) -> None:
    bundle, loop = tiny(tmp_path / "bundle"), tmp_path / "loop"
    loop.symlink_to(loop)
    for output in (loop, loop / "out"):
        with pytest.raises(ArtifactError):
            package_bundle(bundle, "triton", output)


@pytest.mark.parametrize("target", TARGETS)
def test_a_failure_leaves_nothing(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, out = tiny(tmp_path / "bundle"), tmp_path / "out"
    before = snapshot(tmp_path)

    def fail(*_: object) -> str:
        raise ConfigError("no", "sorry")

    monkeypatch.setattr(f"{TARGETS[target]}._readme", fail)
    with pytest.raises(ConfigError, match="no"):
        package_bundle(bundle, target, out)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("vit_small_patch14_dinov2.lvd142m", "vit_small_patch14_dinov2.lvd142m"),
        ("../../etc/cron.d/x", "etc_cron.d_x"),
        ("..", "model"),
        ("", "model"),
        ("a b\n]\"'", "a_b____"),
        ("x" * 300, "x" * 100),
    ],
)
def test_names_stay_in_their_folder(name: str, safe: str, tmp_path: Path) -> None:
    assert file_name(name) == safe
    out = tmp_path / "out"
    package_bundle(tiny(tmp_path / "bundle", name=name), "triton", out)
    assert [path.name for path in (out / "models").iterdir()] == [safe]
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "out"}


@pytest.mark.parametrize("name", ["../bundle/model.onnx", "{bundle}/model.onnx", "x/../../bundle/model.onnx"])
@pytest.mark.parametrize("target", TARGETS)
def test_names_of_files_stay_in_their_folder(target: str, name: str, tmp_path: Path) -> None:
    """Names that lead back into the bundle would lead out of the package."""
    bundle = tiny(tmp_path / "bundle")
    (bundle / "x").mkdir()
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"][name.format(bundle=bundle)] = manifest["files"]["model.onnx"]
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    before = snapshot(tmp_path)
    with pytest.raises(ArtifactError, match="names the file"):
        package_bundle(bundle, target, tmp_path / "out")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        ({"preprocessing": {"size": 8}}, "does not take one image"),
        ({"preprocessing": {"size": [4, 6]}}, "does not take one image `image` uint8 [B,4,6,3]"),
        ({"inputs": []}, "does not take one image"),
        ({"inputs": [{"name": "image", "dtype": "uint8", "shape": []}]}, "does not take one image"),
        ({"inputs": ["image"]}, 'inputs[0] is "image", not dict'),
        (
            {"outputs": [{"name": "features", "dtype": "float32", "shape": [1, {}]}]},
            "outputs[0].shape[1] is {}",
        ),
        ({"preprocessing": {}}, "preprocessing.size"),
        *(
            ({"outputs": [{"name": name, "dtype": "float32", "shape": [1, 8]}]}, "outputs holds the name")
            for name in ("features\ncustom-lib-path=/tmp/evil.so", "features;logits", "", "a b", "\N{SNOWMAN}", "\x1b")
        ),
        ({"outputs": [{"name": "logits", "dtype": "float32", "shape": [1, 8]}] * 2}, "the name 'logits', or twice"),
    ],
)
def test_manifests_that_say_too_little(manifest: dict[str, Any], said: str, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", **{"preprocessing": {"size": 4}, **manifest})
    with pytest.raises(SparsifinerError) as caught:
        read_bundle(bundle)
    assert said in caught.value.what
    assert caught.value.fix


def test_wrong_usage(tmp_path: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    run = ["package", tiny_bundle, "-o", out]
    assert "Invalid value for '--for'" in call(capsys, *run, "--for", "vhs").err
    assert_refused(call(capsys, *run, "--for", "triton", "--batch", 4), "has a fixed batch of 1")
    assert_refused(call(capsys, *run, "--for", "gstreamer", "--batch", 1), "cannot be combined with --for gstreamer")
    assert_refused(
        call(capsys, *run, "--for", "deepstream", "--kernels", "portable"),
        "--for deepstream",
    )
    assert_refused(call(capsys, "package", tmp_path, "--for", "triton", "-o", out), "does not exist")
    for options, said in (({"target": "vhs"}, "target is 'vhs'"), ({"target": "triton", "kernels": "x"}, "kernels is")):
        with pytest.raises(ConfigError, match=said):
            package_bundle(tiny_bundle, output=out, **options)
    assert not out.exists()


def test_a_fixed_batch_above_one(tmp_path: Path) -> None:
    bundle = tiny(tmp_path / "b", batch=3)
    for target in ("gstreamer", "deepstream"):
        with pytest.raises(ConfigError, match="takes batches of 3"):
            package_bundle(bundle, target, tmp_path / "out")
