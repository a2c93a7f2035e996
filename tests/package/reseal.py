"""What someone does who alters a bundle and knows its format: hashes match again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparsifiner_edge.artifacts import BUNDLE_FILE, SIGNATURE_FILE
from tests.seal import seal_bundle


def reseal(folder: Path, **changes: Any) -> Path:
    """Write the manifest of a bundle as it now is, with other entries; a signature stays as it was."""
    manifest = json.loads((folder / BUNDLE_FILE).read_text()) | changes
    signature = (folder / SIGNATURE_FILE).read_bytes() if (folder / SIGNATURE_FILE).exists() else None
    for name in (BUNDLE_FILE, SIGNATURE_FILE):
        (folder / name).unlink(missing_ok=True)
    seal_bundle(folder, {key: value for key, value in manifest.items() if key != "files"})
    if signature is not None:
        (folder / SIGNATURE_FILE).write_bytes(signature)
    return folder
