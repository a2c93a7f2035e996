"""What an operator's schema is made of: tensors, attributes, limits, and how inputs are refused.

Symbols: see `schema`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

AttributeValue = int | float
Attributes = Mapping[str, AttributeValue]
Shapes = Sequence[Sequence[int]]
Checks = list[tuple[bool, str]]
"""What may be wrong, whether it is, and the words for it."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An input or output: its name, allowed element types, axes by symbol, and meaning; stored: its type may be another
    than that of the others.
    """

    name: str
    dtypes: tuple[str, ...]
    axes: tuple[str, ...]
    doc: str
    stored: bool = False


@dataclasses.dataclass(frozen=True)
class Attribute:
    """An attribute: its type, least value, the values that tests visit, and meaning."""

    name: str
    type: type[int] | type[float]
    minimum: float
    tested: tuple[AttributeValue, ...]
    doc: str


@dataclasses.dataclass(frozen=True)
class Operator:
    """One operator of the domain.

    Attributes:
        tolerances: greatest difference from the reference per element type, relative to the range of the output
            (for KeySelect: absolute, of selection scores).
        doc: the computation, in mathematical notation.
        checks: of attributes and sizes by symbol, where the axes of the inputs do not say it all.
    """

    name: str
    inputs: tuple[Tensor, ...]
    attributes: tuple[Attribute, ...]
    output: Tensor
    tolerances: Mapping[str, float]
    doc: str
    checks: Callable[[Attributes, Mapping[str, int]], Checks] = lambda *_: []

    def refusals(self, attributes: Attributes, shapes: Shapes) -> list[str]:
        """Reasons why these attributes and input shapes are not allowed; empty when they are."""
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
        return reasons + [words for wrong, words in self.checks(attributes, sizes) if wrong]

    def sizes(self, attributes: Attributes, shapes: Shapes) -> dict[str, Any]:
        """Sizes by the symbols of the axes, of inputs and output: those that follow from attributes and `qkv`, others
        as the first input has them, at least 1.
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
        """Of inputs that the schema allows; symbolic where theirs are."""
        sizes = self.sizes(attributes, shapes)
        return [sizes[symbol] for symbol in self.output.axes]

    def _attribute_refusals(self, attributes: Attributes) -> list[str]:
        known = {a.name: a for a in self.attributes}
        reasons = [f"{self.name} has no attribute {name!r}" for name in attributes if name not in known]
        for name, attribute in known.items():
            value = attributes.get(name)
            if value is None:
                reasons.append(f"{self.name} needs the attribute {name!r}")
            elif attribute.type is int and not isinstance(value, int):
                reasons.append(f"{name} must be a whole number, got {value!r}")
            elif not value >= attribute.minimum or not math.isfinite(value):
                reasons.append(f"{name} must be finite and at least {attribute.minimum:g}, got {value!r}")
        return reasons


FLOATS = ("float32", "float16", "bfloat16")
QKV = Tensor("qkv", FLOATS, ("B", "N", "3C"), "queries, keys and values of every head, q|k|v along the last axis")
