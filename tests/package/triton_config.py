"""The part of Triton's ModelConfig (model_config.proto, public) that packages hold, as a real protobuf message.

A config.pbtxt is read into a message: an unknown key, or a value of another type, fails. Numbers of fields matter to
the binary format alone, which is not used; version 2 of the language tells a zero from what is missing.
"""

from __future__ import annotations

import functools
from typing import Any

from google.protobuf import (  # type: ignore[import-untyped,unused-ignore]
    descriptor_pb2,
    descriptor_pool,
    message_factory,
    text_format,
)

from sparsifiner_edge.errors import GateError

_ENUMS = {
    "DataType": ("TYPE_INVALID", "TYPE_BOOL", "TYPE_UINT8", "TYPE_INT8", "TYPE_INT16", "TYPE_INT32", "TYPE_INT64",
                 "TYPE_FP16", "TYPE_FP32", "TYPE_FP64"),
    "Kind": ("KIND_AUTO", "KIND_GPU", "KIND_CPU", "KIND_MODEL"),
}  # fmt: skip
_MESSAGES = {
    "ModelConfig": {
        "name": "string", "platform": "string", "backend": "string", "max_batch_size": "int32", "input": "ModelInput*",
        "output": "ModelOutput*", "instance_group": "ModelInstanceGroup*", "dynamic_batching": "ModelDynamicBatching",
        "model_warmup": "ModelWarmup*", "model_operations": "ModelOperations", "default_model_filename": "string",
        "cc_model_filenames": "TextEntry*", "parameters": "ParameterEntry*",
    },
    "ModelInput": {"name": "string", "data_type": "DataType", "dims": "int64*"},
    "ModelOutput": {"name": "string", "data_type": "DataType", "dims": "int64*", "label_filename": "string"},
    "ModelInstanceGroup": {"name": "string", "kind": "Kind", "count": "int32", "gpus": "int32*"},
    "ModelDynamicBatching": {"preferred_batch_size": "int32*", "max_queue_delay_microseconds": "uint64"},
    "ModelWarmup": {"name": "string", "batch_size": "uint32", "inputs": "WarmupEntry*", "count": "uint32"},
    "WarmupEntry": {"key": "string", "value": "WarmupInput"},
    "WarmupInput": {"data_type": "DataType", "dims": "int64*", "zero_data": "bool", "random_data": "bool",
                    "input_data_file": "string"},
    "ModelOperations": {"op_library_filename": "string*"},
    "TextEntry": {"key": "string", "value": "string"},
    "ParameterEntry": {"key": "string", "value": "Parameter"},
    "Parameter": {"string_value": "string"},
}  # fmt: skip
"""Message -> field -> type; "*" marks lists. Maps are lists of entries, which is how their text looks."""
_NEEDED = ("name", "max_batch_size", "input", "output", "instance_group", "model_warmup")


@functools.cache
def _config_class() -> Any:
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="model_config.proto", package="triton", syntax="proto2")
    for name, values in _ENUMS.items():
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values):
            enum.value.add(name=value, number=number)
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for number, (key, text) in enumerate(fields.items(), 1):
            kind = text.rstrip("*")
            label = field.LABEL_REPEATED if text.endswith("*") else field.LABEL_OPTIONAL
            entry = message.field.add(name=key, number=number, label=label)
            if kind in _MESSAGES:
                entry.type, entry.type_name = field.TYPE_MESSAGE, f".triton.{kind}"
            elif kind in _ENUMS:
                entry.type, entry.type_name = field.TYPE_ENUM, f".triton.{kind}"
            else:
                entry.type = getattr(field, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("triton.ModelConfig"))


def check_config(text: str) -> Any:
    """The message in a config.pbtxt.

    Raises:
        GateError: a key is unknown or missing, or its value of another type.
    """
    try:
        config = text_format.Parse(text, _config_class()())
    except text_format.ParseError as error:
        raise GateError(f"config.pbtxt: {' '.join(str(error).split())}.", "Correct that line.") from error
    present = {entry.name for entry, _ in config.ListFields()}
    missing = [key for key in _NEEDED if key not in present]
    if bool(config.platform) == bool(config.backend):
        missing.append("platform or backend, one of them")
    if missing:
        raise GateError(f"config.pbtxt lacks {', '.join(missing)}.", "Add it.")
    for tensor in (*config.input, *config.output):
        if not tensor.name or not tensor.data_type or not tensor.dims:
            raise GateError(f"config.pbtxt: tensor {tensor.name!r} lacks its type or dims.", "Add them.")
    return config
