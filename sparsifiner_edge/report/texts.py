"""The pages' words in English and Japanese, one catalogue, `texts.json`, with both of each; and their templates."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Sequence
from typing import Any

from sparsifiner_edge.errors import ConfigError, MissingExtraError
from sparsifiner_edge.records import Unavailable
from sparsifiner_edge.report.values import Figure, clean, quantity_of, with_interval

LANGUAGES = ("en", "ja")


class Texts:
    """Words of one language: `texts("verdict.faster", subject=..., against=...)`.

    Raises:
        ConfigError: the language is not one of `LANGUAGES`.
    """

    def __init__(self, language: str) -> None:
        if language not in LANGUAGES:
            raise ConfigError(f"lang is {language!r}.", f"Choose one of: {', '.join(LANGUAGES)}.")
        self.language = language
        catalogue = importlib.resources.files("sparsifiner_edge.report") / "texts.json"
        entries = json.loads(catalogue.read_text(encoding="utf-8")).items()
        self._texts: dict[str, str] = {key: words[language] for key, words in entries}

    def __call__(self, key: str, **values: object) -> str:
        """The text of `key` with `values` in place of its fields."""
        return self._texts[key].format(**values)

    def get(self, key: str, otherwise: str) -> str:
        """The text of a name that a result holds, or what the result itself says."""
        return self._texts.get(key, otherwise)

    def join(self, parts: Sequence[str]) -> str:
        """Parts in a row, as the language writes lists."""
        return self("list.separator").join(parts)

    def heads(self, section: str, names: Sequence[str]) -> list[str]:
        """The heads of a table's columns: the texts of `section.name`."""
        return [self(f"{section}.{name}") for name in names]

    def figure(self, figure: Figure, unit: str = "", digits: int | None = None) -> str:
        """A figure with its interval; a dash for none."""
        quantity = quantity_of(figure)
        return "–" if quantity is None else with_interval(quantity, self("interval"), unit, digits)

    def missing(self, content: object, how: str) -> str:
        """What stands for a figure that is not there: the reason in the result, else how to measure it."""
        if isinstance(content, Unavailable):
            return self("reason", why=clean(content.why, 300))
        return self("not_measured", how=how)


def templates() -> Any:
    """The pages' templates, a `jinja2.Environment` that escapes all text.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtraError("jinja2", "report") from error
    return jinja2.Environment(
        loader=jinja2.PackageLoader("sparsifiner_edge.report", "template"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
