import importlib.metadata
import json
import subprocess
import sys

import onnxruntime

from sparsifiner_edge import doctor
from sparsifiner_edge.ops import native


def command(*arguments, before=""):
    code = f"import sys\n{before}\nfrom sparsifiner_edge.cli.main import main\nmain(sys.argv[1:])"
    return subprocess.run(
        [sys.executable, "-c", code, "doctor", *arguments], capture_output=True, text=True, check=False
    )


def distribution(folder, name, version="1.2.3", requires=()):
    """A package's metadata as pip leaves it, and nothing else of it."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {r}" for r in requires),
    ]
    (info / "METADATA").write_text("\n".join(lines) + "\n")


def test_json_holds_every_backend():
    run = command("--json")
    assert (run.returncode, run.stderr) == (0, "")
    found = json.loads(run.stdout)
    assert found["native_library"].endswith(".so")
    assert "loads, and uses" in found["native_library_reason"]
    assert set(found["backends"]) == {"onnxruntime", "tensorrt", "tensorrt-rtx"}
    ready = found["backends"]["onnxruntime"]
    assert ready["available"]
    assert ready["version"] == onnxruntime.__version__
    assert "CPUExecutionProvider" in ready["reason"]
    for name in ("tensorrt", "tensorrt-rtx"):
        assert not found["backends"][name]["available"]
        assert "not supported by this version" in found["backends"][name]["reason"]


def test_tables_are_for_people():
    run = command()
    assert (run.returncode, run.stderr) == (0, "")
    for text in ("Backends", "Extras", "Machine", "native library", "onnxruntime", "python"):
        assert text in run.stdout


def test_the_tables_hold_pip_commands_with_their_brackets(tmp_path):
    distribution(tmp_path, "sparsifiner-edge", "0.0.1", ['no-such-package; extra == "gpu"'])
    before = f"sys.path.insert(0, {str(tmp_path)!r}); sys.modules['onnxruntime'] = None"
    printed = command(before=before).stdout
    assert 'pip install "sparsifiner-edge[gpu]"' in printed
    assert "sparsifiner-edge[cpu]" in printed


def test_a_bare_environment_is_enough():
    heavy = "('onnxruntime', 'torch', 'timm', 'PIL', 'matplotlib', 'safetensors')"
    run = command("--json", before=f"sys.modules.update(dict.fromkeys({heavy}))")
    assert (run.returncode, run.stderr) == (0, "")
    missing = json.loads(run.stdout)["backends"]["onnxruntime"]
    assert not missing["available"]
    assert 'pip install "sparsifiner-edge[cpu]"' in missing["reason"]
    assert missing["version"]["unavailable"]


def test_a_missing_native_library_says_what_to_install(monkeypatch):
    monkeypatch.setattr(native, "_FILE", "no-such.so")
    found = doctor.examine()
    assert found["native_library"] is None
    assert "libhwy-dev libonnxruntime-dev" in found["native_library_reason"]


def test_an_onnxruntime_that_does_not_import_is_said(tmp_path):
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('libfoo.so is missing')")
    run = command("--json", before=f"sys.path.insert(0, {str(tmp_path)!r})")
    assert run.returncode == 0
    assert "libfoo.so is missing" in json.loads(run.stdout)["backends"]["onnxruntime"]["reason"]


def test_two_packages_of_one_module_are_a_warning(tmp_path, monkeypatch):
    assert doctor.examine()["warnings"] == []
    distribution(tmp_path, "onnxruntime-gpu")
    monkeypatch.syspath_prepend(str(tmp_path))
    (warning,) = doctor.examine()["warnings"]
    assert "onnxruntime and onnxruntime-gpu are both installed" in warning


def test_extras_come_from_the_metadata(tmp_path, monkeypatch):
    requires = (
        "numpy>=1.24",
        'numpy>=1.24; extra == "cpu"',
        'no-such-package>=1; extra == "cpu"',
        'sparsifiner-edge[cpu]; extra == "demo"',
        "rich>=13; python_version >= '3.10' and extra == 'demo'",
    )
    distribution(tmp_path, "sparsifiner-edge", "0.0.1", requires)
    monkeypatch.syspath_prepend(str(tmp_path))
    extras = doctor.examine()["extras"]
    assert set(extras) == {"cpu", "demo"}
    assert list(extras["cpu"]["packages"]) == ["numpy", "no-such-package"]
    assert extras["cpu"]["packages"]["numpy"] == importlib.metadata.version("numpy")
    assert extras["cpu"]["packages"]["no-such-package"] == {"unavailable": "not installed"}
    assert list(extras["demo"]["packages"]) == ["numpy", "no-such-package", "rich"]
    assert not extras["demo"]["complete"]
    assert extras["demo"]["install"] == 'pip install "sparsifiner-edge[demo]"'


def test_an_installed_tensorrt_is_seen_without_importing_it(tmp_path, monkeypatch):
    distribution(tmp_path, "tensorrt", "10.9")
    monkeypatch.syspath_prepend(str(tmp_path))
    entry = doctor.examine()["backends"]["tensorrt"]
    assert not entry["available"]
    assert entry["version"] == "10.9"
    assert "10.9 is installed" in entry["reason"]
    assert "tensorrt" not in sys.modules
