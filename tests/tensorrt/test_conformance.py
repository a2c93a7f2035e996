"""The code against the real bindings of every TensorRT that it shall run on, without TensorRT.

`tests/fakes/tensorrt_*.json` records names, enums and signatures of the real wheels (`record_tensorrt.py`). Every
name that `runtime/tensorrt/` takes from the module or calls on an object of it must be in every version, or be
listed in GUARDED with the versions that have it.
"""

from __future__ import annotations

import ast
import inspect
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from sparsifiner_edge.runtime.tensorrt import build as tensorrt_build
from sparsifiner_edge.runtime.tensorrt import errors as tensorrt_errors
from tests.fakes import record_tensorrt
from tests.fakes.gpu import Gpu
from tests.fakes.record_tensorrt import VERSIONS, load
from tests.fakes.tensorrt import make_tensorrt

RUNTIME = Path(tensorrt_build.__file__).parent
FILES = sorted(path for path in RUNTIME.glob("*.py") if not path.name.startswith("rtx"))  # another library
MODULES = ("trt", "self._trt", "work.trt")
PLUGIN = "trtp"
"""Variable that holds the module `tensorrt.plugin`, of which the package needs what came with ahead-of-time plugins."""
RECEIVERS = {
    "build.py": {
        "builder": "Builder", "config": "IBuilderConfig", "network": "INetworkDefinition", "parser": "OnnxParser",
        "tensor": "ITensor", "profile": "IOptimizationProfile", "cache": "ITimingCache",
    },
    "errors.py": {"parser": "OnnxParser", "error": "ParserError"},
    "session.py": {"runtime": "Runtime", "self._engine": "ICudaEngine", "self._context": "IExecutionContext"},
}  # fmt: skip
"""File -> variable -> class of TensorRT that it holds there."""
PLUGIN_SINCE = "10.9"
GUARDED = {"QuickPluginCreationRequest": PLUGIN_SINCE}
"""Name that older versions lack -> first version that has it; the code asks with hasattr before."""
EVERY = tuple(VERSIONS)


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def uses(source: str) -> list[tuple[str, str, int | None]]:
    """(receiver, dotted name, number of positional arguments or None where it is not called) of every attribute."""
    tree = ast.parse(source)
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or id(node) in inner:
            continue
        chain = ast.unparse(node).split(".")
        if not all(part.isidentifier() for part in chain):
            continue  # A member of a call's result; the call itself is found by its own.
        call = calls.get(id(node))
        count = None if call is None or any(isinstance(a, ast.Starred) for a in call.args) else len(call.args)
        for split in range(1, len(chain)):
            found.append((".".join(chain[:split]), ".".join(chain[split:]), count))
    return found


def problem(surface: dict[str, Any], kind: str | None, name: str, arguments: int | None) -> str | None:
    """Why a version has not what is used: of the module (kind None) or of an object of class `kind`."""
    first, _, rest = name.partition(".")
    if kind is None:
        if first in surface["enums"]:
            member = rest.partition(".")[0]
            return None if not member or member in surface["enums"][first] else f"{first} has no {member}"
        if first in surface["classes"]:
            member = rest.partition(".")[0]
            if member:
                return None if member in surface["classes"][first] else f"{first} has no {member}"
            return arity(surface["classes"][first]["__init__"], arguments, first)
        known = first in surface["functions"] or first in surface["names"] or first in ("__version__", "__name__")
        return None if known else f"there is no {first}"
    members = surface["classes"][kind]
    return arity(members[first], arguments, f"{kind}.{first}") if first in members else f"{kind} has no {first}"


def arity(signatures: list[str], arguments: int | None, name: str) -> str | None:
    if arguments is None or not signatures:
        return None
    ranges = [parameter_range(text) for text in signatures]
    fits = any(least <= arguments <= most for least, most in ranges)
    return None if fits else f"{name} takes {ranges} arguments, not {arguments}"


