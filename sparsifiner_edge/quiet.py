"""Switches off telemetry of libraries before the first of them is imported."""

from __future__ import annotations

import os

NO_TELEMETRY = {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
"""Environment of this process and its children. Values that the user has set stay."""


def switch_off_telemetry() -> None:
    """Switch off telemetry for everything that this process imports from now on."""
    for name, value in NO_TELEMETRY.items():
        os.environ.setdefault(name, value)
