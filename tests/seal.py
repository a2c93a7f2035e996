"""Manifests that say whatever a test wants, with hashes that match."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sparsifiner_edge.artifacts import BUNDLE_FILE, sha256
from sparsifiner_edge.bundle.manifest import BUNDLE_SCHEMA
from sparsifiner_edge.text import dump_json


def seal_bundle(folder: Path, manifest: Mapping[str, object]) -> None:
    """Write `manifest.json` with the SHA-256 of every other file in `folder`."""
    files = {str(p.relative_to(folder)): sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    content = {"schema_version": BUNDLE_SCHEMA, "kind": "bundle", **manifest, "files": files}
    (folder / BUNDLE_FILE).write_text(dump_json(content), encoding="utf-8")
