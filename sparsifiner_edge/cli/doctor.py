"""`sparsifiner-edge doctor`."""

from __future__ import annotations

import click
import msgspec

from sparsifiner_edge import doctor
from sparsifiner_edge.cli import common
from sparsifiner_edge.records import Known, Unavailable
from sparsifiner_edge.runtime.cuda.support import CudaSupport


@click.command()
@common.json_option
def command(as_json: bool) -> None:
    """Say what is installed, what works, and what to do about the rest."""
    findings = doctor.examine()
    if as_json:
        common.print_json(msgspec.to_builtins(findings))
        return
    common.print_table("Backends", ["backend", "available", "version", "remark"], _backend_rows(findings))
    common.print_table("Extras", ["extra", "package", "version", "install"], _extra_rows(findings.extras))
    common.print_table("Machine", ["what", "value"], _machine_rows(findings))
    for warning in findings.warnings:
        click.echo(f"warning: {warning}")


def _text(value: object) -> str:
    return value.why if isinstance(value, Unavailable) else str(value)


def _backend_rows(findings: doctor.Findings) -> list[list[str]]:
    rows = [
        [f"  {name}" if inside else backend, "yes" if entry.available else "no", _text(entry.version), entry.reason]
        for backend, state in (*findings.backends.items(), ("triton", findings.triton))
        for inside, (name, entry) in enumerate([(backend, state), *state.options.items()])
    ]
    device, missing, library = findings.cuda, findings.decoding.missing, findings.native_library
    support = findings.cuda_support
    known = not isinstance(support.driver, Unavailable)
    rows.append(
        ["CUDA driver", "yes" if known else "no", _text(support.driver) if known else "", _cuda_remark(support)]
    )
    if isinstance(device, Unavailable):
        rows.append(["CUDA device", "no", "", device.why])
    else:
        remark = f"{device.name}, compute capability {device.compute_capability}"
        rows.append(["CUDA device", "yes", device.driver_version, remark])
    rows.append(["decoding confined", "no" if missing else "yes", "", "; ".join(missing)])
    rows.append(["telemetry", "", "", findings.telemetry["onnxruntime"]])
    return [*rows, ["native library", "yes" if library else "no", "", findings.native_library_reason]]


def _cuda_remark(support: CudaSupport) -> str:
    jetson = f"Jetson Linux {support.jetson}" if support.jetson else ""
    reason = support.driver.why if isinstance(support.driver, Unavailable) else ""
    return "; ".join(part for part in (jetson, reason, support.install) if part)


def _extra_rows(extras: Known[dict[str, doctor.Extra]]) -> list[list[str]]:
    if isinstance(extras, Unavailable):
        return [["", "", "", extras.why]]
    return [
        [
            extra if number == 0 else "",
            package,
            _text(version),
            "" if entry.complete or number else entry.install,
        ]
        for extra, entry in extras.items()
        for number, (package, version) in enumerate(entry.packages.items())
    ]


def _machine_rows(findings: doctor.Findings) -> list[list[str]]:
    software = findings.environment
    packages = [[name, _text(version)] for name, version in software.packages.items()]
    variables = [[name, value] for name, value in software.variables.items()]
    fields = msgspec.structs.asdict(findings.machine)
    rows = [[name.replace("_", " "), _text(value)] for name, value in fields.items()]
    return [["python", software.python], *packages, *variables, *rows]
