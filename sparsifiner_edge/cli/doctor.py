"""`sparsifiner-edge doctor`."""

from __future__ import annotations

import click
import msgspec

from sparsifiner_edge import doctor
from sparsifiner_edge.cli import common
from sparsifiner_edge.errors import pip_install
from sparsifiner_edge.records import Unavailable


@click.command()
@common.json_option
def command(as_json: bool) -> None:
    """Check what is installed and what works here, and how to fix the rest."""
    findings = doctor.examine()
    if as_json:
        common.print_json(msgspec.to_builtins(findings))
        return
    common.print_table("Parts", ["part", "available", "version", "remark"], _parts(findings))
    extras = []
    for extra, packages in findings.extras.items():
        for number, (name, version) in enumerate(packages.items()):
            install = pip_install(extra) if isinstance(version, Unavailable) else ""
            extras.append([extra if number == 0 else "", name, _text(version), install])
    common.print_table("Extras", ["extra", "package", "version", "install"], extras)
    fields = msgspec.structs.asdict(findings.machine) | {"python": findings.environment.python}
    fields |= findings.environment.packages | findings.environment.variables
    common.print_table("Machine", ["what", "value"], [[name, _text(value)] for name, value in fields.items()])
    for warning in findings.warnings:
        click.echo(f"warning: {warning}")


def _text(value: object) -> str:
    return value.why if isinstance(value, Unavailable) else str(value)


def _parts(findings: doctor.Findings) -> list[list[str]]:
    device, missing, support = findings.cuda, findings.decoding.missing, findings.cuda_support
    named = device.why if isinstance(device, Unavailable) else f"{device.name}, {device.compute_capability}"
    jetson = f"Jetson Linux {support.jetson}; " if support.jetson else ""
    states = {**findings.backends, "triton": findings.triton}
    return [
        *([name, _yes(state.available), _text(state.version), state.reason] for name, state in states.items()),
        ["CUDA driver", "", _text(support.driver), jetson + support.install],
        ["CUDA device", _yes(not isinstance(device, Unavailable)), "", named],
        ["decoding confined", _yes(not missing), "", "; ".join(missing)],
        ["telemetry", "", "", findings.telemetry["onnxruntime"]],
        ["native library", _yes(findings.native_library is not None), "", findings.native_library_reason],
    ]


def _yes(available: bool) -> str:
    return "yes" if available else "no"
