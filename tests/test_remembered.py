"""What a bundle remembers of what it is intended for, and what runs it then."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sparsifiner_edge.bundle.manifest import Intended
from sparsifiner_edge.bundle.sign import require_signature, sign_bundle
from sparsifiner_edge.bundle.store import open_bundle, remember_execution
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
    """Two classes, of 8 pixels."""
    return Path(shutil.copytree(once("two classes", lambda folder: plain(folder / "b")) / "b", tmp_path / "bundle"))


def test_a_bundle_remembers_and_a_signature_holds_no_longer(bundle: Path, keys: Path) -> None:
    sign_bundle(bundle, keys / "key.pem")
    before = open_bundle(bundle).manifest.files
    remember_execution(bundle, "onnxruntime")
    remember_execution(bundle, "openvino", "bf16")
    assert open_bundle(bundle).manifest.intended == Intended("openvino", "bf16")
    assert open_bundle(bundle).manifest.files == before
    with pytest.raises(ArtifactError, match="was changed after it was signed"):
        require_signature(bundle, keys / "key.pub")
    kept = snapshot(bundle)
    for wrong in (("openvino", "int1"), ("../evil", "auto"), ("", "auto"), ("a" * 65, "auto")):
        with pytest.raises(ConfigError, match=r"Intended: (backend|precision) is"):
            remember_execution(bundle, *wrong)
    assert snapshot(bundle) == kept


def chosen(folder: Path, **asked: str) -> tuple[str, str, str | None]:
    """Backend and precision that were resolved, and what the session says of why."""
    with open_session(folder, **asked) as session:
        resolved, _ = choose_execution(open_bundle(folder), Execution(**asked))
        assert session.backend == resolved.backend
        return resolved.backend, resolved.precision, session.description.chosen


def test_what_the_manifest_names_runs_unless_a_caller_names_another(bundle: Path) -> None:
    assert chosen(bundle) == ("onnxruntime", "auto", None)
    remember_execution(bundle, "openvino")
    assert chosen(bundle) == ("openvino", "auto", "openvino runs this bundle, which is intended for it.")
    assert chosen(bundle, backend="onnxruntime") == ("onnxruntime", "auto", None)
    assert chosen(bundle, precision="fp32")[:2] == ("openvino", "fp32")
    with pytest.raises(BackendError, match="precision is 'int1'"):
        open_session(bundle, precision="int1")


def test_a_precision_is_remembered_with_its_backend_and_never_lowered(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino, "import_openvino", without_bf16)
    remember_execution(bundle, "openvino", "bf16")
    found = "openvino runs this bundle, which is intended for openvino in bf16: "
    assert chosen(bundle) == ("openvino", "auto", found + "This processor has no bf16.")
    assert chosen(bundle, backend="openvino") == ("openvino", "auto", found + "This processor has no bf16.")
    assert chosen(bundle, backend="onnxruntime") == ("onnxruntime", "auto", None)
    with pytest.raises(BackendError, match=r"This processor has no bf16"):
        open_session(bundle, backend="openvino", precision="bf16")
    monkeypatch.undo()
    if "BF16" in KNOWN:
        assert chosen(bundle, backend="openvino")[:2] == ("openvino", "bf16")
        assert chosen(bundle)[:2] == ("openvino", "bf16")


def without_bf16(precision: str = "auto") -> Any:
    if precision == "bf16":
        raise BackendError("This processor has no bf16.", "Leave --precision out.")
    return import_openvino(precision)


@pytest.mark.parametrize(("name", "reason"), [("tensorrt-rtx", r": .* (no engine|not installed).*"), ("sys", r"\.")])
def test_what_cannot_run_here_is_said_and_no_bundle_names_code(name: str, reason: str, bundle: Path) -> None:
    reseal(bundle, intended={"backend": name})
    backend, _, why = chosen(bundle)
    assert backend == "onnxruntime"
    assert re.fullmatch(f"onnxruntime runs this bundle, which is intended for {name}{reason}", str(why))


BLOCKED = "import sys; sys.modules['openvino'] = None; from sparsifiner_edge.cli.main import main; main(sys.argv[1:])"


def test_every_command_says_once_what_runs_in_place_of_what_is_not_installed(bundle: Path, pictures: Path) -> None:
    remember_execution(bundle, "openvino")
    commands = {
        ("run", bundle, "--source", pictures): 1,
        ("run", bundle, "--source", "test", "--frames", 2): 1,
        ("bundle", "verify", bundle, "--json"): 1,
        ("evaluate", bundle, "--against", bundle, "--data", pictures): 2,  # By role.
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
    assert re.search(r"; they differ in .*backend \(openvino .* beside onnxruntime ", printed)
    same = ("profile", bundle, "--against", bundle, *short, "--against-backend", "onnxruntime", "--json")
    result = json.loads(process(*same).out)
    runtimes = [result["method"]["runtime"][role] for role in ("subject", "against")]
    assert [runtime["backend"] for runtime in runtimes] == ["openvino", "onnxruntime"]
    assert isinstance(result["statistics"]["subject"]["layers"], dict)
    assert isinstance(result["statistics"]["against"]["layers"], list)
    assert_refused(process("profile", bundle, "--against-backend", "onnxruntime"), "It is compared with none")
    assert_refused(process(*same[:-2], "opencv"), "Unknown backend 'opencv'")


def test_labels_of_a_file_are_what_run_prints(
    tiny_student: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names, export = tmp_path / "names", ("export", tiny_student, "-o", tmp_path / "b", "--labels", tmp_path / "names")
    for content, said in (
        (b"car\nbus\n", "2 labels for 10 classes. Give one name for each class"),
        (b"car\n\n", 'labels[1] is ""'),
        (b"\xff\n", "labels[0] is"),
    ):
        names.write_bytes(content)
        assert_refused(call(capsys, *export), said)
    names.write_bytes("\ufeff".encode() + b"".join(b"a car, number %d\r\n" % number for number in range(10)))
    assert call(capsys, *export).code == 0
    lines = process("run", tmp_path / "b", "--source", pictures).out.splitlines()
    assert {top["label"][:-1] for line in lines for top in json.loads(line)["top"]} == {"a car, number "}
