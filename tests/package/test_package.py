"""Tests of `package` and `bundle verify`.

A package is complete or absent, foreign files are untouched, and Triton and DeepStream accept it. Verification passes,
fails each check alone, and returns exit codes.
"""

from __future__ import annotations

import configparser
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from google.protobuf import text_format  # type: ignore[import-untyped,unused-ignore]

from sparsifiner_edge.bundle.store import bundle_hash
from sparsifiner_edge.errors import ArtifactError, ConfigError, SparsifinerError
from sparsifiner_edge.ops import native
from sparsifiner_edge.ops.schema import VERSION
from sparsifiner_edge.package import package_bundle
from sparsifiner_edge.text import file_name
from tests.commands import assert_refused, call, snapshot
from tests.flat import verify_bundle
from tests.seal import reseal, seal_bundle
from tests.tiny import make_bundle

TARGETS = ("deepstream", "triton", "gstreamer")
REAL = Path(sys.prefix) / "tritonclient" / "tritonclient" / "grpc" / "model_config_pb2.py"
"""Triton's own definition of a configuration; made by `make test` (target .dev)."""


@pytest.mark.parametrize("target", TARGETS)
def test_every_target(target: str, tmp_path: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / target
    outcome = call(capsys, "package", tiny_bundle, "--for", target, "-o", out)
    assert (outcome.code, outcome.err) == (0, "")
    assert "    " in (out / "README.md").read_text()
    assert [path.name for path in out.parent.iterdir()] == [target]
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    printed = json.loads(call(capsys, "package", tiny_bundle, "--for", target, "-o", tmp_path / "b", "--json").out)
    assert set(printed["files"]) == files
    # Existing files stay.
    before = snapshot(tmp_path)
    assert_refused(call(capsys, "package", tiny_bundle, "--for", target, "-o", out), "exists; it is left untouched")
    assert snapshot(tmp_path) == before


def test_sizes_in_configurations(tmp_path: Path) -> None:
    """The fit of frames is there too."""
    bundle = make_bundle(tmp_path / "b", size=(4, 6), preprocessing={"size": (4, 6)})
    wide = make_bundle(tmp_path / "c", size=(4, 6), preprocessing={"size": (4, 6), "fit": "stretch"})
    for place, target, file, text in (
        (bundle, "deepstream", "config_infer.txt", "infer-dims=3;4;6\n"),
        (bundle, "triton", "models/b/config.pbtxt", "dims: [4, 6, 3]\n"),
        (bundle, "gstreamer", "README.md", "aspect-ratio=3/2 ! videoscale add-borders=false ! "),
        (bundle, "deepstream", "config_infer.txt", "maintain-aspect-ratio=1\n"),
        (bundle, "deepstream", "README.md", "takes a frame: centre rectangle, bicubic to 4x6 px"),
        (wide, "deepstream", "config_infer.txt", "maintain-aspect-ratio=0\n"),
        (wide, "triton", "README.md", "whole, stretched, bicubic to 4x6 px"),
        (wide, "gstreamer", "README.md", "videoconvert ! videoscale add-borders=false ! "),
    ):
        packaged = tmp_path / f"{place.name}-{target}"
        if not packaged.exists():
            package_bundle(place, target, packaged)
        assert text in (packaged / file).read_text()


def test_places_that_are_refused(tmp_path: Path) -> None:
    bundle, loop = make_bundle(tmp_path / "bundle", preprocessing={"size": 4}), tmp_path / "loop"
    loop.symlink_to(loop)
    (tmp_path / "link").symlink_to(bundle)
    before = snapshot(tmp_path)
    for output in (bundle, bundle / "in", tmp_path / "link" / "in", tmp_path / "link", loop, loop / "out"):
        with pytest.raises(ArtifactError):
            package_bundle(bundle, "triton", output)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("vit_small_patch14_dinov2.lvd142m", "vit_small_patch14_dinov2.lvd142m"),
        ("../../etc/cron.d/x", "etc_cron.d_x"),
        ("..", "model"),
        ("a b\n]\"'", "a_b____"),
    ],
)
def test_names_stay_in_their_folder(name: str, safe: str, tmp_path: Path) -> None:
    assert file_name(name) == safe
    bundle = make_bundle(tmp_path / "bundle", preprocessing={"size": 4}, name=name)
    package_bundle(bundle, "triton", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out" / "models").iterdir()] == [safe]
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "out"}


