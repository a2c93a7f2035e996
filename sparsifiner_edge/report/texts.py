"""Words of the pages in English and Japanese (`texts.json`), and the templates."""

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
        ConfigError: The language is not one of `LANGUAGES`.
    """

    def __init__(self, language: str) -> None:
        if language not in LANGUAGES:
            raise ConfigError(f"lang is {language!r}.", f"Choose one of: {', '.join(LANGUAGES)}.")
        self.language = language
        catalogue = importlib.resources.files("sparsifiner_edge.report") / "texts.json"
        entries = json.loads(catalogue.read_text(encoding="utf-8")).items()
        self._texts: dict[str, str] = {key: words[language] for key, words in entries}

    def __call__(self, key: str, **values: object) -> str:
        """Return the text of `key`, with `values` in its fields."""
        return self._texts[key].format(**values)

    def get(self, key: str, otherwise: str) -> str:
        """Return the text of a name in a result, or `otherwise`."""
        return self._texts.get(key, otherwise)

    def join(self, parts: Sequence[str]) -> str:
        """Join parts as the language writes lists."""
        return self("list.separator").join(parts)

    def heads(self, section: str, names: Sequence[str]) -> list[str]:
        """Return the column heads of a table: the texts of `section.name`."""
        return [self(f"{section}.{name}") for name in names]

    def figure(self, figure: Figure, unit: str = "", digits: int | None = None) -> str:
        """Format a figure with its interval; a dash if there is none."""
        quantity = quantity_of(figure)
        return "–" if quantity is None else with_interval(quantity, self("interval"), unit, digits)

    def missing(self, content: object, how: str) -> str:
        """Return what replaces a missing figure: the reason in the result, else how to measure it."""
        if isinstance(content, Unavailable):
            return self("reason", why=clean(content.why, 300))
        return self("not_measured", how=how)


def templates() -> Any:
    """Return the templates as a `jinja2.Environment` that escapes all text.

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
