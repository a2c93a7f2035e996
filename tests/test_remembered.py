"""Tests of the intended execution that a bundle records, and of how it is applied."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from msgspec.structs import replace

import sparsifiner_edge as se
from sparsifiner_edge.bundle.manifest import Intended
from sparsifiner_edge.bundle.sign import require_signature, sign_bundle
from sparsifiner_edge.bundle.store import open_bundle, remember_execution
from sparsifiner_edge.cli import profile
from sparsifiner_edge.errors import ArtifactError, BackendError, ConfigError
from sparsifiner_edge.execution import Execution
from sparsifiner_edge.runtime import openvino
from sparsifiner_edge.runtime.open import choose_execution
from sparsifiner_edge.runtime.openvino import import_openvino
from tests.commands import assert_refused, call, process, snapshot
from tests.flat import open_session
from tests.made import plain
from tests.once import Once
from tests.seal import reseal

KNOWN = import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@pytest.fixture
def bundle(once: Once, tmp_path: Path) -> Path:
    """A bundle of two classes and 8 pixels."""
    return Path(shutil.copytree(once("two classes", lambda folder: plain(folder / "b")) / "b", tmp_path / "bundle"))


def test_a_bundle_remembers_and_a_signature_holds_no_longer(bundle: Path, keys: Path) -> None:
    sign_bundle(bundle, keys / "key.pem")
    before = open_bundle(bundle).manifest
    for intended in (Intended("onnxruntime"), Intended("openvino", "bf16")):
        remember_execution(bundle, intended.backend, intended.compute_precision)
        assert open_bundle(bundle).manifest == replace(before, intended=intended)
    with pytest.raises(ArtifactError, match="was changed after it was signed"):
        require_signature(bundle, keys / "key.pub")
    content = snapshot(bundle)
    for wrong in (("openvino", "int1"), ("../evil", "auto")):
        with pytest.raises(ConfigError, match=r"Intended: (backend|compute_precision) is"):
            remember_execution(bundle, *wrong)
    assert snapshot(bundle) == content


def without_bf16(precision: str = "auto") -> Any:
    if precision == "bf16":
        raise BackendError("This processor has no bf16.", "Leave --compute-precision out.")
    return import_openvino(precision)


OPENVINO, BF16 = {"backend": "openvino"}, {"backend": "openvino", "compute_precision": "bf16"}


@pytest.mark.parametrize(
    ("intended", "named", "runs", "why"),
    [
        (None, {}, "onnxruntime", None),
        (OPENVINO, {}, "openvino", "it."),
        (OPENVINO, {"backend": "onnxruntime"}, "onnxruntime", None),
        (OPENVINO, {"compute_precision": "fp32"}, "openvino in fp32", "openvino."),
        (BF16, {}, "openvino", "openvino in bf16: This processor has no bf16."),
        (BF16, OPENVINO, "openvino", "openvino in bf16: This processor has no bf16."),
        (BF16, {"backend": "onnxruntime"}, "onnxruntime", None),
        ({"backend": "tensorrt-rtx"}, {}, "onnxruntime", "tensorrt-rtx: .* (no engine|not installed).*"),
        ({"backend": "sys"}, {}, "onnxruntime", r"sys\."),  # A bundle cannot name code.
    ],
)
def test_what_runs(
    intended: object, named: dict[str, str], runs: str, why: str | None, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest decides unless the caller does; a precision has its backend and is never lowered."""
    monkeypatch.setattr(openvino, "import_openvino", without_bf16)
    reseal(bundle, intended=intended)
    with open_session(bundle, **named) as session:
        assert session.backend == runs.partition(" ")[0]
        assert str(choose_execution(open_bundle(bundle), Execution(**named))[0]) == runs
        said = session.description.chosen
    assert said == why or re.fullmatch(f"{runs} runs this bundle, which is intended for {why}", str(said)), said
    for wrong in (BF16, {"compute_precision": "int1"}):
        with pytest.raises(BackendError, match=r"This processor has no bf16|precision is 'int1'"):
            open_session(bundle, **wrong)
    monkeypatch.undo()
    if intended == BF16 and not named and "BF16" in KNOWN:
        assert str(choose_execution(open_bundle(bundle), Execution())[0]) == "openvino in bf16"


