"""Triton: model repositories, read back by the real ModelConfig where it is installed, and run as the server would."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime
import pytest
from google.protobuf import text_format

from sparsifiner_edge.bundle.engines import BatchRange, Engine
from sparsifiner_edge.bundle.store import bundle_scratch, extend_bundle
from sparsifiner_edge.errors import ArtifactError, ConfigError, GateError
from sparsifiner_edge.ops import native
from sparsifiner_edge.package import package_bundle
from sparsifiner_edge.package.common import read_bundle
from sparsifiner_edge.package.triton import _takes_one, newest_engines, pbtxt
from tests.package.reseal import reseal
from tests.package.triton_config import _ENUMS, _MESSAGES, _config_class, check_config
from tests.tiny import make_bundle

REAL = Path(sys.prefix) / "tritonclient" / "tritonclient" / "grpc" / "model_config_pb2.py"
"""Made by `make test` (target .dev)."""


def read_really(text: str) -> Any:
    """The message as Triton's own definition reads it."""
    if not REAL.exists():
        pytest.skip(f"{REAL} is made by `make test`")
    spec = importlib.util.spec_from_file_location("model_config_pb2", REAL)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules.get(spec.name) or importlib.util.module_from_spec(spec)
    if spec.name not in sys.modules:
        spec.loader.exec_module(module)
        sys.modules[spec.name] = module  # Protobuf takes one definition of a name.
    return text_format.Parse(text, module.ModelConfig())


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path) -> Path:
    out = tmp_path_factory.mktemp("triton") / "out"
    package_bundle(tiny_bundle, "triton", out)
    return out / "models" / "test_vit"


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory, dynamic_bundle: Path) -> Path:
    out = tmp_path_factory.mktemp("triton") / "out"
    package_bundle(dynamic_bundle, "triton", out, batch=16, kernels="portable")
    return out / "models" / "test_vit"


def tensors(entries: Any) -> dict[str, tuple[int, list[int]]]:
    return {entry.name: (entry.data_type, list(entry.dims)) for entry in entries}


def test_a_fixed_batch(fixed: Path) -> None:
    config = read_really((fixed / "config.pbtxt").read_text())
    assert (config.name, config.backend, config.max_batch_size) == ("test_vit", "onnxruntime", 0)
    uint8, fp32 = 2, 11
    assert tensors(config.input) == {"image": (uint8, [1, 160, 160, 3])}
    assert tensors(config.output) == {"logits": (fp32, [1, 10]), "features": (fp32, [1, 64])}
    assert config.output[0].label_filename == "labels.txt"
    assert (fixed / "labels.txt").read_text().splitlines() == [f"class_{i}" for i in range(10)]
    assert not config.HasField("dynamic_batching")
    (group,) = config.instance_group
    assert (group.count, group.kind) == (1, group.KIND_CPU)
    assert (fixed / "1" / config.default_model_filename).is_file()


def test_a_dynamic_batch(dynamic: Path) -> None:
    config = read_really((dynamic / "config.pbtxt").read_text())
    assert (config.max_batch_size, config.dynamic_batching.max_queue_delay_microseconds) == (16, 2000)
    assert tensors(config.input)["image"][1] == [160, 160, 3]
    int32 = 8
    found = tensors(config.output)
    assert found["token_positions"] == (int32, [50])
    assert found["tokens"][1] == [51, 64]
    assert not config.HasField("model_operations")
    assert not list(dynamic.glob("*.so"))
    assert not (dynamic / "labels.txt").exists()


@pytest.mark.parametrize("name", ["fixed", "dynamic"])
def test_the_warm_up_runs(name: str, request: pytest.FixtureRequest) -> None:
    """What the server does on loading: the operators' library, the model, the file of the warm-up as input."""
    folder: Path = request.getfixturevalue(name)
    config = check_config((folder / "config.pbtxt").read_text())
    ((entry,),) = (warm.inputs for warm in config.model_warmup)
    raw = np.frombuffer((folder / "warmup" / entry.value.input_data_file).read_bytes(), np.uint8)
    image = raw.reshape([1] * bool(config.max_batch_size) + list(entry.value.dims))
    options = onnxruntime.SessionOptions()
    for library in config.model_operations.op_library_filename:
        assert library.startswith("/models/test_vit/")
        options.register_custom_ops_library(str(folder / library.removeprefix("/models/test_vit/")))
    session = onnxruntime.InferenceSession(str(folder / "1" / config.default_model_filename), options)
    found = dict(zip([o.name for o in session.get_outputs()], session.run(None, {entry.key: image}), strict=True))
    bundle = request.getfixturevalue("tiny_bundle" if name == "fixed" else "dynamic_bundle")
    with np.load(bundle / "golden.npz") as golden:
        expected = golden["output.features"]
    assert np.abs(found["features"] - expected).max() < 1e-3 * np.ptp(expected)


