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
    """Verify or sign a bundle, or create a key pair."""


@command.command("verify")
@common.bundle_argument
@common.execution_options
@click.option("--public-key", type=common.PATH, help="Public key that must have signed the bundle.")
@common.json_option
def verify_command(*, bundle: Path, public_key: Path | None, as_json: bool, **execution: Any) -> None:
    """Verify the files and the results of BUNDLE.

    This checks hashes, signature, manifest, model and golden pair, and exits with 1 if a check fails.
    """
    import sparsifiner_edge as se

    result = se.verify_bundle(bundle, se.Execution(**execution), public_key=public_key)
    common.print_result(result, as_json, _print)
    if not result.passed:
        sys.exit(1)


def _print(result: Verification) -> None:
    rows = [[check.name, "ok" if check.passed else "FAILED", check.details] for check in result.checks]
    common.print_table(f"{result.bundle} ({result.hash[:16]})", ["check", "", "details"], rows)
    failed = [check for check in result.checks if not check.passed]
    if failed:
        click.echo(f"error: {len(failed)} of {len(rows)} checks failed.\n  Do not use this bundle.", err=True)


@command.command()
@common.bundle_argument
@click.option("--key", type=common.PATH, required=True, help="Private key in PEM format (made by `bundle keygen`).")
@common.json_option
def sign(*, bundle: Path, key: Path, as_json: bool) -> None:
    """Sign all files of BUNDLE.

    The signature manifest.sig covers the manifest, which holds the hash of every other file.
    """
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
    """Create a key pair for signing.

    KEY.pem stays private. KEY.pub goes to every device that verifies bundles.
    """
    from sparsifiner_edge.bundle.sign import generate_key

    public, fingerprint = generate_key(output)
    if as_json:
        common.print_json({"private": str(output), "public": str(public), "key": fingerprint})
    else:
        click.echo(f"{output}: private key, keep it secret.\n{public}: public key {fingerprint[:16]}, for the devices")
