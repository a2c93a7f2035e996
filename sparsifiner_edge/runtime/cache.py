"""What is kept between runs outside of bundles: it belongs to a machine, and native code reads it."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The user's own folder for it; it need not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsifiner-edge"