def test_the_native_library(fixed: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    if native.library_path() is None:
        pytest.skip("the native library is not built")
    config = check_config((fixed / "config.pbtxt").read_text())
    assert list(config.model_operations.op_library_filename) == ["/models/test_vit/libsparsifiner_ops.so"]
    readme = (fixed.parent.parent / "README.md").read_text()
    assert "libhwy" not in readme
    assert "tritonserver --model-repository=/models" in readme
    assert "-e ORT_DISABLE_TELEMETRY=1" in readme
    remarks = package_bundle(tiny_bundle, "triton", tmp_path / "out", kernels="portable").remarks
    assert any("slower on a CPU" in remark for remark in remarks)


def engine(capability: str, **changes: Any) -> Engine:
    made = Engine("tensorrt", "10.3.0", capability, "linux", "aarch64", "fp32", BatchRange(1, 1, 4))
    return msgspec.structs.replace(made, **changes)


def with_engines(folder: Path, *engines: Engine) -> Path:
    """A bundle as `build` leaves it on a device with full TensorRT, its plans' content aside."""
    for number, one in enumerate(engines):
        place = f"engines/{one.name}-{number}.engine"
        listed = msgspec.structs.replace(one, file=place)
        with bundle_scratch(folder) as scratch:
            (scratch / "e").write_bytes(place.encode())
            extend_bundle(
                folder,
                {place: scratch / "e"},
                lambda m, new=listed: msgspec.structs.replace(m, engines=(*m.engines, new)),
            )
    return folder


def test_plans(tmp_path: Path) -> None:
    engines = [engine("8.7"), engine("8.6"), engine("8.7", batch=BatchRange(1, 1, 2))]
    bundle = with_engines(make_bundle(tmp_path / "b", preprocessing={"size": 4}, name="m"), *engines)
    remarks = package_bundle(bundle, "triton", tmp_path / "out").remarks
    folder = tmp_path / "out" / "models" / "m_tensorrt"
    text = (folder / "config.pbtxt").read_text()
    assert text_format.MessageToString(check_config(text)) == text
    config = read_really(text)
    assert (config.name, config.platform, config.backend) == ("m_tensorrt", "tensorrt_plan", "")
    assert config.max_batch_size == 2
    assert dict(config.cc_model_filenames) == {"8.7": "model_8_7.plan", "8.6": "model_8_6.plan"}
    assert config.instance_group[0].kind == config.instance_group[0].KIND_GPU
    assert "-b1-1-2-" in (folder / "1" / "model_8_7.plan").read_text()
    assert {path.name for path in (folder / "1").iterdir()} == {"model_8_7.plan", "model_8_6.plan"}
    assert (folder / "warmup" / "image").stat().st_size == 4 * 4 * 3
    assert "TensorRT 10.3.0 for compute capability 8.7, 8.6" in (tmp_path / "out" / "README.md").read_text()
    assert any("only on the TensorRT version" in remark for remark in remarks)


def test_engines_that_triton_does_not_run(tmp_path: Path) -> None:
    bundle = with_engines(make_bundle(tmp_path / "b", preprocessing={"size": 4}), engine("8.6", backend="tensorrt-rtx"))
    remarks = package_bundle(bundle, "triton", tmp_path / "out").remarks
    assert any("TensorRT-RTX are left out" in remark for remark in remarks)
    assert len(list((tmp_path / "out" / "models").iterdir())) == 1
    with pytest.raises(ConfigError, match="compute capability is '8/7'"):
        newest_engines([engine("8/7")])
    with_engines(bundle, engine("8.7"), engine("8.6", version="11.4.0"))
    with pytest.raises(ConfigError, match=r"TensorRT 10\.3\.0 on aarch64 and TensorRT 11\.4\.0"):
        package_bundle(bundle, "triton", tmp_path / "other")


def test_plans_that_take_no_single_image(tmp_path: Path) -> None:
    """As `build --batch 4` makes them: the warm-up and the server's own batching send one."""
    least = engine("8.7", batch=BatchRange(4, 4, 8))
    bundle = with_engines(make_bundle(tmp_path / "b", preprocessing={"size": 4}, name="m"), engine("8.7"), least)
    remarks = package_bundle(bundle, "triton", tmp_path / "out").remarks
    assert any("above 1 alone are left out" in remark for remark in remarks)
    config = check_config((tmp_path / "out" / "models" / "m_tensorrt" / "config.pbtxt").read_text())
    assert config.max_batch_size == 4  # The earlier one of its kind.
    alone = with_engines(make_bundle(tmp_path / "alone", preprocessing={"size": 4}, name="m"), least)
    package_bundle(alone, "triton", tmp_path / "other")
    assert [path.name for path in (tmp_path / "other" / "models").iterdir()] == ["m"]
    fixed = make_bundle(tmp_path / "f", preprocessing={"size": 4}, name="m", batch=4)
    with_engines(fixed, engine("8.7", batch=BatchRange(4, 4, 4)))
    assert read_bundle(fixed).manifest.batch == 4
    assert _takes_one(engine("8.7", batch=BatchRange(4, 4, 4)), read_bundle(fixed))


def test_damaged_input(tmp_path: Path) -> None:
    for number, content in enumerate((b"", b"PK\x03\x04" + bytes(50))):
        bundle = make_bundle(tmp_path / f"b{number}", preprocessing={"size": 4})
        (bundle / "golden.npz").write_bytes(content)
        reseal(bundle)
        with pytest.raises(ArtifactError, match=r"golden\.npz cannot be read"):
            package_bundle(bundle, "triton", tmp_path / "out")
    bundle = make_bundle(
        tmp_path / "b", preprocessing={"size": 4}, outputs=[{"name": "x", "dtype": "complex64", "shape": [1]}]
    )
    with pytest.raises(ConfigError, match="complex64"):
        package_bundle(bundle, "triton", tmp_path / "out")
    bundle = make_bundle(
        tmp_path / "n", preprocessing={"size": 4}, outputs=[{"name": "x", "dtype": "float32", "shape": [1, 10**30]}]
    )
    with pytest.raises(ArtifactError, match="output 'x' has shape"):
        package_bundle(bundle, "triton", tmp_path / "out")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("max_batch_size: 0", "max_batch: 0", 'no field named "max_batch"'),
        ("KIND_CPU", "KIND_ABACUS", "KIND_ABACUS"),
        ("TYPE_UINT8", "TYPE_UINT9", "TYPE_UINT9"),
        ('name: "test_vit"', "", "lacks name"),
        ("max_batch_size: 0", "", "lacks max_batch_size"),
        ('backend: "onnxruntime"', "", "lacks platform or backend"),
        ('backend: "onnxruntime"', 'backend: "onnxruntime" platform: "x"', "platform or backend, one of them"),
        ("dims: 160", 'dims: "160"', "config.pbtxt"),
        ("model_warmup", "model_warmdown", "model_warmdown"),
    ],
)
def test_the_check_of_a_configuration(old: str, new: str, said: str, fixed: Path) -> None:
    text = (fixed / "config.pbtxt").read_text()
    assert old in text
    with pytest.raises(GateError) as caught:
        check_config(text.replace(old, new))
    assert said in caught.value.what


