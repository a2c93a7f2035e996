"""What an operator's schema is made of: tensors, attributes, limits, and how inputs are refused.

Symbols: see `schema`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

AttributeValue = int | float
Attributes = Mapping[str, AttributeValue]
Shapes = Sequence[Sequence[int]]


class Sizes(NamedTuple):
    """What follows from the shape of `qkv`: N, P, and d."""

    tokens: int
    patches: int
    width: int


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An input or output: its name, allowed element types, axes by symbol, and meaning."""

    name: str
    dtypes: tuple[str, ...]
    axes: tuple[str, ...]
    doc: str


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
        check: reasons of its own why attributes and shapes do not go together; see `refusals`.
    """

    name: str
    inputs: tuple[Tensor, ...]
    attributes: tuple[Attribute, ...]
    output: Tensor
    tolerances: Mapping[str, float]
    doc: str
    check: Callable[[Attributes, Shapes, Sizes], list[str]] = lambda *_: []

    def refusals(self, attributes: Attributes, shapes: Shapes) -> list[str]:
        """Reasons why these attributes and input shapes are not allowed; empty when they are."""
        reasons = _attribute_refusals(self, attributes)
        if reasons:
            return reasons
        if len(shapes) != len(self.inputs):
            return [f"{self.name} takes {len(self.inputs)} inputs, got {len(shapes)}"]
        for tensor, shape in zip(self.inputs, shapes, strict=True):
            if len(shape) != len(tensor.axes):
                reasons.append(f"{tensor.name} must have axes {list(tensor.axes)}, got shape {list(shape)}")
        return reasons or self._size_refusals(attributes, shapes)

    def _size_refusals(self, attributes: Attributes, shapes: Shapes) -> list[str]:
        if self.inputs[0] is not QKV:
            return self.check(attributes, shapes, Sizes(shapes[0][1], shapes[0][1], shapes[0][2]))
        _, tokens, packed = shapes[0]
        heads, prefix = int(attributes["num_heads"]), int(attributes.get("num_prefix", 0))
        if packed % (3 * heads):
            return [f"qkv's last axis {packed} is not a multiple of 3 x num_heads = {3 * heads}"]
        if tokens <= prefix:
            return [f"{tokens} tokens leave no patch after {prefix} prefix tokens"]
        return self.check(attributes, shapes, Sizes(tokens, tokens - prefix, packed // (3 * heads)))


def _attribute_refusals(op: Operator, attributes: Attributes) -> list[str]:
    known = {a.name: a for a in op.attributes}
    reasons = [f"{op.name} has no attribute {name!r}" for name in attributes if name not in known]
    for name, attribute in known.items():
        value = attributes.get(name)
        if value is None:
            reasons.append(f"{op.name} needs the attribute {name!r}")
        elif attribute.type is int and not isinstance(value, int):
            reasons.append(f"{name} must be a whole number, got {value!r}")
        elif not value >= attribute.minimum or not math.isfinite(value):
            reasons.append(f"{name} must be finite and at least {attribute.minimum:g}, got {value!r}")
    return reasons


FLOATS = ("float32", "float16", "bfloat16")
QKV = Tensor("qkv", FLOATS, ("B", "N", "3C"), "queries, keys and values of every head, q|k|v along the last axis")
