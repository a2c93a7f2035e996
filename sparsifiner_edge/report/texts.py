"""The page's words in English and Japanese: `texts/en.json` and `texts/ja.json`, with the same keys."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Sequence

from sparsifiner_edge.errors import ConfigError

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
