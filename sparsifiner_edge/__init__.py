"""Faster vision transformers at the edge: sparsify, export, measure, run.

One function per command. Each is imported when it is first used, so that a part of the package needs only its own
dependencies.
"""

from __future__ import annotations

import importlib

from sparsifiner_edge.quiet import switch_off_telemetry

TYPE_CHECKING = False
"""True for type checkers. Importing `typing` for this would slow down every start."""
if TYPE_CHECKING:
    from typing import Any

    from sparsifiner_edge.bundle.sign import generate_key as generate_key
    from sparsifiner_edge.bundle.sign import sign_bundle as sign_bundle
    from sparsifiner_edge.camera.fidelity import evaluate_video as evaluate_video
    from sparsifiner_edge.camera.pace import profile_camera as profile_camera
    from sparsifiner_edge.camera.service import RunOptions as RunOptions
    from sparsifiner_edge.camera.service import run as run
    from sparsifiner_edge.camera.service import run_bundle as run_bundle
    from sparsifiner_edge.config import Budget as Budget
    from sparsifiner_edge.config import SparsityConfig as SparsityConfig
    from sparsifiner_edge.distill.distill import TrainingOptions as TrainingOptions
    from sparsifiner_edge.distill.distill import distill_student as distill_student
    from sparsifiner_edge.doctor import examine as examine
    from sparsifiner_edge.errors import SparsifinerError as SparsifinerError
    from sparsifiner_edge.evaluate.evaluate import EvaluationOptions as EvaluationOptions
    from sparsifiner_edge.evaluate.evaluate import evaluate_student as evaluate_student
    from sparsifiner_edge.evaluate.explain import explain_student as explain_student
    from sparsifiner_edge.execution import Execution as Execution
    from sparsifiner_edge.export.export import ExportOptions as ExportOptions
    from sparsifiner_edge.export.export import export_bundle as export_bundle
    from sparsifiner_edge.export.export import export_model as export_model
    from sparsifiner_edge.optimizer.optimize import optimize as optimize
    from sparsifiner_edge.optimizer.request import OptimizeOptions as OptimizeOptions
    from sparsifiner_edge.package import package_bundle as package_bundle
    from sparsifiner_edge.profiles.estimate import estimate_bundle as estimate_bundle
    from sparsifiner_edge.profiles.profile import ProfileOptions as ProfileOptions
    from sparsifiner_edge.profiles.profile import profile_bundle as profile_bundle
    from sparsifiner_edge.report import write_report as write_report
    from sparsifiner_edge.runtime import open_session as open_session
    from sparsifiner_edge.runtime.build import build_engine as build_engine
    from sparsifiner_edge.runtime.verify import verify_bundle as verify_bundle
    from sparsifiner_edge.sparse.in_memory import sparsify_model as sparsify_model
    from sparsifiner_edge.sparse.model_options import ModelOptions as ModelOptions
    from sparsifiner_edge.sparse.patch import restore_model as restore_model
    from sparsifiner_edge.sparse.student import load_student as load_student
    from sparsifiner_edge.sparse.student import size_like as size_like
    from sparsifiner_edge.sparse.student import sparsify as sparsify

switch_off_telemetry()

_HOMES = {
    "Budget": ("config", ""),
    "EvaluationOptions": ("evaluate.evaluate", "train,cpu"),
    "Execution": ("execution", ""),
    "ExportOptions": ("export.export", "train,cpu"),
    "ModelOptions": ("sparse.model_options", ""),
    "ProfileOptions": ("profiles.profile", ""),
    "RunOptions": ("camera.service", ""),
    "OptimizeOptions": ("optimizer.request", "train,cpu"),
    "SparsifinerError": ("errors", ""),
    "SparsityConfig": ("config", ""),
    "TrainingOptions": ("distill.distill", "train"),
    "build_engine": ("runtime.build", ""),
    "distill_student": ("distill.distill", "train"),
    "estimate_bundle": ("profiles.estimate", ""),
    "evaluate_student": ("evaluate.evaluate", "train,cpu"),
    "evaluate_video": ("camera.fidelity", ""),
    "examine": ("doctor", ""),
    "explain_student": ("evaluate.explain", "train"),
    "export_bundle": ("export.export", "train,cpu"),
    "export_model": ("export.export", "train,cpu"),
    "generate_key": ("bundle.sign", "sign"),
    "load_student": ("sparse.student", "train"),
    "open_session": ("runtime", ""),
    "package_bundle": ("package", ""),
    "profile_bundle": ("profiles.profile", ""),
    "profile_camera": ("camera.pace", ""),
    "restore_model": ("sparse.patch", "train"),
    "run": ("camera.service", ""),
    "run_bundle": ("camera.service", ""),
    "optimize": ("optimizer.optimize", "train,cpu"),
    "sign_bundle": ("bundle.sign", "sign"),
    "size_like": ("sparse.student", "train"),
    "sparsify": ("sparse.student", "train"),
    "sparsify_model": ("sparse.in_memory", "train"),
    "verify_bundle": ("runtime.verify", ""),
    "write_report": ("report", ""),
}
"""Public name -> (module, extras that importing it needs)."""

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("sparsifiner-edge")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, extras = _HOMES[name]
    try:
        return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    except ModuleNotFoundError as error:
        if not extras or str(error.name).startswith(__name__):
            raise
        from sparsifiner_edge.errors import MissingExtraError

        raise MissingExtraError(str(error.name), extras) from error


def __dir__() -> list[str]:
    return sorted(__all__)