BLOCKED = "import sys; sys.modules['openvino'] = None; from sparsifiner_edge.cli.main import main; main(sys.argv[1:])"


def test_every_command_says_once_what_runs_in_place_of_what_is_not_installed(bundle: Path, pictures: Path) -> None:
    remember_execution(bundle, "openvino")
    commands = {
        ("run", bundle, "--source", pictures): 1,
        ("run", bundle, "--source", "test", "--frames", 2): 1,
        ("bundle", "verify", bundle, "--json"): 1,
        ("evaluate", bundle, "--against", bundle, "--data", pictures): 2,  # by role
    }
    said = "onnxruntime runs this bundle, which is intended for openvino: openvino is not installed"
    for command, times in commands.items():
        line = [sys.executable, "-c", BLOCKED, *map(str, command)]
        ran = subprocess.run(line, capture_output=True, text=True, check=False)
        assert (ran.stdout + ran.stderr).count(said) == times, (command, ran)


def test_sides_of_a_comparison_have_executions_of_their_own(bundle: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(bundle, tmp_path / "other"))
    remember_execution(bundle, "openvino")
    short = ("--seconds", "0.1", "--threads", "1")
    printed = process("profile", bundle, "--against", other, *short).out
    assert "bundle: openvino runs this bundle, which is intended for it." in printed
    assert re.search(r"; they differ in .*backend \(openvino .* \| onnxruntime ", printed)
    same = ("profile", bundle, "--against", bundle, *short, "--against-backend", "onnxruntime", "--json")
    result = json.loads(process(*same).out)
    for role, backend, layers in (("subject", "openvino", dict), ("against", "onnxruntime", list)):
        assert result["method"]["runtime"][role]["backend"] == backend
        assert isinstance(result["statistics"][role]["layers"], layers)
    assert_refused(process("profile", bundle, "--against-backend", "onnxruntime"), "against_execution requires")
    assert_refused(process(*same[:-2], "opencv"), "Unknown backend 'opencv'")


def test_another_precision_alone_leaves_the_provider(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Mock(side_effect=BackendError("Enough.", ""))
    monkeypatch.setattr(se, "profile_bundle", asked)
    for named, provider in ((("compute_precision", "fp16"), "cuda"), (("backend", "openvino"), "cpu")):
        line = (bundle, "--against", bundle, "--provider", "cuda", f"--against-{named[0].replace('_', '-')}", named[1])
        with pytest.raises(BackendError, match="Enough"):
            profile.command.main([*map(str, line)], standalone_mode=False)
        assert asked.call_args.kwargs["against_execution"].provider == provider


def test_auto_is_the_first_that_has_the_precision(bundle: Path) -> None:
    for stored, named in (("fp16", "fp32"), *([("fp32", "bf16")] if "BF16" in KNOWN else [])):
        with open_session(reseal(bundle, precision=stored), compute_precision=named) as session:
            assert session.backend == "openvino"
            assert "openvino in" in str(session.description.chosen)


def test_labels_of_a_file_are_what_run_prints(
    tiny_student: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names, export = tmp_path / "names", ("export", tiny_student, "-o", tmp_path / "b", "--labels", tmp_path / "names")
    wrong = {b"car\nbus\n": "2 labels for 10 classes", b"car\n\n": 'labels[1] is ""', b"\xff\n": "labels[0] is"}
    for content, said in wrong.items():
        names.write_bytes(content)
        assert_refused(call(capsys, *export), said)
    names.write_bytes("\ufeff".encode() + b"".join(b"a car, number %d\r\n" % number for number in range(10)))
    assert call(capsys, *export).code == 0
    lines = process("run", tmp_path / "b", "--source", pictures).out.splitlines()
    assert {top["label"][:-1] for line in lines for top in json.loads(line)["top"]} == {"a car, number "}
