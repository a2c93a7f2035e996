"""Tables of kernels in folders that are no whole bundles."""

from __future__ import annotations

from pathlib import Path

from sparsifiner_edge.artifacts import sha256
from sparsifiner_edge.bundle.kernels import KernelTable, read_table
from sparsifiner_edge.bundle.manifest import BUNDLE_SCHEMA, Manifest
from sparsifiner_edge.bundle.store import Bundle


def bundle_of(folder: Path) -> Bundle:
    """The folder, with a manifest that lists its files."""
    files = {str(p.relative_to(folder)): sha256(p) for p in folder.rglob("*") if p.is_file()}
    return Bundle(folder, Manifest(schema_version=BUNDLE_SCHEMA, files=files))


def table_of(folder: Path, capability: int) -> KernelTable | None:
    return read_table(bundle_of(folder), capability)
