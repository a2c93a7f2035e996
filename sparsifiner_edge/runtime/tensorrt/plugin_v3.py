"""This project's CUDA kernels as plugins in Python, for TensorRT 10.3 to 10.8 such as in JetPack 6.

Every launch in the bundle's kernel table is a plugin of the same name, which contains a digest of the code. An engine
refers to plugins by name only, so they are registered before an engine is built and before it is opened. A recorded run
(CUDA graph) launches the kernels without Python.

The plugins have no fields, because the bindings of TensorRT 10.3 to 10.13 misread arrays under NumPy 2.
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
"""Type of a launch's tensor -> its name in `tensorrt.DataType`."""
_VERSION = "1"
"""Version of the plugins. It never changes, because the name of a plugin contains a digest of its code."""
_PLAIN_SHARED_BYTES = 48 << 10
"""Dynamic shared memory in bytes that a block may use without a request to the driver (48 KiB, CUDA's default)."""
_LOG = 5
"""Value of CU_JIT_ERROR_LOG_BUFFER: the buffer for errors of the PTX compiler."""
_LOG_BYTES = 6
"""Value of CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES: the size of that buffer."""
_LOG_LENGTH = 2048
"""Size of that buffer in bytes, enough for the first errors."""
_SHARED = 8
"""Value of CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES."""
_lock = threading.Lock()
"""Guards `_registered`."""
_registered: dict[str, Any] = {}
"""Plugin creators of this process by name. TensorRT accepts each name once, and does not keep the creators alive."""


def register(trt: Any, bundle: Bundle, capability: int) -> None:
    """Register a bundle's plugins.

    Args:
        trt: Module `tensorrt`.
        bundle: Bundle with the kernels.
        capability: Compute capability times ten, such as 87.

    Raises:
        BackendError: TensorRT rejects a plugin, or the driver library cannot be loaded.
        ArtifactError: The bundle's kernel table or code is malformed.
    """
    table, kind = read_table(bundle, capability), _creator_class(trt)
    for name, launch in table.launches.items() if table else ():
        ptx = bundle.read(code_file(capability, name))
        with _lock:
            if name in _registered:
                continue
            creator = kind(name, launch, functools.cache(functools.partial(_load, driver(), launch, ptx)))
            if not trt.get_plugin_registry().register_creator(creator, NAMESPACE):
                what = f"TensorRT {trt.__version__} rejects the plugin {name}."
                raise BackendError(what, "Restart the process, or build with --kernels portable.")
            _registered[name] = creator


