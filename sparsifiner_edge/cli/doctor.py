"""`sparsifiner-edge doctor`."""

from __future__ import annotations

from typing import Any

import click

from sparsifiner_edge import doctor
from sparsifiner_edge.cli.common import json_option, print_json, print_table


@click.command()
@json_option
def command(as_json: bool) -> None:
    """Say what is installed, what works, and what to do about the rest."""
    findings = doctor.examine()
    if as_json:
        print_json(findings)
        return
    print_table("Backends", ["backend", "available", "version", "remark"], _backend_rows(findings))
    print_table("Extras", ["extra", "package", "version", "install"], _extra_rows(findings["extras"]))
    print_table("Machine", ["what", "value"], _machine_rows(findings))
    for warning in findings["warnings"]:
        click.echo(f"warning: {warning}")


def _text(value: Any) -> str:
    return str(value.get("unavailable", value)) if isinstance(value, dict) else str(value)


def _backend_rows(findings: dict[str, Any]) -> list[list[str]]:
    rows = [
        [name, "yes" if entry["available"] else "no", _text(entry["version"]), entry["reason"]]
        for name, entry in (*findings["backends"].items(), ("triton", findings["triton"]))
    ]
    device = findings["cuda"]
    found = [device.get("name", ""), device.get("compute_capability", "")]
    remark = device.get("unavailable") or f"{found[0]}, compute capability {found[1]}"
    rows.append(["CUDA device", "yes" if all(found) else "no", device.get("driver_version", ""), remark])
    library = findings["native_library"]
    decoding = findings["decoding"]
    rows.append(["decoding confined", "no" if decoding["missing"] else "yes", "", "; ".join(decoding["missing"])])
    rows.append(["telemetry", "", "", findings["telemetry"]["onnxruntime"]])
    return [*rows, ["native library", "yes" if library else "no", "", findings["native_library_reason"]]]


def _extra_rows(extras: dict[str, Any]) -> list[list[str]]:
    if "unavailable" in extras:
        return [["", "", "", extras["unavailable"]]]
    return [
        [
            extra if number == 0 else "",
            package,
            _text(version),
            "" if entry["complete"] or number else entry["install"],
        ]
        for extra, entry in extras.items()
        for number, (package, version) in enumerate(entry["packages"].items())
    ]


def _machine_rows(findings: dict[str, Any]) -> list[list[str]]:
    software = findings["environment"]
    packages = [[name, _text(version)] for name, version in software["packages"].items()]
    variables = [[name, value] for name, value in software["variables"].items()]
    rows = [[name.replace("_", " "), _text(value)] for name, value in findings["machine"].items()]
    return [["python", software["python"]], *packages, *variables, *rows]
