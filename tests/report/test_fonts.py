"""Fonts for Japanese: also those that were installed after matplotlib made its list of fonts."""

from __future__ import annotations

import pytest

matplotlib = pytest.importorskip("matplotlib", reason="the extra report is not installed")


def test_a_font_newer_than_the_list_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.font_manager import fontManager

    from sparsifiner_edge.report import rendering

    if rendering.fonts("ja") is None:
        pytest.skip("no Japanese font is installed (fonts-noto-cjk)")
    new = {entry.fname for entry in fontManager.ttflist if entry.name in rendering._CJK}
    old = [entry for entry in fontManager.ttflist if entry.fname not in new]
    monkeypatch.setattr(fontManager, "ttflist", old)
    found = rendering.fonts("ja")
    assert found is not None
    assert found[0] in rendering._CJK


def test_without_any_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.font_manager import fontManager

    from sparsifiner_edge.report import rendering

    monkeypatch.setattr(fontManager, "ttflist", [])
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", list)
    assert rendering.fonts("ja") is None
    assert rendering.fonts("en") == ["DejaVu Sans"]
