"""`sparsifiner-edge doctor`."""

from __future__ import annotations

import click
import msgspec

from sparsifiner_edge import doctor
from sparsifiner_edge.cli import common
from sparsifiner_edge.records import Unavailable


@click.command()
@common.json_option
def command(as_json: bool) -> None:
    """Say what is installed, what works, and what to do about the rest."""
    findings = doctor.examine()
    if as_json:
        common.print_json(msgspec.to_builtins(findings))
        return
    common.print_table("Parts", ["part", "available", "version", "remark"], _parts(findings))
    extras = [
        [
            extra if number == 0 else "",
            name,
            _text(version),
            f'pip install "sparsifiner-edge[{extra}]"' if missing else "",
        ]
        for extra, packages in findings.extras.items()
        for number, (name, version) in enumerate(packages.items())
        for missing in [isinstance(version, Unavailable)]
    ]
    common.print_table("Extras", ["extra", "package", "version", "install"], extras)
    fields = msgspec.structs.asdict(findings.machine) | {"python": findings.environment.python}
    fields |= findings.environment.packages | findings.environment.variables
    common.print_table("Machine", ["what", "value"], [[name, _text(value)] for name, value in fields.items()])
    for warning in findings.warnings:
        click.echo(f"warning: {warning}")


def _text(value: object) -> str:
    return value.why if isinstance(value, Unavailable) else str(value)


def _parts(findings: doctor.Findings) -> list[list[str]]:
    rows = [
        [name, "yes" if state.available else "no", _text(state.version), state.reason]
        for name, state in (*findings.backends.items(), ("triton", findings.triton))
    ]
    device, missing, support = findings.cuda, findings.decoding.missing, findings.cuda_support
    jetson = f"Jetson Linux {support.jetson}; " if support.jetson else ""
    rows.append(["CUDA driver", "", _text(support.driver), jetson + support.install])
    known = not isinstance(device, Unavailable)
    named = device.why if isinstance(device, Unavailable) else f"{device.name}, {device.compute_capability}"
    rows.append(["CUDA device", "yes" if known else "no", "", named])
    rows.append(["decoding confined", "no" if missing else "yes", "", "; ".join(missing)])
    rows.append(["telemetry", "", "", findings.telemetry["onnxruntime"]])
    available = "yes" if findings.native_library else "no"
    return [*rows, ["native library", available, "", findings.native_library_reason]]
