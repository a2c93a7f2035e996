"""DeepStream: the float model against golden, and configurations that hold documented keys alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from sparsifiner_edge.errors import ArtifactError, ConfigError, GateError, SparsifinerError
from sparsifiner_edge.package import package_bundle
from sparsifiner_edge.package.common import read_bundle
from sparsifiner_edge.package.deepstream import app_config, nvinfer_config
from sparsifiner_edge.package.float_model import float_model
from sparsifiner_edge.runtime import open_session
from tests.package.nvinfer_keys import check_app, check_nvinfer
from tests.package.reseal import reseal
from tests.tiny import make_bundle

ROLES = ("primary", "secondary")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path) -> Path:
    out = tmp_path_factory.mktemp("deepstream") / "out"
    package_bundle(tiny_bundle, "deepstream", out)
    return out


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory, dynamic_bundle: Path) -> Path:
    out = tmp_path_factory.mktemp("deepstream") / "out"
    package_bundle(dynamic_bundle, "deepstream", out, batch=4)
    return out


def pixels(batch: int) -> Any:
    return np.random.default_rng(5).integers(0, 256, (batch, 160, 160, 3), dtype=np.uint8)


def run(path: Path, image: Any) -> dict[str, Any]:
    session = onnxruntime.InferenceSession(str(path))
    (entry,) = session.get_inputs()
    assert (entry.name, entry.type, entry.shape[1:]) == ("image", "tensor(float)", [3, 160, 160])
    planes = np.ascontiguousarray(image.transpose(0, 3, 1, 2), dtype=np.float32)
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, {"image": planes}), strict=True))


def test_a_classifier_gives_probabilities_alone(classifier: Path, tiny_bundle: Path) -> None:
    image = pixels(1)
    with open_session(tiny_bundle, kernels="portable") as session:
        logits = session.infer({"image": image})["logits"].astype(np.float64)
    found = run(classifier / "model.onnx", image)
    assert list(found) == ["probabilities"]
    weights = np.exp(logits)
    assert np.abs(found["probabilities"] - weights / weights.sum()).max() < 1e-5
    model = onnx.load(classifier / "model.onnx")
    onnx.checker.check_model(model)
    assert not [n.name for n in model.graph.node if n.op_type in ("Cast", "Transpose") and "image" in n.input]
    assert {p.key for p in model.metadata_props} == {"name", "version", "licence", "classes", "probabilities"}


def test_features_of_dynamic_batch(features: Path, dynamic_bundle: Path) -> None:
    image = pixels(3)
    with open_session(dynamic_bundle, kernels="portable") as session:
        expected = session.infer({"image": image})
    found = run(features / "model.onnx", image)
    assert list(found) == ["features", "tokens", "token_positions"]
    for name, value in expected.items():
        assert np.abs(found[name].astype(np.float64) - value).max() < 1e-3, name


@pytest.mark.everything
def test_half_precision(tmp_path: Path, tiny_student: Path) -> None:
    from sparsifiner_edge.export.export import export_bundle

    bundle = export_bundle(tiny_student, tmp_path / "bundle", precision="fp16")
    remarks = package_bundle(bundle, "deepstream", tmp_path / "out").remarks
    assert any("may become float16" in remark for remark in remarks)
    found = check_nvinfer((tmp_path / "out" / "config_infer_primary.txt").read_text())["property"]
    assert (found["network-mode"], found["model-engine-file"]) == ("2", "model.onnx_b1_gpu0_fp16.engine")


def test_models_that_begin_otherwise(tmp_path: Path) -> None:
    """A Cast without the Transpose of our exports: the pixels' layout is made again."""
    bundle = make_bundle(tmp_path / "b", preprocessing={"size": 4})
    package_bundle(bundle, "deepstream", tmp_path / "out")
    nodes = onnx.load(tmp_path / "out" / "model.onnx").graph.node
    assert [node.op_type for node in nodes][:2] == ["Transpose", "Reshape"]
    graph = helper.make_graph(
        [helper.make_node("Identity", ["image"], ["features"])], "g",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, [1, 4, 4, 3])],
        [helper.make_tensor_value_info("features", TensorProto.UINT8, [1, 4, 4, 3])],
    )  # fmt: skip
    with pytest.raises(ConfigError, match="does not begin with a Cast"):
        float_model(helper.make_model(graph))


