"""Tests of wheels from `make wheels` without a compiler: on this machine, and on emulated AArch64."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.repository import ROOT

pytestmark = [pytest.mark.everything, pytest.mark.long]
AARCH64 = Path(sys.prefix) / "aarch64"
"""Folder where `make aarch64` unpacks a Python."""
MOST_BYTES = 4 << 20
TAGS = ("manylinux2014", "manylinux_2_26", "manylinux_2_27", "manylinux_2_28")
"""Platform tags accepted by a system with glibc 2.28."""


def runs(*words: object, path: str | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command; path: the only folder where it finds programs."""
    environment = {"HOME": "/nowhere", "PATH": path or "/usr/bin:/bin", **variables}
    line = [str(word) for word in words]
    # Not in the repository, where Python would find this package without its libraries.
    done = subprocess.run(line, capture_output=True, text=True, cwd="/", env=environment, check=False)
    assert done.returncode == 0, f"{' '.join(line)}\n{done.stdout}\n{done.stderr}"
    return done


def wheel_of(machine: str, folder: Path) -> Path:
    command = [sys.executable, ROOT / "runtime/native/wheels.py", "--machine", machine, "-o", folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    assert wheel.stat().st_size < MOST_BYTES
    tag = re.fullmatch(rf"sparsifiner_edge-[0-9.]+-py3-none-manylinux_2_(\d+)_{machine}\.whl", wheel.name)
    assert tag is not None, wheel.name
    assert int(tag[1]) <= 28
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheel_of("x86_64", tmp_path_factory.mktemp("wheel"))


def pythons() -> list[str]:
    """Return one Python of each installed version."""
    folders = [Path(sys.base_prefix) / "bin", Path("/usr/bin"), *(Path.home() / ".pyenv/versions").glob("3.*/bin")]
    found: dict[str, Path] = {}
    for folder in folders:
        found |= {path.name[6:]: path for path in folder.glob("python3.1[0-9]")}
    return [str(path) for path in found.values() if path.exists()]


@pytest.mark.parametrize("python", pythons())
def test_it_installs_without_a_compiler(
    wheel: Path, python: str, tiny_bundle: Path, pictures: Path, tmp_path: Path
) -> None:
    if subprocess.run([python, "-c", "import ensurepip, venv"], check=False).returncode != 0:
        pytest.skip(f"{python} has no venv")
    subprocess.run([python, "-m", "venv", tmp_path / "venv"], check=True)
    programs = str(tmp_path / "venv/bin")
    pip = [f"{programs}/python", "-m", "pip", "install", "-q", "--only-binary=:all:", f"{wheel}[cpu,openvino]"]
    subprocess.run(pip, check=True)
    edge = f"{programs}/sparsifiner-edge"
    found = json.loads(runs(edge, "doctor", "--json", path=programs).stdout)
    assert found["native_library"].startswith(str(tmp_path))
    runs(edge, "bundle", "verify", tiny_bundle, path=programs)
    for backend in ("onnxruntime", "openvino"):
        ask = "import sys, sparsifiner_edge as se; print(se.open_session(*sys.argv[1:]).description.kernels)"
        kernels = runs(f"{programs}/python", "-c", ask, tiny_bundle, backend, path=programs).stdout
        assert kernels.startswith("native")
        assert "called from Python" not in kernels, "OpenVINO's own operators are in the wheel"
    output = tmp_path / "answers.jsonl"
    runs(edge, "run", tiny_bundle, "--source", pictures, "--output", output, path=programs)
    assert len(output.read_text().splitlines()) == len(list(pictures.iterdir()))


@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64") and (AARCH64 / "python").is_dir()),
    reason="no AArch64 compiler, emulator or Python: `make aarch64` installs them (root, Debian)",
)
def test_it_runs_on_aarch64(tiny_bundle: Path, tmp_path: Path) -> None:
    wheel, site, root = wheel_of("aarch64", tmp_path), tmp_path / "site", AARCH64 / "python"
    (python,) = (root / "usr/bin").glob("python3.1[0-9]")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--target", site, "--only-binary=:all:", "--implementation=cp"]
    pip += [f"--python-version={python.name[6:]}", *(f"--platform={tag}_aarch64" for tag in TAGS), f"{wheel}[cpu]"]
    subprocess.run(pip, check=True)
    edge = ["qemu-aarch64", "-cpu", "max", "-L", root, python, "-m", "sparsifiner_edge"]
    found = json.loads(runs(*edge, "doctor", "--json", PYTHONPATH=str(site)).stdout)
    assert found["machine"]["architecture"] == "aarch64"
    assert found["native_library"].startswith(str(site))
    assert "NEON" in found["native_library_reason"]
    said = runs(*edge, "bundle", "verify", tiny_bundle, PYTHONPATH=str(site), COLUMNS="200").stdout
    assert re.search(r"golden pair .* ok .*onnxruntime", said)


def test_uv_locks_all_extras_and_refuses_two_onnxruntimes(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    uv = [Path(sys.prefix) / "bin/uv", "--project", tmp_path, "--quiet"]
    subprocess.run([*uv, "lock"], check=True)
    for extras, fits in ((("cpu", "openvino"), True), (("cpu", "gpu"), False), (("gpu-cu13", "tensorrt"), False)):
        words = [*uv, "sync", "--dry-run", "--no-install-project", *(f"--extra={extra}" for extra in extras)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert (done.returncode == 0) == fits, done.stderr
        assert fits or "incompatible" in done.stderr
