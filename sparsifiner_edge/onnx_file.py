"""Reader for untrusted ONNX files, which must be self-contained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sparsifiner_edge.errors import ArtifactError


def read_model(content: bytes, origin: object) -> Any:
    """Read a self-contained ONNX file as onnx's ModelProto.

    A model may name other files: weights (external data) or a compiled context (EPContext). No hash or signature of the
    model covers those, and ONNX Runtime would read any file that is named there.

    Args:
        content: Content of the file.
        origin: Source of the file, for messages.

    Raises:
        ArtifactError: The content is not an ONNX file, or it needs another file.
    """
    import onnx

    try:
        model = onnx.load_from_string(content)
    except Exception as error:  # Error of any protobuf implementation.
        raise ArtifactError(f"{origin} is not an ONNX file: {error}.", "Export the bundle again.") from error
    for message in _messages(model):
        if isinstance(message, onnx.TensorProto) and (
            message.data_location == message.EXTERNAL or message.external_data
        ):
            named = {entry.key: entry.value for entry in message.external_data}
            raise ArtifactError(
                f"{origin} keeps {message.name!r} in another file, {named.get('location', '')!r}.",
                "Do not use it, or export it again: a bundle's model holds all of its weights.",
            )
        if isinstance(message, onnx.NodeProto) and message.op_type == "EPContext":
            raise ArtifactError(f"{origin} has a node {message.name!r} that names other files.", "Do not use it.")
    return model


def _messages(message: Any) -> Iterator[Any]:
    """Yield a model and every message in it, so that no list of places can go out of date.

    Tensors hold no such messages, and looking into one would copy its content.
    """
    import onnx

    waiting = [message]
    while waiting:
        message = waiting.pop()
        yield message
        for field, value in () if isinstance(message, onnx.TensorProto) else message.ListFields():
            if field.message_type is not None:
                waiting += [value] if hasattr(value, "ListFields") else value


def all_nodes(model: Any) -> list[Any]:
    """Return every node of a model, including those of function bodies and subgraphs (If, Loop)."""
    import onnx

    return [message for message in _messages(model) if isinstance(message, onnx.NodeProto)]