@pytest.mark.parametrize(
    ("outputs", "said"),
    [([], "outputs is empty"), ([{"name": "x", "dtype": "float32", "shape": []}], r"output 'x' has shape \[\]")],
)
def test_what_lacks_is_told_before_it_is_written(outputs: list[dict[str, Any]], said: str, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", preprocessing={"size": 4}, outputs=outputs)
    with pytest.raises(ArtifactError, match=said):
        package_bundle(bundle, "triton", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["fixed", "dynamic"])
def test_the_text_is_as_protobuf_prints_it(name: str, request: pytest.FixtureRequest) -> None:
    text = (request.getfixturevalue(name) / "config.pbtxt").read_text()
    assert text_format.MessageToString(check_config(text)) == text


def test_strings_are_quoted() -> None:
    text = pbtxt(name='a"b\\c', input=[{"name": "x\ny", "dims": [-1, 2]}], backend=None)
    read = text_format.Parse(text, _config_class()())
    assert (read.name, read.input[0].name, list(read.input[0].dims)) == ('a"b\\c', "x\ny", [-1, 2])


def test_every_field_of_ours_is_tritons() -> None:
    config = read_really("")
    names = {"WarmupInput": "ModelWarmup.Input", "Parameter": "ModelParameter"}
    for message, fields in _MESSAGES.items():
        if message.endswith("Entry"):
            continue  # A map's entry: key and value.
        real = described(config, names.get(message, message))
        for name, kind in fields.items():
            assert name in real.fields_by_name, (message, name)
            assert real.fields_by_name[name].is_repeated == kind.endswith("*"), (message, name)
    data_types = config.DESCRIPTOR.file.enum_types_by_name["DataType"].values_by_name
    assert set(_ENUMS["DataType"]) <= set(data_types)


def described(config: Any, name: str) -> Any:
    outer, _, inner = name.partition(".")
    message = config.DESCRIPTOR.file.message_types_by_name[outer]
    return message.nested_types_by_name[inner] if inner else message
