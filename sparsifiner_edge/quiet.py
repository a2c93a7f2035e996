"""Telemetry of libraries is switched off before the first of them is imported."""

from __future__ import annotations

import os

NO_TELEMETRY = {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
"""Environment of this process and of all that it starts; a value that the user has set stays."""


def switch_off_telemetry() -> None:
    """In this process, for whatever is imported from now on."""
    for name, value in NO_TELEMETRY.items():
        os.environ.setdefault(name, value)
