"""The project's CUDA kernels in engines of TensorRT 10.3 to 10.8, such as JetPack 6's: plugins written in Python.

Every launch in a bundle's table is a plugin, by the name that it has there, which holds a digest of its code. An engine
knows plugins by name alone, so they are registered before one is built, and before one is opened. What is recorded of a
run launches them without Python.

Plugins have no fields: bindings of TensorRT 10.3 to 10.13 misread arrays under NumPy 2.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

from sparsifiner_edge.bundle.kernels import NAMESPACE, CompiledLaunch, LaunchTensor, code_file, read_table
from sparsifiner_edge.bundle.store import Bundle
from sparsifiner_edge.errors import BackendError
from sparsifiner_edge.runtime.tensorrt.errors import PLUGIN_FAILURES

TYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int32": "INT32"}
"""Types of launches' tensors, and TensorRT's names of them."""
_VERSION, _PLAIN_SHARED_BYTES = "1", 48 << 10
"""Shared memory of a block for which the driver need not be asked."""
_LOG, _LOG_BYTES, _LOG_LENGTH, _SHARED = 5, 6, 2048, 8
"""CU_JIT_ERROR_LOG_BUFFER, CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES; CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES."""
_lock = threading.Lock()
_registered: dict[str, Any] = {}
"""Creators of this process by name. TensorRT takes each name once, and does not keep them alive."""


def register(trt: Any, bundle: Bundle, capability: int) -> None:
    """Register the plugins of a bundle for a compute capability (times ten).

    Raises:
        BackendError: TensorRT does not take one, or the driver's library cannot be loaded.
        ArtifactError: the bundle's table or code is malformed.
    """
    table, kind = read_table(bundle, capability), _creator_class(trt)
    for name, launch in table.launches.items() if table else ():
        ptx = bundle.read(code_file(capability, name))
        with _lock:
            if name in _registered:
                continue
            creator = kind(name, launch, functools.cache(functools.partial(_load, driver(), launch, ptx)))
            if not trt.get_plugin_registry().register_creator(creator, NAMESPACE):
                what = f"TensorRT {trt.__version__} does not take the plugin {name}."
                raise BackendError(what, "Start the process again; or build with --kernels portable.")
            _registered[name] = creator


@functools.cache
def driver() -> Any:
    """The driver's own library: each of its functions returns a status, and `ctypes` may call it."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise BackendError(f"The driver's library cannot be loaded: {error}.", "Install NVIDIA's driver.") from error


def _call(cuda: Any, action: str, function: str, *arguments: Any, said: Callable[[], str] = str) -> None:
    """said: what the driver wrote of it."""
    status = getattr(cuda, function)(*arguments)
    if status:
        name = ctypes.c_char_p()
        cuda.cuGetErrorName(status, ctypes.byref(name))
        reason = " ".join(f"{(name.value or b'').decode() or status} {said()}".split())
        raise BackendError(f"CUDA failed {action} ({function}): {reason}.", "Build the engine again on this machine.")


def _load(cuda: Any, launch: CompiledLaunch, ptx: bytes) -> ctypes.c_void_p:
    """The function of a launch, in the context of the calling thread. It stays loaded: a process has few."""
    module, function, log = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.create_string_buffer(_LOG_LENGTH)
    options, values = (ctypes.c_int * 2)(_LOG, _LOG_BYTES), (ctypes.c_void_p * 2)(ctypes.addressof(log), _LOG_LENGTH)
    _call(
        cuda,
        f"to load {launch.symbol}",
        "cuModuleLoadDataEx",
        ctypes.byref(module),
        ctypes.c_char_p(ptx),
        2,
        options,
        values,
        said=lambda: log.value.decode("utf-8", "replace"),
    )
    symbol = launch.symbol.encode()
    _call(cuda, f"to find {launch.symbol}", "cuModuleGetFunction", ctypes.byref(function), module, symbol)
    if launch.shared_bytes > _PLAIN_SHARED_BYTES:
        what = f"to give {launch.symbol} {launch.shared_bytes >> 10} KiB of shared memory"
        _call(cuda, what, "cuFuncSetAttribute", function, _SHARED, launch.shared_bytes)
    return function


