"""Public functions with flat keyword options, as on the command line; see `cli.common.group`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sparsifiner_edge as se
from sparsifiner_edge.cli.common import group


def _flat(function: str, **kinds: str) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        if "execution" in kinds and len(arguments) > 1 and function != "evaluate_student":
            subject, backend = arguments
            assert "backend" not in options
            options, arguments = {"backend": backend, **options}, (subject,)
        groups = group(options, **{name: getattr(se, kind) for name, kind in kinds.items()})
        return getattr(se, function)(*arguments, **groups)

    return call


_MODEL = {"model": "ModelOptions"}
distill_student = _flat("distill_student", **_MODEL, options="TrainingOptions")
evaluate_student = _flat(
    "evaluate_student", **_MODEL, budget="Budget", execution="Execution", options="EvaluationOptions"
)
export_bundle = _flat("export_bundle", **_MODEL, budget="Budget", options="ExportOptions")
export_model = _flat("export_model", options="ExportOptions")
load_student = _flat("load_student", budget="Budget")
open_session = _flat("open_session", execution="Execution")
profile_bundle = _flat("profile_bundle", execution="Execution", options="ProfileOptions")
optimize = _flat("optimize", **_MODEL, options="OptimizeOptions")
verify_bundle = _flat("verify_bundle", execution="Execution")
