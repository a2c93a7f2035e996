"""Records the surface of TensorRT's Python bindings: names, members of enums, signatures.

    python -m tests.fakes.record_tensorrt            # downloads the wheels of VERSIONS, writes tensorrt_*.json here

The bindings are real wheels of PyPI. The libraries they link are not there, and nothing of them is called: a stub that
exports the same symbols is enough to import the module and to look at it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
VERSIONS = {"10.3": "10.3.0", "10.7": "10.7.0", "10.9": "10.9.0.34", "10.16": "10.16.1.11", "11.4": "11.4.0.106"}
"""Recorded as -> version of the wheel: JetPack 6; with Python plugins; those ahead of time; the last 10; the newest."""
CLASSES = (
    "Builder", "INetworkDefinition", "IBuilderConfig", "IOptimizationProfile", "ITimingCache", "IHostMemory",
    "OnnxParser", "ParserError", "Runtime", "ICudaEngine", "IExecutionContext", "EngineInspector", "IProgressMonitor",
    "ILogger", "Logger", "ITensor", "ILayer", "IPluginRegistry", "IPluginCreatorV3Quick", "IProfiler", "IPluginV3",
    "KernelLaunchParams", "ISymExprs",
)  # fmt: skip
"""Classes recorded with the members and signatures of their methods; of the others only the name is kept."""
_LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
_SYMBOLS = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getBuilderPluginRegistry",
    "getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins",
)  # fmt: skip


def package(version: str) -> str:
    """The wheel's project: CUDA 12 up to TensorRT 10, CUDA 13 from 11 on."""
    return f"tensorrt-cu{12 if version.startswith('10.') else 13}-bindings"


def download(version: str, folder: Path) -> Path:
    """Unpack the wheel for this Python into `folder`.

    Raises:
        OSError: pip cannot get it.
    """
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    wanted = [f"{package(version)}=={version}", "--no-deps", "--only-binary", ":all:", "--python-version", python]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "-d", folder / "wheel", *wanted],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    if done.returncode:
        raise OSError(done.stderr.strip()[-500:])
    (wheel,) = (folder / "wheel").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "package")
    return folder / "package"


def stub_libraries(major: str, folder: Path) -> Path:
    """Libraries that export what the bindings link, and do nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "stub.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in _SYMBOLS))
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    for library in _LIBRARIES:
        name = f"lib{library}.so.{major}"
        subprocess.run(
            [compiler, "-shared", "-fPIC", "-o", folder / name, source, f"-Wl,-soname,{name}"],
            check=True,
            capture_output=True,
        )
    return folder


def record(version: str, folder: Path) -> dict[str, Any]:
    """The surface of one version, from its real bindings.

    Raises:
        OSError: the wheel cannot be downloaded.
    """
    unpacked = download(version, folder)
    stubs = stub_libraries(version.partition(".")[0], folder / "stubs")
    environment = os.environ | {"LD_LIBRARY_PATH": str(stubs), "PYTHONPATH": str(unpacked), "PYTHONSAFEPATH": ""}
    done = subprocess.run(
        [sys.executable, __file__, "--introspect"], capture_output=True, text=True, check=True, env=environment
    )
    return dict(json.loads(done.stdout))


def introspect() -> dict[str, Any]:
    """The surface of `tensorrt_bindings`, as this process finds it."""
    import tensorrt_bindings as trt

    names = {name: getattr(trt, name) for name in dir(trt) if not name.startswith("_")}
    found: dict[str, Any] = {"version": trt.__version__, "names": [], "enums": {}, "classes": {}, "functions": {}}
    for name, value in sorted(names.items()):
        if isinstance(value, type) and hasattr(value, "__members__"):
            found["enums"][name] = sorted(value.__members__)
        elif isinstance(value, type) and name in CLASSES:
            found["classes"][name] = _members(value)
        elif callable(value) and not isinstance(value, type):
            found["functions"][name] = _signatures(value)
        else:
            found["names"].append(name)
    found["plugin"] = _plugin(trt)
    return found


def _members(kind: type) -> dict[str, Any]:
    """Methods with their signatures, other attributes with an empty list."""
    public = [name for name in dir(kind) if not name.startswith("_") or name == "__init__"]
    return {name: _signatures(getattr(kind, name)) for name in public}


def _signatures(value: Any) -> list[str]:
    """From the first lines of a docstring by pybind11; one per overload, without the module's name."""
    if not callable(value):
        return []
    name = re.escape(getattr(value, "__name__", ""))
    lines = re.findall(rf"^(?:\d+\. )?{name}(\(.*\) -> .*)$", value.__doc__ or "", re.MULTILINE)
    return [
        re.sub(r"\b(tensorrt_bindings\.)?tensorrt\.|\b_?typing\.", "", line) for line in lines if "*args" not in line
    ]


def _plugin(trt: Any) -> dict[str, Any]:
    """Public names of the module `plugin` with its functions' parameters; empty where there is none.

    It imports `tensorrt`, which the wheel of the bindings leaves to another.
    """
    import importlib
    import inspect

    sys.modules["tensorrt"] = trt
    try:
        module = importlib.import_module("tensorrt_bindings.plugin")
    except ModuleNotFoundError:
        return {}
    names = {name: getattr(module, name) for name in module.__all__}
    return {
        name: str(inspect.signature(value)) if inspect.isfunction(value) else ""
        for name, value in sorted(names.items())
    }


def path(name: str) -> Path:
    """Where the surface of a version (a key of `VERSIONS`) is kept."""
    return HERE / f"tensorrt_{name}.json"


def load(name: str) -> dict[str, Any]:
    """A recorded surface."""
    return dict(json.loads(path(name).read_text(encoding="utf-8")))


def text(surface: dict[str, Any]) -> str:
    """A surface as its file holds it: one line per class or enum, so that differences can be read."""
    lines = []
    for key, value in surface.items():
        if isinstance(value, dict):
            inner = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in value.items())
            lines.append(f"{json.dumps(key)}: {{\n{inner}\n}}" if value else f"{json.dumps(key)}: {{}}")
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main() -> None:
    """Record every version of `VERSIONS`."""
    for name, version in VERSIONS.items():
        with tempfile.TemporaryDirectory() as folder:
            path(name).write_text(text(record(version, Path(folder))), encoding="utf-8")
        print(path(name), path(name).stat().st_size)


if __name__ == "__main__":
    if sys.argv[1:] == ["--introspect"]:
        output = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # The bindings' logger prints to standard output.
        json.dump(introspect(), output)
        output.close()
    else:
        main()
