"""What a bundle says of its engines, and what opening one says when it does not fit: no GPU is needed for any of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sparsifiner_edge.artifacts import BUNDLE_FILE
from sparsifiner_edge.bundle.engines import (
    BatchRange,
    Details,
    Engine,
    EngineDevice,
    fitting_engine,
    mismatches,
    parse_capability,
    system,
)
from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.errors import ArtifactError, BackendError, ConfigError
from sparsifiner_edge.records import Unavailable, write_record
from tests.package.reseal import reseal
from tests.tiny import make_bundle

ENGINE = Engine("tensorrt-rtx", "1.7.1", "8.6", *system(), "fp16", BatchRange(1, 1, 8))
DEVICE = EngineDevice("1.7.1", "8.6", "NVIDIA RTX A2000")


def changed(**values: Any) -> Engine:
    return msgspec.structs.replace(ENGINE, **values)


def forge(folder: Path, *engines: Engine, content: bytes = b"no engine at all") -> Path:
    """A bundle that lists engines, hashes and all."""
    make_bundle(folder)
    (folder / "engines").mkdir()
    listed = []
    for number, engine in enumerate(engines):
        place = engine.file or f"engines/{engine.name}-{number:08x}.engine"
        (folder / place).write_bytes(content)
        listed.append(write_record(msgspec.structs.replace(engine, file=place)))
    return reseal(folder, engines=listed)


def spoil(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((folder / BUNDLE_FILE).read_text())
    change(manifest)
    (folder / BUNDLE_FILE).write_text(json.dumps(manifest))


def test_names_carry_everything() -> None:
    assert ENGINE.name == "tensorrt-rtx-1.7.1-sm86-linux-x86_64-fp16-b1-1-8"
    fixed = changed(backend="tensorrt", compute_capability="12.0", batch=BatchRange(4, 4, 4))
    assert fixed.name == "tensorrt-1.7.1-sm120-linux-x86_64-fp16-b4"


def test_what_is_written_is_read_back_and_what_is_not_known_passed_over(tmp_path: Path) -> None:
    other = changed(version="2", details=Details(bytes=7, golden=Unavailable("no GPU")))
    folder = forge(tmp_path / "b", ENGINE, other)
    spoil(folder, lambda m: m["engines"][0].update({"details": {"tactics": ["a"]}, "later": 1}))
    engines = open_bundle(folder).manifest.engines
    assert [msgspec.structs.replace(e, file="") for e in engines] == [ENGINE, other]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"compute_capability": "8.9"}, "built for compute capability 8.9, NVIDIA RTX A2000 has 8.6"),
        ({"version": "1.8.0"}, "built by tensorrt-rtx 1.8.0, installed is 1.7.1"),
        ({"os": "windows"}, "built for windows on "),
        ({"cpu": "riscv64"}, "built for linux on riscv64, this is linux on "),
    ],
)
def test_each_mismatch_is_named(change: dict[str, Any], reason: str) -> None:
    assert mismatches(ENGINE, DEVICE) == []
    (found,) = mismatches(changed(**change), DEVICE)
    assert reason in found


def test_the_last_that_fits_is_taken(tmp_path: Path) -> None:
    last = changed(file="engines/b.engine")
    engines = [changed(file="engines/a.engine"), last, changed(compute_capability="8.9", file="engines/c.engine")]
    assert fitting_engine(engines, "tensorrt-rtx", DEVICE, tmp_path) is last


def test_where_none_fits_the_command_that_builds_one_is_given(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="holds no engine for tensorrt-rtx") as caught:
        fitting_engine([changed(backend="tensorrt")], "tensorrt-rtx", DEVICE, tmp_path)
    assert f"sparsifiner-edge build {tmp_path} --backend tensorrt-rtx --compute-capability 8.6" in caught.value.fix
    engines = [
        changed(version="9", file="engines/a"),
        changed(compute_capability="8.9", os="windows", file="engines/b"),
    ]
    with pytest.raises(BackendError) as both:
        fitting_engine(engines, "tensorrt-rtx", DEVICE, tmp_path)
    assert "engines/a: built by tensorrt-rtx 9, installed is 1.7.1; engines/b: built for windows" in both.value.what
    assert "capability 8.9" in both.value.what


@pytest.mark.parametrize("text", ["8", "86", "8.6.1", "sm86", "", "8,6", "eight.six", "８.6"])
def test_capabilities_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="compute capability is"):
        parse_capability(text)
    assert parse_capability(" 12.0 ") == "12.0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(engines={}), r"engines is \{\}, not list"),
        (lambda m: m["engines"][0].pop("version"), "version is missing"),
        (lambda m: m["engines"][0]["batch"].update(best="1"), 'batch.best is "1", not int'),
        (lambda m: m["engines"][0].update(file="engines/other.engine"), "without a hash"),
        (lambda m: m["engines"][0].update(file="model.onnx"), "outside engines/"),
        (lambda m: m["engines"][0].update(version="1/2"), r'version is "1/2", not str of the form'),
        (lambda m: m["engines"][0].update(details={"golden": {"unavailable": 1}}), "unavailable is 1, not str"),
        (lambda m: m["engines"][0].update(details={"golden": {"x": 1}}), "an entry of it is not dict"),
        (lambda m: m["engines"][0].update(file="x/engines/e.engine"), "without a hash"),
    ],
)
def test_a_manifest_that_is_not_ours(tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    folder = forge(tmp_path / "b", ENGINE)
    spoil(folder, change)
    with pytest.raises(ArtifactError, match=message):
        open_bundle(folder)
