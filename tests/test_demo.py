"""Tests of the demonstration with a small model; the real one runs in `make everything` (test_readme.py)."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models import vit
from tests.plain import read_result

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch's exporter, about its own calls


class Saliency(nn.Module):
    """Saliency model: images [B,3,H,W] to a map [B,H,W] from 0 to 1."""

    image_mean, image_std, output_names = (0.5,) * 3, (0.25,) * 3, ("saliency",)

    def __init__(self, img_size: int) -> None:
        super().__init__()
        self.backbone = vit(img_size=img_size, num_classes=0, depth=2, embed_dim=32, num_heads=1)
        torch.manual_seed(1)
        self.decoder = nn.ConvTranspose2d(32, 1, 16, 16)

    def forward(self, pixels: Tensor) -> Tensor:
        (patches,) = self.backbone.forward_intermediates(pixels, indices=1, norm=True, intermediates_only=True)
        return self.decoder(patches)[:, 0].sigmoid()


def saliency(img_size: int = 160) -> nn.Module:
    return Saliency(img_size).eval()


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    return importlib.import_module("demo")


@pytest.mark.everything
@pytest.mark.long
def test_a_small_demonstration(demo: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vars(demo).update(MODEL="tests.test_demo:saliency", SIZE=160, AT_LEAST=0.8)
    output = tmp_path / "demo"
    found = demo.main(["-o", str(output), "--minutes", "2"])
    assert found.statistics.answer.fidelity >= 0.8
    assert "sparse: " in capsys.readouterr().out
    assert (output / "report.html").read_text(encoding="utf-8").count("data:image/png;base64,") == 3
    assert (output / "maps.png").read_bytes().startswith(b"\x89PNG")
    assert read_result(output / "task.json")["statistics"]["iou"]["mean"]["value"] > 0
    (output / "mine.txt").touch()
    (tmp_path / "link").symlink_to(output)
    demo.begin(tmp_path / "link")
    assert {path.name for path in output.iterdir()} == {demo.MARK, "mine.txt"}, "an earlier one alone is replaced"


def test_a_demonstration_leaves_other_folders_alone(demo: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.png").write_bytes(b"mine")
    with pytest.raises(SystemExit, match="is not a folder of the demonstration"):
        demo.main(["-o", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["mine.png"]
    (tmp_path / "mine.png").unlink()
    demo.begin(tmp_path)