def _launch(launch: CompiledLaunch, function: Any, batch: int, tensors: Sequence[int], stream: int) -> None:
    """Put a launch into a stream. tensors: addresses, of inputs and then outputs."""
    values = [ctypes.c_void_p(address) for address in tensors]
    parameters = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
    sizes = (*launch.grid, batch, launch.threads, 1, 1, launch.shared_bytes)
    where = ctypes.c_void_p(stream), parameters, None
    _call(driver(), f"to launch {launch.symbol}", "cuLaunchKernel", function, *sizes, *where)


def _launch_class(trt: Any) -> Any:
    """A launch as a plugin: a class that can only be made once TensorRT is imported."""
    # As C++ has them: what is converted on the way lives too short where TensorRT calls on its own.
    none = trt.PluginFieldCollection_(trt.PluginFieldCollection([]))
    parts = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime)

    class Launch(*parts):  # type: ignore[misc]
        """One node. Arguments: function: gives the code, once it is loaded."""

        def __init__(self, name: str, launch: CompiledLaunch, function: Callable[[], Any]) -> None:
            for part in parts:
                part.__init__(self)
            self.launch, self.function = launch, function
            self.plugin_name, self.plugin_version, self.plugin_namespace = name, _VERSION, NAMESPACE
            self.num_outputs = len(launch.outputs)
            self.timing_cache_id = name  # Or each of twelve equal layers is timed.

        def get_capability_interface(self, _kind: Any) -> Any:
            return self

        def get_output_data_types(self, _inputs: Any) -> list[Any]:
            return [_type(trt, tensor) for tensor in self.launch.outputs.values()]

        def get_output_shapes(self, inputs: Any, _shape_inputs: Any, builder: Any) -> list[Any]:
            shapes = []
            for tensor in self.launch.outputs.values():
                shape = trt.DimsExprs(1 + len(tensor.shape))
                shape[0] = inputs[0][0]
                for axis, size in enumerate(tensor.shape, 1):
                    shape[axis] = builder.constant(size)
                shapes.append(shape)
            return shapes

        def supports_format_combination(self, position: int, tensors: Any, _input_count: int) -> bool:
            wanted = [*self.launch.inputs.values(), *self.launch.outputs.values()][position]
            tensor = tensors[position].desc
            return bool(tensor.format == trt.TensorFormat.LINEAR and tensor.type == _type(trt, wanted))

        def configure_plugin(self, inputs: Any, outputs: Any) -> None:
            pass

        def on_shape_change(self, inputs: Any, outputs: Any) -> None:
            pass

        def get_fields_to_serialize(self) -> Any:
            return none

        def attach_to_context(self, _context: Any) -> Any:
            _telling(self.function)  # Code cannot be loaded while a run is recorded.
            return self.clone()

        def clone(self) -> Any:
            return Launch(self.plugin_name, self.launch, self.function)

        def enqueue(self, inputs: Any, _outputs: Any, read: Any, written: Any, _scratch: int, stream: int) -> None:
            batch, tensors = inputs[0].dims[0], [*read, *written]
            _telling(lambda: _launch(self.launch, self.function(), batch, tensors, stream))

    return Launch


def _creator_class(trt: Any) -> Any:
    """What creates one."""
    plugin = _launch_class(trt)

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        def __init__(self, name: str, launch: CompiledLaunch, function: Callable[[], Any]) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_version, self.plugin_namespace = name, _VERSION, NAMESPACE
            self.field_names = trt.PluginFieldCollection([])
            self._of = name, launch, function

        def create_plugin(self, _name: str, _fields: Any, _phase: Any) -> Any:
            return plugin(*self._of)

    return Creator


def _type(trt: Any, tensor: LaunchTensor) -> Any:
    return getattr(trt.DataType, TYPES[tensor.dtype])


def _telling(call: Callable[[], Any]) -> None:
    """Keep why it failed: TensorRT takes the error for its own, and tells a logger of its own."""
    try:
        call()
    except Exception as error:
        PLUGIN_FAILURES.append(error.what if isinstance(error, BackendError) else repr(error))
        raise