OUTPUT = {"name": "features", "dtype": "float32", "shape": [1, 8]}
NAMES = ("features\ncustom-lib-path=/tmp/evil.so", "features;logits", "", "a b", "\N{SNOWMAN}", "\x1b")


@pytest.mark.parametrize(
    ("targets", "options", "said"),
    [
        (TARGETS, {"preprocessing": {"size": [4, 6]}}, "does not take one image `image` uint8 [B,4,6,3]"),
        (TARGETS, {"preprocessing": {}}, "preprocessing.size"),
        (TARGETS, {"inputs": []}, "does not take one image"),
        (TARGETS, {"outputs": []}, "outputs are named []"),
        (TARGETS, {"outputs": [OUTPUT, OUTPUT]}, "outputs are named"),
        *((TARGETS, {"outputs": [OUTPUT | {"name": name}]}, "outputs are named") for name in NAMES),
        (("abacus",), {}, "target is 'abacus'"),
        (("deepstream", "gstreamer"), {"batch": 4}, "takes batches of 4; frames come one by one"),
        (("deepstream",), {"precision": "int8"}, "its own calibration table"),
        (("deepstream",), {"outputs": [OUTPUT | {"name": "other"}]}, "other outputs than its manifest says"),
        (("triton",), {"outputs": [OUTPUT | {"dtype": "complex64"}]}, "complex64"),
    ],
)
def test_what_does_not_fit_a_target(targets: Any, options: dict[str, Any], said: str, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", **{"preprocessing": {"size": 4}} | options)
    for target in targets:
        with pytest.raises(SparsifinerError) as caught:
            package_bundle(bundle, target, tmp_path / "out")
        assert said in caught.value.what
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", TARGETS)
def test_what_computes_every_frame_from_nothing_takes_no_stream(
    target: str, stream_bundle: Path, tmp_path: Path
) -> None:
    if target == "gstreamer":
        assert "README.md" in package_bundle(stream_bundle, target, tmp_path / "out").files
        return
    with pytest.raises(ConfigError, match=f"{target} does not support streaming inference"):
        package_bundle(stream_bundle, target, tmp_path / "out")


# Triton


def read_config(text: str) -> Any:
    """Parse the message by Triton's own definition: an unknown key or a value of another type fails."""
    if not REAL.exists():
        pytest.skip(f"{REAL} is made by `make test`")
    return text_format.Parse(text, runpy.run_path(str(REAL))["ModelConfig"]())


@pytest.mark.parametrize("name", ["tiny_bundle", "dynamic_bundle"])
def test_what_triton_reads(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Each field by Triton's own definition; library and model in ONNX Runtime, as the server loads them."""
    bundle: Path = request.getfixturevalue(name)
    package_bundle(bundle, "triton", tmp_path / "out")
    folder = tmp_path / "out" / "models" / "test_vit"
    config = read_config((folder / "config.pbtxt").read_text())
    fixed = name == "tiny_bundle"
    assert (config.name, config.backend, config.max_batch_size) == ("test_vit", "onnxruntime", 0 if fixed else 8)
    assert config.HasField("dynamic_batching") is not fixed
    assert list(config.input[0].dims) == [1, 160, 160, 3][0 if fixed else 1 :]
    outputs = {output.name: output.label_filename for output in config.output}
    assert outputs.get("logits", "labels.txt") == "labels.txt"
    assert (folder / "labels.txt").exists() is fixed
    options = onnxruntime.SessionOptions()
    libraries = list(config.model_operations.op_library_filename)
    assert len(libraries) == (native.library_path() is not None)
    for library in libraries:
        options.register_custom_ops_library(str(folder / library.removeprefix("/models/test_vit/")))
    session = onnxruntime.InferenceSession(str(folder / "1" / config.default_model_filename), options)
    assert {output.name for output in session.get_outputs()} == set(outputs)
    with np.load(bundle / "golden.npz") as golden:
        found = session.run(["features"], {config.input[0].name: golden["input.image"]})[0]
        assert np.abs(found - golden["output.features"]).max() < 1e-3 * np.ptp(golden["output.features"])


# DeepStream

KEYS = {
    "gpu-id",
    "gie-unique-id",
    "process-mode",
    "batch-size",
    "onnx-file",
    "model-engine-file",
    "network-mode",
    "infer-dims",
    "network-input-order",
    "model-color-format",
    "net-scale-factor",
    "maintain-aspect-ratio",
    "symmetric-padding",
    "scaling-filter",
    "output-blob-names",
    "network-type",
    "classifier-type",
    "classifier-threshold",
    "labelfile-path",
    "output-tensor-meta",
    "interval",
    "num-detected-classes",
    "segmentation-threshold",
}
"""Keys of Gst-nvinfer, as documented for DeepStream 6.4 to 9."""


def nvinfer(folder: Path) -> dict[str, str]:
    parser = configparser.ConfigParser(strict=True, delimiters=("=",))
    parser.read_string((folder / "config_infer.txt").read_text())
    assert parser.sections() == ["property"]
    assert set(parser["property"]) <= KEYS
    return dict(parser["property"])


@pytest.mark.parametrize("name", ["tiny_bundle", "dynamic_bundle"])
def test_what_deepstream_gets(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    bundle: Path = request.getfixturevalue(name)
    package_bundle(bundle, "deepstream", tmp_path / "out")
    found = nvinfer(tmp_path / "out")
    classifier = name == "tiny_bundle"
    assert found["output-blob-names"] == ("probabilities" if classifier else "features;tokens;token_positions")
    assert (found["network-type"], found["infer-dims"]) == ("1" if classifier else "100", "3;160;160")
    assert (tmp_path / "out" / found["onnx-file"]).is_file()
    labels = "".join(f";class_{i}" for i in range(10))[1:] + "\n"
    assert not classifier or (tmp_path / "out" / found["labelfile-path"]).read_text() == labels
    model = onnx.load(tmp_path / "out" / "model.onnx")
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    with np.load(bundle / "golden.npz") as golden:
        planes = np.ascontiguousarray(golden["input.image"].transpose(0, 3, 1, 2), dtype=np.float32)
        answer = session.run(None, {"image": planes})[0]
        expected = golden["output.logits" if classifier else "output.features"].astype(np.float64)
    if classifier:
        expected = np.exp(expected) / np.exp(expected).sum(-1, keepdims=True)
    assert np.abs(answer - expected).max() < 1e-3 * max(1.0, float(np.ptp(expected)))


def make_map_bundle(folder: Path, name: str, shape: str, pixels: str) -> Path:
    """Write a bundle of 8 x 12 px whose only output is the brightness of 4 x 4 px squares, from 0 to 1."""
    folder.mkdir()
    inner = "small" if name == "map" else "map"
    model = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": 20]>
        brightness (uint8[1,8,12,3] image) => (float[{shape}] {name})
        <int64[1] channels = {{3}}, float most = {{{pixels}}}, int64[{shape.count(",") + 1}] whole = {{{shape}}}> {{
            bright = Cast <to = 1> (image)
            grey = ReduceMean <keepdims = 0> (bright, channels)
            one = Unsqueeze (grey, first)
            share = Div (one, most)
            {inner} = AveragePool <kernel_shape = [4, 4], strides = [4, 4]> (share)
            {name} = Reshape ({inner}, whole)
        }}""")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "first"))
    onnx.save(model, folder / "model.onnx")
    image = np.random.default_rng(0).integers(0, 256, (1, 8, 12, 3), dtype=np.uint8)
    (values,) = onnxruntime.InferenceSession(str(folder / "model.onnx")).run(None, {"image": image})
    np.savez(folder / "golden.npz", **{"input.image": image, f"output.{name}": values})
    seal_bundle(
        folder,
        {
            "name": "brightness",
            "precision": "fp32",
            "preprocessing": {"size": [8, 12]},
            "tolerances": {name: 1e-5},
            "inputs": [{"name": "image", "dtype": "uint8", "shape": [1, 8, 12, 3]}],
            "outputs": [{"name": name, "dtype": "float32", "shape": [*values.shape]}],
        },
    )
    return folder


@pytest.mark.parametrize(("name", "shape"), [("mask", "1,2,3"), ("map", "1,1,2,3")])
def test_a_map_is_a_segmentation(name: str, shape: str, tmp_path: Path) -> None:
    """The map is as large as the image, as Gst-nvinfer expects; one that is no probability is raw."""
    bundle = make_map_bundle(tmp_path / "bundle", name, shape, "255")
    package_bundle(bundle, "deepstream", tmp_path / "out")
    expected = {"network-type": "2", "output-blob-names": "map", "output-tensor-meta": "1", "network-mode": "0"}
    expected |= {"num-detected-classes": "1", "segmentation-threshold": "0.5"}
    assert expected.items() <= nvinfer(tmp_path / "out").items()
    model = onnx.load(tmp_path / "out" / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    with np.load(bundle / "golden.npz") as golden:
        planes = np.ascontiguousarray(golden["input.image"].transpose(0, 3, 1, 2), dtype=np.float32)
        (answer,) = onnxruntime.InferenceSession(model.SerializeToString()).run(["map"], {"image": planes})
        wanted = golden[f"output.{name}"].reshape(2, 3)
    assert answer.shape == (1, 1, 8, 12)
    assert answer[0, 0].reshape(2, 4, 3, 4).mean(axis=(1, 3)) == pytest.approx(wanted, abs=0.1)
    depth = make_map_bundle(tmp_path / "depth", name, shape, "2")
    package_bundle(
        reseal(depth, intended={"backend": "tensorrt", "compute_precision": "fp16"}), "deepstream", tmp_path / "raw"
    )
    expected = {"network-type": "100", "output-blob-names": name, "network-mode": "2"}
    expected |= {"model-engine-file": "model.onnx_b1_gpu0_fp16.engine"}
    assert expected.items() <= nvinfer(tmp_path / "raw").items()


def test_the_probe_reads_what_pyds_gives(tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Names as in the pyds bindings; its lists end with StopIteration."""
    values, it = np.array([[[0.9, 0.1], [0.2, 0.8]]], np.float32), SimpleNamespace

    class Entry(SimpleNamespace):
        @property
        def next(self) -> Any:
            raise StopIteration

    layer = it(dataType=0, layerName="map", inferDims=it(d=[1, 2, 2, 0], numDims=3), buffer=values.ctypes.data)
    meta = it(base_meta=it(meta_type=12), user_meta_data=it(num_output_layers=1), cast=lambda data: data)
    frame = it(frame_num=7, frame_user_meta_list=Entry(data=meta))
    pyds = it(
        NvDsFrameMeta=meta,
        NvDsUserMeta=meta,
        NvDsInferTensorMeta=meta,
        get_ptr=meta.cast,
        NvDsMetaType=it(NVDSINFER_TENSOR_OUTPUT_META=12),
        NvDsInferDataType=it(FLOAT=0),
        get_nvds_LayerInfo=lambda _tensors, _number: layer,
        gst_buffer_get_nvds_batch_meta=lambda _address: it(frame_meta_list=Entry(data=frame)),
    )
    repository = it(Gst=it(PadProbeReturn=it(OK=1)))
    for name, module in {"pyds": pyds, "gi": it(require_version=print), "gi.repository": repository}.items():
        monkeypatch.setitem(sys.modules, name, module)
    package_bundle(make_bundle(tmp_path / "bundle", preprocessing={"size": 4}), "deepstream", tmp_path / "out")
    probe = runpy.run_path(str(tmp_path / "out" / "probe.py"))
    assert probe["print_outputs"](None, it(get_buffer=object)) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "7 map (1, 2, 2) 50.0% above one half"
    pipelines = {("filesrc", "location=a b"): it(get_by_name=lambda _name: None)}
    repository.Gst.init, repository.Gst.parse_launchv = print, lambda words: pipelines[tuple(words)]
    monkeypatch.setattr(sys, "argv", ["probe.py", "filesrc", "location=a b"])
    with pytest.raises(SystemExit, match="No element is named model"):
        runpy.run_path(str(tmp_path / "out" / "probe.py"), run_name="__main__")


def test_labels(tiny_bundle: Path, altered: Callable[..., Path], tmp_path: Path) -> None:
    """One line of labels; numbers if there are none."""
    folder = altered(tiny_bundle)
    (folder / "labels.txt").write_text("".join(f"{name}\n" for name in ["a;b", "", "é", *"defghij"]))
    package_bundle(reseal(folder), "deepstream", tmp_path / "out")
    assert (tmp_path / "out" / "labels.txt").read_text() == "a,b;-;é;d;e;f;g;h;i;j\n"
    (folder / "labels.txt").write_text("cat\ndog\n")
    with pytest.raises(ConfigError, match="has 2 labels for 10 classes"):
        package_bundle(reseal(folder), "deepstream", tmp_path / "other")
    (folder / "labels.txt").unlink()
    package_bundle(reseal(folder), "deepstream", tmp_path / "none")
    assert (tmp_path / "none" / nvinfer(tmp_path / "none")["labelfile-path"]).read_text().startswith("class_0;class_1;")


# `bundle verify`

CHECKS = ["files", "signature", "model", "inputs, outputs", "operators", "engines", "golden pair"]


def failed(folder: Path) -> dict[str, str]:
    result = verify_bundle(folder)
    found = {check.name: check.details for check in result.checks if not check.passed}
    assert result.passed is (not found)
    names = [check.name for check in result.checks]
    # A file that is not valid ONNX is not examined further.
    assert names == (CHECKS[:3] if "model" in found else CHECKS)
    return found


def test_real_bundles_pass(tiny_bundle: Path, dynamic_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert failed(dynamic_bundle) == {}
    outcome = call(capsys, "bundle", "verify", tiny_bundle)
    assert (outcome.code, outcome.err) == (0, "")
    assert all(f" {name} " in outcome.out for name in CHECKS)
    result = json.loads(call(capsys, "bundle", "verify", tiny_bundle, "--kernels", "portable", "--json").out)
    assert (result["passed"], result["hash"]) == (True, bundle_hash(tiny_bundle))
    assert "logits" in result["checks"][-1]["details"]


def other_operator_version(model: Any) -> None:
    next(entry for entry in model.opset_import if entry.domain == "sparsifiner").version = VERSION + 1


@pytest.mark.parametrize(
    ("change", "check", "said"),
    [
        (other_operator_version, "operators", f"of version [{VERSION + 1}]"),
        (lambda m: m.opset_import.add(domain="com.example", version=1), "model", "foreign domains: com.example"),
        ({"ops": []}, "operators", "the manifest says []"),
        ({"outputs": []}, "inputs, outputs", "outputs: manifest and model differ in logits float32 [1, 10]"),
        ({"inputs": []}, "inputs, outputs", "inputs: manifest and model differ in image uint8 [1, 160, 160, 3]"),
        ("in another order", "inputs, outputs", "their order"),
    ],
)
def test_manifest_and_model_differ(
    change: Any, check: str, said: str, tiny_bundle: Path, altered: Callable[..., Path]
) -> None:
    if isinstance(change, str):
        change = {"outputs": json.loads((tiny_bundle / "manifest.json").read_text())["outputs"][::-1]}
    found = failed(altered(tiny_bundle, **change) if isinstance(change, dict) else altered(tiny_bundle, change))
    assert list(found) == [check]
    assert said in found[check]


def test_other_weights_fail_golden(
    tiny_bundle: Path, altered: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def change(model: Any) -> None:
        tensor = next(t for t in model.graph.initializer if t.name == "model.patch_embed.proj.weight")
        tensor.raw_data = (np.frombuffer(tensor.raw_data, np.float32) * np.float32(1.2)).tobytes()

    folder = altered(tiny_bundle, change)
    outcome = call(capsys, "bundle", "verify", folder)
    assert outcome.code == 1
    assert "[0, " in outcome.out  # Text in brackets is not markup.
    assert outcome.err.startswith("error: 1 of 7 checks failed.\n  Do not use")
    assert "differs from golden by" in " ".join(outcome.out.replace("│", "").split())
    outcome = call(capsys, "bundle", "verify", folder, "--json")
    assert (outcome.code, json.loads(outcome.out)["passed"]) == (1, False)
    (folder / "notes.txt").write_text("mine")
    assert failed(folder)["files"] == "not in the manifest: notes.txt"


def test_unusable_bundles_are_no_failed_checks(
    tiny_bundle: Path, altered: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(call(capsys, "bundle", "verify", tmp_path / "none"), "does not exist")
    assert_refused(call(capsys, "bundle", "verify", tiny_bundle, "--backend", "abacus"), "Unknown backend")
    folder = altered(tiny_bundle)
    with pytest.raises(ArtifactError, match=r"ops\[0\] is 1, not str"):
        verify_bundle(reseal(folder, ops=[1]))
    (folder / "model.onnx").write_bytes(b"\xff" * 100)
    reseal(folder, ops=[])
    assert_refused(call(capsys, "bundle", "verify", folder), "is not an ONNX file")
    assert_refused(call(capsys, "package", folder, "--for", "deepstream", "-o", tmp_path / "out"))