def of(kind: str, model: Any) -> Any:
    return next(node for node in model.graph.node if node.op_type == kind)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: of("Cast", model).ClearField("attribute"),
        lambda model: of("Cast", model).ClearField("output"),
        lambda model: of("Transpose", model).ClearField("attribute"),
        lambda model: model.graph.input[0].type.tensor_type.shape.dim.pop(),
        lambda model: model.graph.input[0].type.ClearField("tensor_type"),
        lambda model: model.graph.node.insert(1, onnx.NodeProto(op_type="Identity")),
        lambda model: model.graph.ClearField("input"),
    ],
)
def test_models_that_nobody_exports(
    change: Callable[[Any], object], tiny_bundle: Path, altered: Callable[..., Path], tmp_path: Path
) -> None:
    """Refused; or, where the order of a Transpose is the default, another model that golden tells."""
    with pytest.raises(SparsifinerError):
        package_bundle(altered(tiny_bundle, change), "deepstream", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("outputs", "error", "said"),
    [
        ([("features", [1, 8]), ("more", [1, 8])], ArtifactError, "the model gives 'features'; its manifest differs"),
        ([("logits", ["classes"])], ConfigError, "has 'classes' classes"),
        ([("logits", [1, (1 << 20) + 1])], ConfigError, "has 1048577 classes"),
        ([("logits", [1, None])], ConfigError, "has None classes"),
    ],
)
def test_a_manifest_with_other_outputs(
    outputs: list[tuple[str, Any]], error: type[SparsifinerError], said: str, tmp_path: Path
) -> None:
    listed = [{"name": name, "dtype": "float32", "shape": shape} for name, shape in outputs]
    bundle = make_bundle(tmp_path / "b", preprocessing={"size": 4}, outputs=listed)
    with pytest.raises(error, match=said):
        package_bundle(bundle, "deepstream", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_name_with_points_is_no_type(tmp_path: Path, tiny_bundle: Path) -> None:
    read = dataclasses.replace(read_bundle(tiny_bundle), name="vit_small_patch14_dinov2.lvd142m")
    found = check_nvinfer(nvinfer_config(read, "primary", 1))["property"]
    assert found["classifier-type"] == "vit_small_patch14_dinov2_lvd142m"


def test_a_variant_that_disagrees_is_not_written(
    tiny_bundle: Path, altered: Callable[..., Path], tmp_path: Path
) -> None:
    def change(model: Any) -> None:
        tensor = next(t for t in model.graph.initializer if t.name == "model.patch_embed.proj.weight")
        tensor.raw_data = (np.frombuffer(tensor.raw_data, np.float32) * np.float32(1.2)).tobytes()

    with pytest.raises(GateError, match="differs from golden"):
        package_bundle(altered(tiny_bundle, change), "deepstream", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_planes_in_another_order_are_noticed(
    tmp_path: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blue first, as a wrong model-color-format would give it, is beyond the tolerance that the check allows."""
    from sparsifiner_edge.package import float_model as module

    plain = module._PlanesSession.infer
    monkeypatch.setattr(
        module._PlanesSession, "infer", lambda self, inputs: plain(self, {"image": inputs["image"][..., ::-1]})
    )
    with pytest.raises(GateError, match="differs from golden"):
        package_bundle(tiny_bundle, "deepstream", tmp_path / "out")


@pytest.mark.parametrize("role", ROLES)
def test_configurations_of_a_classifier(role: str, classifier: Path) -> None:
    found = check_nvinfer((classifier / f"config_infer_{role}.txt").read_text())["property"]
    assert (found["scaling-filter"], found["classifier-type"]) == ("1", "test_vit")
    assert "scaling-filter=1" in (classifier / "README.md").read_text()
    assert (found["process-mode"], found["gie-unique-id"]) == (("1", "1") if role == "primary" else ("2", "2"))
    assert (found["network-type"], found["net-scale-factor"], found["infer-dims"]) == ("1", "1.0", "3;160;160")
    assert "offsets" not in found
    assert found["output-blob-names"] == "probabilities"
    assert (found["batch-size"], found["model-engine-file"]) == ("1", "model.onnx_b1_gpu0_fp32.engine")
    for key in ("onnx-file", "labelfile-path"):
        assert (classifier / found[key]).is_file()
    groups = check_app((classifier / f"deepstream_app_{role}.txt").read_text())
    group = groups["primary-gie" if role == "primary" else "secondary-gie0"]
    assert (classifier / group["config-file"]).name == f"config_infer_{role}.txt"
    assert group["gie-unique-id"] == found["gie-unique-id"]
    assert f"deepstream_app_{role}.txt" in (classifier / "README.md").read_text()


def test_labels_are_one_line(classifier: Path, tiny_bundle: Path, altered: Callable[..., Path], tmp_path: Path) -> None:
    assert (classifier / "labels.txt").read_text() == ";".join(f"class_{i}" for i in range(10)) + "\n"
    folder = altered(tiny_bundle)
    (folder / "labels.txt").write_text("".join(f"{name}\n" for name in ["a;b", "", "é", *"defghij"]))
    folder = reseal(folder)
    package_bundle(folder, "deepstream", tmp_path / "out")
    assert (tmp_path / "out" / "labels.txt").read_text() == "a,b;-;é;d;e;f;g;h;i;j\n"
    (folder / "labels.txt").write_text("one\n")
    with pytest.raises(ConfigError, match="1 labels for 10 classes"):
        package_bundle(reseal(folder), "deepstream", tmp_path / "other")


@pytest.mark.parametrize("role", ROLES)
def test_a_model_without_classes_gives_tensors(role: str, features: Path) -> None:
    found = check_nvinfer((features / f"config_infer_{role}.txt").read_text())["property"]
    assert (found["network-type"], found["output-tensor-meta"], found["batch-size"]) == ("100", "1", "4")
    assert found["output-blob-names"] == "features;tokens;token_positions"
    assert "classifier-threshold" not in found
    assert not (features / "labels.txt").exists()
    assert "has no logits" in (features / "README.md").read_text()


def test_int8_is_refused(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", preprocessing={"size": 4}, precision="int8")
    with pytest.raises(ConfigError, match="calibration table"):
        package_bundle(bundle, "deepstream", tmp_path / "out")


GOOD = """[property]
gpu-id=0
gie-unique-id=1
process-mode=1
batch-size=1
network-mode=0
network-type=1
net-scale-factor=1.0
model-color-format=0
network-input-order=0
infer-dims=3;160;160
scaling-filter=1
onnx-file=model.onnx
model-engine-file=model.engine
output-blob-names=probabilities
labelfile-path=labels.txt
classifier-threshold=0.2
interval=0
"""


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("interval=0", "intervall=0", "intervall is no documented key"),
        ("interval=0", "Interval=0", "Interval is no documented key"),
        ("interval=0\n", "", "lacks interval"),
        ("labelfile-path=labels.txt\n", "", "lacks labelfile-path"),
        ("network-type=1", "network-type=9", "network-type=9 is not of the documented form"),
        ("net-scale-factor=1.0", "net-scale-factor=1.0;1.0;1.0", "is not of the documented form"),
        ("infer-dims=3;160;160", "infer-dims=3,160,160", "is not of the documented form"),
        ("gpu-id=0", "gpu-id=0 # first", "is not of the documented form"),
        ("onnx-file=model.onnx", "onnx-file=", "is not of the documented form"),
        ("[property]", "[properties]", "[properties] is no documented group"),
        ("gpu-id=0\n", "gpu-id=0\ngpu-id=1\n", "No key file"),
        ("[property]\n", "", "No key file"),
        ("network-type=1", "network-type=100", "lacks output-tensor-meta"),
        ("network-type=1", "network-type=100\noutput-tensor-meta=0", "gives nothing"),
        ("process-mode=1", "process-mode=2", "lacks operate-on-gie-id"),
        ("scaling-filter=1\n", "", "lacks scaling-filter"),
        ("scaling-filter=1", "scaling-filter=7", "scaling-filter=7 is not of the documented form"),
        ("classifier-threshold=0.2", "classifier-threshold=-1", "is not of the documented form"),
        ("interval=0", "interval=0\nsegmentation-threshold=-0.5", "is not of the documented form"),
        ("interval=0", "interval=0\ncrop-objects-to-roi-boundary=1", "is no documented key"),
        ("interval=0", "interval=0\nclassifier-type=a.b", "is not of the documented form"),
        ("interval=0", "interval=0\n[class-attrs-x]", "[class-attrs-x] is no documented group"),
        ("interval=0", "interval=0\n[class-attrs-1]\ntop=1", "[class-attrs-1] top is no documented key"),
    ],
)
def test_the_check_of_keys(old: str, new: str, said: str) -> None:
    check_nvinfer(GOOD)
    assert old in GOOD
    with pytest.raises(GateError) as caught:
        check_nvinfer(GOOD.replace(old, new, 1))
    assert said in caught.value.what
    assert caught.value.fix


def key_file(groups: dict[str, dict[str, Any]]) -> str:
    return "".join(
        f"[{group}]\n" + "".join(f"{key}={value}\n" for key, value in entries.items())
        for group, entries in groups.items()
    )


def test_keys_that_others_write() -> None:
    """Those of NVIDIA's own samples."""
    more = "[class-attrs-all]\npre-cluster-threshold=0.4\ntopk=-1\n[class-attrs-2]\nroi-top-offset=0\nminBoxes=3\n"
    assert set(check_nvinfer(GOOD + more)) == {"property", "class-attrs-all", "class-attrs-2"}
    groups: dict[str, dict[str, Any]] = dict(check_app(app_config("secondary", 8)))
    groups["tests"]["pipeline-recreate-sec"] = 0
    groups["streammux"] |= {"config-file": "mux.txt", "max-latency": 0, "frame-num-reset-on-eos": 1}
    groups["streammux"]["frame-num-reset-on-stream-reset"] = 0
    groups["osd"] |= {"display-bbox": 1, "display-mask": 0}
    groups["sink0"] |= {"iframeinterval": 30, "profile": 0, "qos": 0, "width": 1280, "height": 720}
    groups["source0"] |= {"intra-decode-enable": 0, "num-extra-surfaces": 5, "udp-buffer-size": 2000000}
    for group in ("primary-gie", "secondary-gie0"):
        groups[group]["infer-raw-output-dir"] = "raw/"
    check_app(key_file(groups))


@pytest.mark.parametrize(
    ("group", "key", "value", "said"),
    [
        ("primary-gie", "config-file", None, "lacks config-file"),
        ("sink0", None, None, "The group [sink0] is missing"),
        ("sink0", "type", "9", "type=9"),
        ("streammux", "widht", "1280", "widht is no documented key"),
        ("sinks", "enable", "1", "[sinks] is no documented group"),
    ],
)
def test_the_check_of_an_application(group: str, key: str | None, value: str | None, said: str) -> None:
    groups = check_app(app_config("secondary", 8))
    if key is None:
        del groups[group]
    elif value is None:
        del groups[group][key]
    else:
        groups.setdefault(group, {})[key] = value
    with pytest.raises(GateError) as caught:
        check_app(key_file(groups))
    assert said in caught.value.what
