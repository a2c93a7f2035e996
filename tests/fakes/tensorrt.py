"""A TensorRT that is not there: the names and enums of a recorded version, control flow, and real results.

`tensorrt_builder` and `tensorrt_runtime` hold its classes. A class has no member that the recorded surface lacks, an
enum exactly the recorded ones, so code that uses a name which a version lacks fails here as it would there.
"""

from __future__ import annotations

import dataclasses
import enum
import types
from collections.abc import Mapping
from typing import Any

from tests.fakes.gpu import Gpu
from tests.fakes.record_tensorrt import load
from tests.fakes.tensorrt_builder import builder_classes
from tests.fakes.tensorrt_runtime import numpy_type, runtime_classes


@dataclasses.dataclass
class Behaviour:
    """What goes wrong, and what the fake saw.

    Attributes:
        build: error messages of a build that gives nothing; None builds.
        warnings: what a build warns of.
        refuse: operators that the parser refuses.
        context: error messages when no context can be made.
        enqueue: error messages of a run that fails. recordable: a run may be captured.
        original: evaluated in the place of a model that holds launches of kernels.
        milliseconds: of a run, by the operators in the model: the first that is in it counts.
        seen: what was set on the way, by name.
    """

    build: tuple[str, ...] | None = None
    warnings: tuple[str, ...] = ()
    refuse: tuple[str, ...] = ()
    context: tuple[str, ...] | None = None
    enqueue: tuple[str, ...] | None = None
    recordable: bool = True
    original: bytes = b""
    milliseconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    seen: dict[str, Any] = dataclasses.field(default_factory=dict)


def make_tensorrt(name: str, gpu: Gpu, behaviour: Behaviour | None = None) -> types.ModuleType:
    """A module like `tensorrt` of the recorded version `name`, such as "10.3"."""
    surface = load(name)
    trt = types.ModuleType("tensorrt")
    trt.__version__ = surface["version"]
    for kind, members in surface["enums"].items():
        setattr(trt, kind, enum.IntEnum(kind, {member: number for number, member in enumerate(members)}))
    trt.nptype = numpy_type
    for cls in classes(trt, gpu, behaviour or Behaviour()):
        if cls.__name__ in surface["classes"]:
            known = surface["classes"][cls.__name__]
            for member in [m for m in vars(cls) if not m.startswith("_") and m not in known]:
                delattr(cls, member)
            setattr(trt, cls.__name__, cls)
    return trt


def make_plugin_module(name: str, seen: dict[str, Any]) -> types.ModuleType | None:
    """A module like `tensorrt.plugin` of the recorded version that keeps what is registered, if there is one."""
    known = load(name)["plugin"]
    if not known:
        return None
    plugin = types.ModuleType("tensorrt.plugin")

    def keeper(kind: str) -> Any:
        def decorator(plugin_id: str) -> Any:
            return lambda function: seen.setdefault(kind, {}).update({plugin_id: function})

        return decorator

    for public in known:
        setattr(plugin, public, keeper(public) if public in ("register", "aot_impl") else type(public, (), {}))
    return plugin


def classes(trt: Any, gpu: Gpu, behaviour: Behaviour) -> list[type]:
    """Every class of the fake, with the members of any version."""
    return [*builder_classes(trt, gpu, behaviour), *runtime_classes(trt, gpu, behaviour)]
