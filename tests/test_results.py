import json
import platform
import re

import msgspec
import pytest

from sparsifiner_edge import results
from sparsifiner_edge.errors import ArtifactError
from sparsifiner_edge.machine import has_int8_products, jetson_release
from sparsifiner_edge.records import write_record
from tests.plain import environment, machine
from tests.sensors.trees import write_tree

DPKG = "var/lib/dpkg/status"
SUBJECT = results.Subject(path="bundle", sha256="0" * 64)


def a_result(**changes):
    samples, method = {"latency_ms": [1.0, 2.5]}, {"clock": "perf_counter"}
    return msgspec.structs.replace(results.Result("profile", [SUBJECT], method, samples, {"mean_ms": 1.75}), **changes)


def content(**changes):
    return write_record(a_result()) | changes


def test_a_result_survives_the_disk(tmp_path):
    path = tmp_path / "deep" / "result.json"
    result = a_result()
    results.write_result(path, result)
    read = results.read_result(path)
    assert write_record(read) == write_record(result)
    assert read.schema_version == 4
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", read.created)
    results.write_result(path, a_result(kind="evaluation", samples={"auroc": [1.0, None]}))
    assert results.read_result(path).samples == {"auroc": [1.0, None]}


def test_a_missing_or_mistyped_field_is_named_and_so_is_what_is_no_result(tmp_path):
    path = tmp_path / "r.json"
    for field in {*results.Result.__struct_fields__} - {"schema_version"}:
        path.write_text(json.dumps({k: v for k, v in content().items() if k != field}))
        with pytest.raises(ArtifactError, match=f"{path}: {field} is missing"):
            results.read_result(path)
        path.write_text(json.dumps(content(**{field: 3})))
        with pytest.raises(ArtifactError, match=f"{path}: {field} is 3, not"):
            results.read_result(path)
    path.write_text(json.dumps(content(schema_version=2)))
    with pytest.raises(ArtifactError, match=r"schema 2; this version reads only 4"):
        results.read_result(path)
    path.write_text(json.dumps(content())[:-40])
    with pytest.raises(ArtifactError, match="cannot be read"):
        results.read_result(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"created": "yesterday"}, 'created is "yesterday"'),
        ({"subjects": []}, r"subjects is \[\]"),
        ({"subjects": [{"path": "a"}]}, r"subjects\[0\].sha256 is missing"),
        ({"samples": {"latency_ms": [1.0, None]}}, r"samples.latency_ms\[1\] is null"),
        ({"statistics": {"mean_ms": float("nan")}}, "cannot be JSON"),
    ],
)
def test_what_does_not_fit_the_schema_is_not_written(tmp_path, changes, message):
    with pytest.raises(ArtifactError, match=message):
        results.write_result(tmp_path / "r.json", a_result(**changes))
    assert not list(tmp_path.iterdir())


def test_a_board_is_recognised_from_its_tree(tmp_path):
    files = {
        "proc/cpuinfo": "processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd42",
        "proc/meminfo": "MemTotal:        7800000 kB\nMemFree: 1 kB",
        "proc/device-tree/model": "NVIDIA Jetson Orin Nano\0",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "schedutil",
        "etc/os-release": 'NAME="Ubuntu"\nPRETTY_NAME="Ubuntu 22.04.4 LTS"',
    }
    found = machine(write_tree(tmp_path, files))
    assert found["cpu_model"] == "implementer 0x41, part 0xd42"
    assert found["memory_bytes"] == 7800000 * 1024
    assert (found["board"], found["governor"]) == ("NVIDIA Jetson Orin Nano", "schedutil")
    assert found["os"] == "Ubuntu 22.04.4 LTS"
    nothing = machine(tmp_path / "nothing")
    assert all(nothing[name]["unavailable"] for name in ("cpu_model", "memory_bytes", "governor", "board"))


@pytest.mark.parametrize(
    ("name", "text", "release"),
    [
        ("etc/nv_tegra_release", "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic", "36.4.3"),
        (DPKG, "Package: nvidia-l4t-cuda\nVersion: 1\n\nPackage: nvidia-l4t-core\nVersion: 39.2.0-2026\n", "39.2.0"),
        (DPKG, "Package: nvidia-l4t-core\nStatus: deinstall\n\nPackage: zlib1g\nVersion: 9\n", None),
        ("etc/nv_tegra_release", "unknown\n", None),
    ],
)
def test_a_jetsons_release(tmp_path, name, text, release):
    write_tree(tmp_path, {name: text})
    assert jetson_release(tmp_path) == release


@pytest.mark.parametrize(
    ("text", "exact"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512bw", False),
        ("flags\t\t: fpu avx2 avx_vnni", True),
        ("Features\t: fp asimd asimddp", True),
        ("bogomips\t: 1", platform.machine() != "x86_64"),
    ],
)
def test_where_products_of_int8_saturate(tmp_path, text, exact):
    write_tree(tmp_path, {"proc/cpuinfo": f"processor\t: 0\n{text}"})
    assert has_int8_products(tmp_path) == exact


def test_thread_variables_are_recorded_and_others_are_not(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("SOME_TOKEN", "hidden")
    variables = environment()["variables"]
    assert variables["OMP_NUM_THREADS"] == "1"
    assert "SOME_TOKEN" not in variables


def test_a_command_names_no_place_outside(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for given, told in (("tools/x.py", "tools/x.py"), ("../bin/sparsifiner-edge", "sparsifiner-edge")):
        monkeypatch.setattr("sys.argv", [str(tmp_path / given), "-o", "f"])
        assert results.command_line() == [told, "-o", "f"]
