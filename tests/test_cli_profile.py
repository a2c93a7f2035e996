import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.plain import read_result
from tests.sensors.curves import wait_for
from tests.tiny import make_bundle


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    return {
        "fast": str(make_bundle(folder / "fast", depth=2, width=256, size=16)),
        "slow": str(make_bundle(folder / "slow", depth=16, width=256, size=16, function=True)),
    }


def profile(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "sparsifiner_edge", "profile", *arguments], capture_output=True, text=True, check=False
    )


def test_json_alone_on_standard_output_and_the_same_in_the_file(tmp_path, bundles):
    path = tmp_path / "result.json"
    arguments = ["--against", bundles["slow"], "--seconds", "0.5", "--json", "-o", str(path)]
    run = profile(bundles["fast"], *arguments)
    assert (run.returncode, run.stderr) == (0, "")
    result = json.loads(run.stdout)
    assert result == read_result(path)
    assert result["kind"] == "comparison"
    assert result["command"][1:3] == ["profile", bundles["fast"]]
    assert result["statistics"]["comparison"]["ratio"]["value"] > 2
    for role in ("subject", "against"):
        assert result["statistics"][role]["layers"]
        assert isinstance(result["statistics"][role]["flags"], list)


def test_the_table_shows_both_and_what_ran(bundles):
    for seconds in ("0.5", "2", "6"):  # a verdict needs independent rounds, which a busy machine gives late
        run = profile(bundles["fast"], "--against", bundles["slow"], "--seconds", seconds, "--threads", "1")
        assert (run.returncode, run.stderr) == (0, "")
        if "too few independent rounds" not in run.stdout:
            break
    for text in ("p50", "p90", "p99", "throughput", "load", "first inference", "peak memory"):
        assert text in run.stdout
    rows = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in run.stdout.splitlines() if "│" in line}
    assert [cell.strip() for cell in rows["kernels"]] == ["none (standard operators)", "function bodies"]
    assert [cell.strip() for cell in rows["threads"]] == ["1", "1"]
    assert rows["backend"][0].strip().startswith("onnxruntime ")
    assert rows["precision"][0].strip() == "fp32"
    assert rows["layers, other, ms"][0].strip().endswith("(100%)")
    assert "fast: too-short: " in run.stdout or float(seconds) > 3
    assert "fast is faster than slow" in run.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is not a folder"),
        (["{fast}", "--backend", "abacus"], "Unknown backend 'abacus'"),
        (["{fast}", "--seconds", "0"], "--seconds"),
        (["{fast}", "--seconds", "0.1", "-o", "{fast}"], "is a folder"),
        (["{altered}"], "does not match its SHA-256"),
    ],
)
def test_bad_use_is_a_message_and_exit_2(tmp_path, bundles, arguments, message):
    altered = make_bundle(tmp_path / "altered")
    (altered / "model.onnx").write_bytes(b"other")
    run = profile(*(a.format(altered=altered, **bundles) for a in arguments))
    assert run.returncode == 2
    assert message in run.stderr
    assert "Traceback" not in run.stderr
    assert run.stdout == ""


def children(pid):
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def test_an_interrupt_ends_the_workers_and_writes_nothing(tmp_path, bundles):
    path = tmp_path / "result.json"
    arguments = [bundles["fast"], "--against", bundles["slow"], "--seconds", "300", "-o", str(path)]
    with subprocess.Popen(
        [sys.executable, "-m", "sparsifiner_edge", "profile", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as run:
        try:
            wait_for(lambda: len(children(run.pid)) == 2)
            workers = children(run.pid)
            os.killpg(run.pid, signal.SIGINT)  # What a terminal does on Ctrl-C.
            _, remarks = run.communicate(timeout=60)
        finally:
            run.kill()
    assert run.returncode == 130
    assert "interrupted" in remarks
    assert "Traceback" not in remarks
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), 10)
    assert not path.exists()