@functools.cache
def driver() -> Any:
    """Load the library of NVIDIA's driver, for calls with `ctypes`; each of its functions returns a status."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise BackendError(f"The driver's library cannot be loaded: {error}.", "Install NVIDIA's driver.") from error


def _call(cuda: Any, action: str, function: str, *arguments: Any, log: Callable[[], str] = str) -> None:
    """Call a function of the driver.

    Args:
        cuda: Library of the driver.
        action: Purpose of the call for messages, such as "to load NAME".
        function: Name of the function.
        arguments: Arguments of the function.
        log: Returns the driver's log of the call, for the message.

    Raises:
        BackendError: The function failed.
    """
    status = getattr(cuda, function)(*arguments)
    if status:
        name = ctypes.c_char_p()
        cuda.cuGetErrorName(status, ctypes.byref(name))
        reason = " ".join(f"{(name.value or b'').decode() or status} {log()}".split())
        raise BackendError(f"CUDA failed {action} ({function}): {reason}.", "Build the engine again on this machine.")


def _load(cuda: Any, launch: CompiledLaunch, ptx: bytes) -> ctypes.c_void_p:
    """Load the kernel of a launch into the context of the calling thread.

    It stays loaded until the process ends, since a process loads few kernels.

    Args:
        cuda: Library of the driver.
        launch: Launch whose kernel to load.
        ptx: Code of the kernel.

    Returns:
        The handle of the kernel.
    """
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
        log=lambda: log.value.decode("utf-8", "replace"),
    )
    symbol = launch.symbol.encode()
    _call(cuda, f"to find {launch.symbol}", "cuModuleGetFunction", ctypes.byref(function), module, symbol)
    if launch.shared_bytes > _PLAIN_SHARED_BYTES:
        what = f"to give {launch.symbol} {launch.shared_bytes >> 10} KiB of shared memory"
        _call(cuda, what, "cuFuncSetAttribute", function, _SHARED, launch.shared_bytes)
    return function


def _launch(launch: CompiledLaunch, function: Any, batch: int, tensors: Sequence[int], stream: int) -> None:
    """Put a launch into a stream.

    Args:
        launch: Grid, block and shared memory.
        function: Handle of the kernel.
        batch: Batch size, the third axis of the grid.
        tensors: Device addresses of the inputs, then of the outputs.
        stream: Handle of the stream.
    """
    values = [ctypes.c_void_p(address) for address in tensors]
    parameters = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
    sizes = (*launch.grid, batch, launch.threads, 1, 1, launch.shared_bytes)
    where = ctypes.c_void_p(stream), parameters, None
    _call(driver(), f"to launch {launch.symbol}", "cuLaunchKernel", function, *sizes, *where)


def _launch_class(trt: Any) -> Any:
    """Return the class of the plugins. It derives from classes of TensorRT, so it is created on demand."""
    # The C++ type: a converted temporary would be freed too early when TensorRT itself calls the method.
    none = trt.PluginFieldCollection_(trt.PluginFieldCollection([]))
    parts = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime)

    class Launch(*parts):  # type: ignore[misc]
        """One launch as a node of the network.

        Args:
            name: Name of the plugin.
            launch: Launch in the bundle's kernel table.
            function: Loads the kernel on the first call, and returns its handle.
        """

        def __init__(self, name: str, launch: CompiledLaunch, function: Callable[[], Any]) -> None:
            for part in parts:
                part.__init__(self)
            self.launch, self.function = launch, function
            self.plugin_name, self.plugin_version, self.plugin_namespace = name, _VERSION, NAMESPACE
            self.num_outputs = len(launch.outputs)
            self.timing_cache_id = name  # Equal layers are timed once, not each on its own.

        def get_capability_interface(self, _kind: Any) -> Any:
            """Return the object itself, which implements all interfaces."""
            return self

        def get_output_data_types(self, _inputs: Any) -> list[Any]:
            """Return the types of the outputs."""
            return [_type(trt, tensor) for tensor in self.launch.outputs.values()]

        def get_output_shapes(self, inputs: Any, _shape_inputs: Any, builder: Any) -> list[Any]:
            """Return the shapes of the outputs; the batch size is that of the first input."""
            shapes = []
            for tensor in self.launch.outputs.values():
                shape = trt.DimsExprs(1 + len(tensor.shape))
                shape[0] = inputs[0][0]
                for axis, size in enumerate(tensor.shape, 1):
                    shape[axis] = builder.constant(size)
                shapes.append(shape)
            return shapes

        def supports_format_combination(self, position: int, tensors: Any, _input_count: int) -> bool:
            """Return True if a tensor has the linear format and the type that the launch expects."""
            wanted = [*self.launch.inputs.values(), *self.launch.outputs.values()][position]
            tensor = tensors[position].desc
            return bool(tensor.format == trt.TensorFormat.LINEAR and tensor.type == _type(trt, wanted))

        def configure_plugin(self, inputs: Any, outputs: Any) -> None:
            """Do nothing: there is nothing to configure."""

        def on_shape_change(self, inputs: Any, outputs: Any) -> None:
            """Do nothing: `enqueue` reads the batch size from its arguments."""

        def get_fields_to_serialize(self) -> Any:
            """Return an empty collection: the plugins have no fields."""
            return none

        def attach_to_context(self, _context: Any) -> Any:
            """Load the kernel, which is impossible while a run is recorded, and return a copy of the plugin."""
            _record_failure(self.function)
            return self.clone()

        def clone(self) -> Any:
            """Return a copy of the plugin."""
            return Launch(self.plugin_name, self.launch, self.function)

        def enqueue(self, inputs: Any, _outputs: Any, read: Any, written: Any, _scratch: int, stream: int) -> None:
            """Launch the kernel on a stream."""
            batch, tensors = inputs[0].dims[0], [*read, *written]
            _record_failure(lambda: _launch(self.launch, self.function(), batch, tensors, stream))

    return Launch


def _creator_class(trt: Any) -> Any:
    """Return the class of the plugin creators. It derives from a class of TensorRT, so it is created on demand."""
    plugin = _launch_class(trt)

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        """Creator of the plugin of one launch. The arguments are those of the plugin."""

        def __init__(self, name: str, launch: CompiledLaunch, function: Callable[[], Any]) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_version, self.plugin_namespace = name, _VERSION, NAMESPACE
            self.field_names = trt.PluginFieldCollection([])
            self._arguments = name, launch, function

        def create_plugin(self, _name: str, _fields: Any, _phase: Any) -> Any:
            """Return a new plugin of the launch."""
            return plugin(*self._arguments)

    return Creator


def _type(trt: Any, tensor: LaunchTensor) -> Any:
    """Return TensorRT's type of a tensor."""
    return getattr(trt.DataType, TYPES[tensor.dtype])


def _record_failure(call: Callable[[], Any]) -> None:
    """Run a function and record its error in `PLUGIN_FAILURES`, since TensorRT reports only an error of its own."""
    try:
        call()
    except Exception as error:
        PLUGIN_FAILURES.append(error.what if isinstance(error, BackendError) else repr(error))
        raise
