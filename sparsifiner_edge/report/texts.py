"""The page's words in English and Japanese: `texts/en.json` and `texts/ja.json`, with the same keys."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Sequence
from typing import Any

from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.report.values import Interval, reason, with_interval

LANGUAGES = ("en", "ja")


class Texts:
    """Words of one language: `texts("verdict.faster", subject=..., against=...)`.

    Args:
        language: one of `LANGUAGES`.

    Raises:
        ConfigError: another language.
    """

    def __init__(self, language: str) -> None:
        if language not in LANGUAGES:
            raise ConfigError(f"lang is {language!r}.", f"Choose one of: {', '.join(LANGUAGES)}.")
        self.language = language
        file = importlib.resources.files("sparsifiner_edge.report") / "texts" / f"{language}.json"
        self._texts: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))

    def __call__(self, key: str, **values: object) -> str:
        """The text of `key` with `values` in place of its fields."""
        return self._texts[key].format(**values)

    def known(self, key: str, otherwise: str) -> str:
        """The text of a name that a result holds, or what the result itself says."""
        return self._texts.get(key, otherwise)

    def listed(self, parts: Sequence[str]) -> str:
        """Parts in a row, as the language writes lists."""
        return self._texts["list.separator"].join(parts)

    def heads(self, room: str, names: Sequence[str]) -> list[str]:
        """The heads of a table's columns: the texts of `room.name`."""
        return [self(f"{room}.{name}") for name in names]

    def figure(self, figure: Interval | None, unit: str = "", digits: int | None = None) -> str:
        """A figure with its interval; a dash for none."""
        return "–" if figure is None else with_interval(figure, self._texts["interval"], unit, digits)

    def signed(self, points: Interval) -> str:
        """Percentage points with their sign: "-0.30 (-0.60 to 0.00)"."""
        low, high = ("?" if bound is None else f"{bound:+.2f}" for bound in points[1:])
        return f"{points.value:+.2f} ({self('interval.signed', low=low, high=high)})"

    def missing(self, found: Any, how: str) -> str:
        """What stands for a figure that is not there: the reason in the result, else how to measure it."""
        why = reason(found)
        return self("reason", why=why) if why else self("not_measured", how=how)
