"""The operators of the domain `sparsifiner` inside OpenVINO's CPU plugin: Python ops that call the native library.

OpenVINO's ONNX frontend knows no local functions, but it maps nodes of a foreign domain to ops that are registered with
it, once their bodies are taken out of the file. All other layers run in OpenVINO's own kernels, in whatever precision;
these ops get and give float32, since that is all that the graph hands to an op in Python. OpenVINO's threads wait while
one runs, on threads of the library's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sparsifiner_edge.ops.native.interface import Operators, require_allowed
from sparsifiner_edge.ops.schema import DOMAIN, OPERATORS


def converters(openvino: Any, frontend: Any, names: Sequence[str], operators: Operators) -> list[Any]:
    """An extension for each of the operators named, for `Core.add_extension`.

    Args:
        openvino, frontend: the modules `openvino` and `openvino.frontend.onnx`.
        operators: what runs them; must live as long as what is compiled.
    """
    base = _op_class(openvino, operators)

    def convert(name: str) -> Callable[[Any], Any]:
        attributes = [attribute.name for attribute in OPERATORS[name].attributes]
        # A class each: OpenVINO takes nodes of one class, equal attributes and the same inputs for one node.
        kind = type(name, (base,), {"operator": name})

        def made(node: Any) -> Any:
            given = {attribute: node.get_attribute(attribute) for attribute in attributes}
            return kind([node.get_input(i) for i in range(node.get_input_size())], given).outputs()

        return made

    return [frontend.ConversionExtension(name, DOMAIN, convert(name)) for name in names]


def _op_class(openvino: Any, operators: Operators) -> Any:
    """The op that stands for all of them; the class can only be made once OpenVINO is imported."""

    class SparsifinerOp(openvino.Op):  # type: ignore[misc]
        """One node. Attributes: operator: its name."""

        operator: str

        def __init__(self, inputs: Any, attributes: dict[str, float]) -> None:
            super().__init__(self)
            self.settings = attributes
            self.set_arguments(inputs)
            self.constructor_validate_and_infer_types()

        def validate_and_infer_types(self) -> None:
            """Type and shape of the output; a batch that is open stays open."""
            shapes = [self.get_input_partial_shape(i) for i in range(self.get_input_size())]
            sizes = [[axis.get_length() if axis.is_static else None for axis in shape] for shape in shapes]
            whole = OPERATORS[self.operator].output.dtypes == ("int32",)
            kind = openvino.Type.i32 if whole else openvino.Type.f32
            shape = self.output_axes(sizes)
            axes = [openvino.Dimension() if n is None else openvino.Dimension(n) for n in shape]
            self.set_output_type(0, kind, openvino.PartialShape(axes))

        def output_axes(self, shapes: Any) -> Any:
            require_allowed(self.operator, self.settings, [[1 if n is None else n for n in shape] for shape in shapes])
            return OPERATORS[self.operator].output_shape(self.settings, shapes)

        def clone_with_new_inputs(self, inputs: Any) -> Any:
            return type(self)(inputs, self.settings)

        def visit_attributes(self, visitor: Any) -> bool:
            visitor.on_attributes(dict(self.settings))
            return True

        def has_evaluate(self) -> bool:
            return True

        def evaluate(self, outputs: Any, inputs: Any) -> bool:
            # By index: these lists end an iteration with an exception in C++, tens of microseconds each.
            given = [inputs[i].data for i in range(len(inputs))]
            output = outputs[0]
            output.shape = self.output_axes([x.shape for x in given])
            operators.run(self.operator, self.settings, given, output.data)
            return True

    return SparsifinerOp


def without_bodies(model: Any, names: Sequence[str]) -> Any:
    """A model whose local functions are gone: those of the operators named left out, all others inlined."""
    kept = [function for function in model.functions if not (function.domain == DOMAIN and function.name in names)]
    if not kept:
        del model.functions[:]
        return model
    import onnx.inliner

    left_out = [(function.domain, function.name) for function in model.functions if function not in kept]
    inlined = onnx.inliner.inline_selected_functions(model, left_out, exclude=True)
    del inlined.functions[:]
    return inlined
