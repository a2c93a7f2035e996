"""Building blocks of an operator schema: tensors, attributes, limits and the validation of inputs.

The axis symbols are explained in `schema.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

AttributeValue = int | float
Attributes = Mapping[str, AttributeValue]
"""Attribute values by name."""
Shapes = Sequence[Sequence[int]]
"""Shapes of an operator's inputs, in the order of the schema."""
Checks = list[tuple[bool, str]]
"""Pairs of a flag (True if the check failed) and the error message for that case."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An input or output of an operator.

    Attributes:
        name: Name of the tensor.
        dtypes: Allowed element types.
        axes: Symbol of each axis.
        doc: Description, as a phrase without a final period.
        stored: True if the tensor may have a different element type than the other tensors.
    """

    name: str
    dtypes: tuple[str, ...]
    axes: tuple[str, ...]
    doc: str
    stored: bool = False


@dataclasses.dataclass(frozen=True)
class Attribute:
    """An attribute of an operator.

    Attributes:
        name: Name of the attribute.
        type: `int` or `float`.
        minimum: Smallest allowed value.
        tested: Values that the test matrix covers.
        doc: Description, as a phrase without a final period.
    """

    name: str
    type: type[int] | type[float]
    minimum: float
    tested: tuple[AttributeValue, ...]
    doc: str


@dataclasses.dataclass(frozen=True)
class Operator:
    """One operator of the domain.

    Attributes:
        name: Name of the operator.
        inputs: Inputs, in order.
        attributes: Attributes, in order.
        output: The only output.
        tolerances: Largest allowed difference from the reference per element type, relative to the range of the
            output. For KeySelect it is an absolute difference of selection scores.
        doc: Definition of the computation, in mathematical notation.
        checks: Function of the attributes and of the sizes by symbol. It returns the checks that the axes of the
            inputs cannot express.
    """

    name: str
    inputs: tuple[Tensor, ...]
    attributes: tuple[Attribute, ...]
    output: Tensor
    tolerances: Mapping[str, float]
    doc: str
    checks: Callable[[Attributes, Mapping[str, int]], Checks] = lambda *_: []

    def refusals(self, attributes: Attributes, shapes: Shapes) -> list[str]:
        """Return the reasons why these attributes and input shapes are invalid, or an empty list if they are valid."""
        reasons = self._attribute_refusals(attributes)
        if reasons:
            return reasons
        if len(shapes) != len(self.inputs):
            return [f"{self.name} takes {len(self.inputs)} inputs, got {len(shapes)}"]
        for tensor, shape in zip(self.inputs, shapes, strict=True):
            if len(shape) != len(tensor.axes):
                reasons.append(f"{tensor.name} must have axes {list(tensor.axes)}, got shape {list(shape)}")
        return reasons or self._size_refusals(attributes, shapes)

    def _size_refusals(self, attributes: Attributes, shapes: Shapes) -> list[str]:
        """Return the reasons why the sizes of the axes are invalid."""
        if self.inputs[0] is QKV:
            heads, prefix = attributes["num_heads"], attributes.get("num_prefix", 0)
            _, tokens, packed = shapes[0]
            if packed % (3 * heads):
                return [f"qkv's last axis {packed} is not a multiple of 3 x num_heads = {3 * heads}"]
            if tokens <= prefix:
                return [f"{tokens} tokens leave no patch after {prefix} prefix tokens"]
        sizes = self.sizes(attributes, shapes)
        reasons = [
            f"{tensor.name} must have shape {wanted}, got {list(shape)}"
            for tensor, shape in zip(self.inputs, shapes, strict=True)
            if (wanted := [sizes[symbol] for symbol in tensor.axes]) != list(shape)
        ]
        return reasons + [message for failed, message in self.checks(attributes, sizes) if failed]

    def sizes(self, attributes: Attributes, shapes: Shapes) -> dict[str, Any]:
        """Return the sizes of all axes of inputs and output by symbol.

        Sizes that follow from the attributes and the shape of `qkv` are computed. Any other size is taken from the
        first input that has the symbol, and is at least 1 (except the batch size).
        """
        sizes: dict[str, Any] = {"2": 2}
        if self.inputs[0] is QKV:
            batch, tokens, packed = shapes[0]
            heads, patches = attributes["num_heads"], tokens - attributes.get("num_prefix", 0)
            tiles = math.ceil(patches / attributes.get("tile", 1))
            sizes |= {"B": batch, "N": tokens, "P": patches, "3C": packed, "C": packed // 3, "H": heads, "T": tiles}
            sizes |= {
                "d": packed // (3 * heads),
                "2C": packed // 3 * 2,
                "N-1": tokens - 1,
                "N-merged": tokens - attributes.get("merged", 0),
            }
            sizes |= {"K": attributes["keys"]} if "keys" in attributes else {}
        for tensor, shape in zip(self.inputs, shapes, strict=True):
            for symbol, size in zip(tensor.axes, shape, strict=True):
                sizes.setdefault(symbol, size if symbol == "B" else max(size, 1))
        return sizes

    def output_shape(self, attributes: Attributes, shapes: Shapes) -> list[Any]:
        """Return the shape of the output for valid inputs; sizes are symbolic where those of the inputs are."""
        sizes = self.sizes(attributes, shapes)
        return [sizes[symbol] for symbol in self.output.axes]

    def _attribute_refusals(self, attributes: Attributes) -> list[str]:
        """Return the reasons why the attributes are invalid."""
        known = {a.name: a for a in self.attributes}
        reasons = [f"{self.name} has no attribute {name!r}" for name in attributes if name not in known]
        for name, attribute in known.items():
            value = attributes.get(name)
            if value is None:
                reasons.append(f"{self.name} needs the attribute {name!r}")
            elif attribute.type is int and not isinstance(value, int):
                reasons.append(f"{name} must be an integer, got {value!r}")
            elif not value >= attribute.minimum or not math.isfinite(value):
                reasons.append(f"{name} must be finite and at least {attribute.minimum:g}, got {value!r}")
        return reasons


FLOATS = ("float32", "float16", "bfloat16")
"""Element types of the floating-point tensors."""
QKV = Tensor(
    "qkv",
    FLOATS,
    ("B", "N", "3C"),
    "queries, keys and values of all heads, concatenated along the last axis as q, k, v",
)
"""The packed input of the attention operators. Shapes are validated through it where it is the first input."""