def parameter_range(signature: str) -> tuple[int, int]:
    """Least and greatest number of arguments of a recorded signature, self excluded."""
    inside = signature[1 : signature.index(") -> ")]
    depth, parts = 0, [""]
    for character in inside:
        depth += (character in "[(<") - (character in "])>")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    parameters = [p for p in parts if p.strip() and not p.strip().startswith("self:")]
    return sum("=" not in p.partition(":")[2] for p in parameters), len(parameters)


def problems(file: str, source: str, version: str) -> list[str]:
    receivers: dict[str, str | None] = dict.fromkeys(MODULES) | RECEIVERS.get(file, {})
    surface = load(version)
    found = []
    for receiver, name, arguments in uses(source):
        if receiver == PLUGIN and numbers(version) >= numbers(PLUGIN_SINCE) and name not in surface["plugin"]:
            found.append(f"{file}: tensorrt.plugin has no {name} in {version}")
        if receiver not in receivers:
            continue
        since = GUARDED.get(name.partition(".")[0])
        if since and numbers(version) < numbers(since):
            continue
        if reason := problem(surface, receivers[receiver], name, arguments):
            found.append(f"{file}: {receiver}.{name}: {reason} in {version}")
    return found


@pytest.mark.parametrize("version", EVERY)
@pytest.mark.parametrize("file", [path.name for path in FILES])
def test_every_name_is_in_every_version(file, version):
    assert problems(file, (RUNTIME / file).read_text(), version) == []


@pytest.mark.parametrize(
    ("line", "missing_in"),
    [
        ("trt.BuilderFlag.FP16", ("11.4",)),
        ("trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED", ()),
        ("network.add_attention(a, b, c, d, e)", ("10.3", "10.7", "10.9")),
        ("config.set_timing_cache(a)", EVERY),
        ("trt.NoSuchName(1)", EVERY),
        ("trtp.no_such_name", ("10.9", "10.16", "11.4")),
    ],
)
def test_the_check_sees_what_versions_lack(line, missing_in):
    found = [version for version in EVERY if problems("build.py", line, version)]
    assert tuple(found) == missing_in


def test_what_is_used_of_the_plugin_module_is_new_in_the_version_asked_for():
    used = {name for receiver, name, _ in uses((RUNTIME / "plugin.py").read_text()) if receiver == PLUGIN}
    assert {"register", "aot_impl", "KernelLaunchParams", "TensorDesc"} <= used
    for version in EVERY:
        has = used <= load(version)["plugin"].keys()
        assert has == (numbers(version) >= numbers(PLUGIN_SINCE)), version


@pytest.mark.parametrize("version", EVERY)
def test_what_tensorrt_calls_has_its_parameters(version):
    """Methods that are overridden take the arguments that the bindings pass."""
    trt = make_tensorrt(version, Gpu())
    surface = load(version)["classes"]
    made = {
        "ILogger": tensorrt_errors.make_logger(trt, tensorrt_errors.Messages()),
    }
    for kind, instance in made.items():
        for name, signatures in surface[kind].items():
            if signatures and name != "__init__":
                given = len(inspect.signature(getattr(instance, name)).parameters)
                assert parameter_range(signatures[0]) == (given, given), (kind, name)


@pytest.mark.skipif(shutil.which("gcc") is None and shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="the wheels are for x86-64 Linux")
@pytest.mark.parametrize("version", ["10.3", "11.4"])
def test_the_record_is_that_of_the_real_wheel(version, tmp_path):
    """Downloads the wheel (1.3 MB) and reads its surface again."""
    try:
        again = record_tensorrt.record(VERSIONS[version], tmp_path)
    except OSError as error:
        pytest.skip(f"the wheel cannot be downloaded for this Python: {error}")
    recorded = load(version)
    assert again["enums"] == recorded["enums"]
    assert {k: set(v) for k, v in again["classes"].items()} == {k: set(v) for k, v in recorded["classes"].items()}
    assert again["plugin"].keys() == recorded["plugin"].keys()
    if sys.version_info[:2] == (3, 11):  # pybind11 words types otherwise for other Pythons.
        assert again == recorded
