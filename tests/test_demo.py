"""The demonstration from end to end, on a small model: the real one runs in `make everything` (test_readme.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsifiner_edge.demo import demo
from sparsifiner_edge.profiles.profile import profile_bundle
from sparsifiner_edge.search import whole
from tests.commands import call
from tests.plain import read_result

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch's exporter, about its own calls


@pytest.mark.long
def test_a_small_demonstration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"MODULE": "tests.small_saliency", "SIZE": 160, "AT_LEAST": 0.8}.items():
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr(demo, "profile_bundle", lambda *a, **k: profile_bundle(*a, **k | {"seconds": 0.3}))
    monkeypatch.setattr(whole, "SECONDS", 0.2)
    done = call(capsys, "demo", "-o", tmp_path / "demo", "--minutes", 1)
    assert done.code == 0, done.err
    assert "the fastest at 0.8" in done.out
    (found,) = read_result(tmp_path / "demo" / "result.json")["statistics"].values()
    assert found["fidelity"] >= 0.8
    front = read_result(tmp_path / "demo" / "found" / "front.json")
    assert front["statistics"]["answer"]["merge"] == found["merge"]
    page = (tmp_path / "demo" / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 2
    for name in ("maps", "what-was-read"):
        assert (tmp_path / "demo" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
