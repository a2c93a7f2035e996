"""Tests that untrusted text cannot act as a command in a terminal, a line or a document.

Commands that quote such text are covered by `tests.fuzz`.
"""

from __future__ import annotations

import json
import math
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsifiner_edge.errors import ConfigError, GateError, MissingExtraError
from sparsifiner_edge.text import dump_json, finite, printable

HIDDEN = ["\x1b[31m", "\x9b31m", "\u202e", "\u2066", "\r\n", "\x00", "\x7f", "\ud800", "\u2028", "\ufeff", "\U000e0041"]


@pytest.mark.parametrize("text", HIDDEN)
def test_hidden_characters_become_escapes(text: str) -> None:
    for found in (
        printable(f"a{text}b"),
        str(ConfigError(f"a{text}b")),
        dump_json([f"a{text}b"], indent=None).rstrip("\n"),
    ):
        assert found.isprintable()
        assert found.isascii()
    assert json.loads(dump_json({f"a{text}": text})) == {f"a{text}": text}


@given(st.text())
def test_letters_stay_and_nothing_else_gets_through(text: str) -> None:
    found = printable(text, most=10**9)
    assert all(c.isprintable() for c in found if c not in text)
    assert printable(found, most=10**9) == found
    for letter in "aé日ъ😀 -_/.":
        assert letter in printable(f"{letter}{text}", most=10**9)
    assert json.loads(dump_json(text)) == text


def test_long_texts_are_cut_in_the_middle() -> None:
    found = printable("a" * 5000 + "b" * 5000)
    assert len(found) <= 300
    assert (found[:3], found[-3:], " ... " in found) == ("aaa", "bbb", True)


def test_numbers_that_json_has_not_are_null_and_counted() -> None:
    content: Any = {"a": [1.0, math.nan, {"b": math.inf}], "c": (-math.inf, 2), "d": "nan", "e": None}
    assert finite(content) == ({"a": [1.0, None, {"b": None}], "c": [None, 2], "d": "nan", "e": None}, 3)
    with pytest.raises(ValueError, match="Out of range"):
        dump_json(content)


def test_errors_pass_between_processes() -> None:
    for error in (ConfigError("what \x1b", "fix"), MissingExtraError("av", "camera"), GateError("gate")):
        found = pickle.loads(pickle.dumps(error))
        assert (type(found), found.what, found.fix, str(found)) == (type(error), error.what, error.fix, str(error))
