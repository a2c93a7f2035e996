"""Helpers that write manifests with arbitrary entries and matching hashes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsifiner_edge.artifacts import BUNDLE_FILE, SIGNATURE_FILE, sha256
from sparsifiner_edge.bundle.kernels import KernelTable, read_table
from sparsifiner_edge.bundle.manifest import BUNDLE_SCHEMA, Manifest
from sparsifiner_edge.bundle.store import Bundle
from sparsifiner_edge.text import dump_json


def seal_bundle(folder: Path, manifest: Mapping[str, object]) -> None:
    """Write `manifest.json` with the SHA-256 of every other file in `folder`."""
    files = {str(p.relative_to(folder)): sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    content = {"schema_version": BUNDLE_SCHEMA, "kind": "bundle", **manifest, "files": files}
    (folder / BUNDLE_FILE).write_text(dump_json(content), encoding="utf-8")


def reseal(folder: Path, **changes: Any) -> Path:
    """Rewrite the manifest for the present files, with other entries; keep the signature.

    This is what an attacker who knows the format would do.
    """
    manifest = json.loads((folder / BUNDLE_FILE).read_text()) | changes
    signature = (folder / SIGNATURE_FILE).read_bytes() if (folder / SIGNATURE_FILE).exists() else None
    for name in (BUNDLE_FILE, SIGNATURE_FILE):
        (folder / name).unlink(missing_ok=True)
    seal_bundle(folder, {key: value for key, value in manifest.items() if key != "files"})
    if signature is not None:
        (folder / SIGNATURE_FILE).write_bytes(signature)
    return folder


def bundle_of(folder: Path) -> Bundle:
    """Write a manifest that lists the files of an incomplete bundle."""
    files = {str(p.relative_to(folder)): sha256(p) for p in folder.rglob("*") if p.is_file()}
    return Bundle(folder, Manifest(schema_version=BUNDLE_SCHEMA, files=files))


def table_of(folder: Path, capability: int) -> KernelTable | None:
    return read_table(bundle_of(folder), capability)


def flip(path: Path) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
