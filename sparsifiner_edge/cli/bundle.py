"""`sparsifiner-edge bundle`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparsifiner_edge.cli import common

if TYPE_CHECKING:
    from sparsifiner_edge.runtime.verify import Verification


@click.group()
def command() -> None:
    """Verify a bundle; sign it, so that `run` can refuse what nobody signed."""


@command.command("verify")
@common.bundle_argument
@common.execution_options
@click.option("--public-key", type=common.PATH, help="It must be signed by this key.")
@common.json_option
def verify_command(*, bundle: Path, public_key: Path | None, as_json: bool, **execution: Any) -> None:
    """Check BUNDLE: hashes, signature, manifest against model, and the golden pair. Exit code 1: a check failed."""
    import sparsifiner_edge as se

    result = se.verify_bundle(bundle, se.Execution(**execution), public_key=public_key)
    common.print_result(result, as_json, _print)
    if not result.passed:
        sys.exit(1)


def _print(result: Verification) -> None:
    rows = [[check.name, "ok" if check.passed else "FAILED", check.details] for check in result.checks]
    common.print_table(f"{result.bundle} ({result.hash[:16]})", ["check", "", "found"], rows)
    failed = [check for check in result.checks if not check.passed]
    if failed:
        click.echo(f"error: {len(failed)} of {len(rows)} checks failed.\n  Do not use this bundle.", err=True)


@command.command()
@common.bundle_argument
@click.option("--key", type=common.PATH, required=True, help="Private key, PEM; see keygen.")
@common.json_option
def sign(*, bundle: Path, key: Path, as_json: bool) -> None:
    """Sign BUNDLE as it is: manifest.sig covers the manifest, which holds the hash of every other file."""
    from sparsifiner_edge.artifacts import SIGNATURE_FILE
    from sparsifiner_edge.bundle.sign import sign_bundle

    result = sign_bundle(bundle, key)
    common.print_result(
        result, as_json, lambda _: click.echo(f"{bundle / SIGNATURE_FILE}: signed by the key {result.key[:16]}")
    )


@command.command()
@common.output_option("Private key to write: KEY.pem.")
@common.json_option
def keygen(*, output: Path, as_json: bool) -> None:
    """Make a key pair: KEY.pem, which only you may read, and KEY.pub, which may go to every device."""
    from sparsifiner_edge.bundle.sign import generate_key

    public, fingerprint = generate_key(output)
    if as_json:
        common.print_json({"private": str(output), "public": str(public), "key": fingerprint})
    else:
        click.echo(f"{output}: keep it secret.\n{public}: for those who check; key {fingerprint[:16]}")
