"""Models, settings and weights that do not serve: a message that names the value and says what to do, exit code 2."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from tests.commands import Outcome, assert_refused, process
from tests.models import TINY, vit

Capsys = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("model", "texts"),
    [
        ("vit_smal_patch16_224", ["'vit_smal_patch16_224'", "Did you mean vit_small_patch16_224"]),
        ("nonsense", ["timm has no model 'nonsense'", "list_models"]),
        ("test_vit.no_such_tag", ["test_vit.no_such_tag", "Check the model's name"]),
        ("swin_tiny_patch4_window7_224", ["is a SwinTransformer, not a VisionTransformer", "Choose a ViT"]),
        ("test_vit_relpos", ["is a VisionTransformerRelPos", "Choose a ViT"]),
    ],
)
def test_unknown_and_unsupported_models(model: str, texts: list[str], sparsify: Callable[..., Outcome]) -> None:
    assert_refused(sparsify(model=model), *texts)


def test_no_weights_and_no_net(tmp_path: Path) -> None:
    outcome = process("sparsify", "vit_tiny_patch16_224", "-o", tmp_path / "s", env={"HF_HOME": str(tmp_path / "hf")})
    assert_refused(outcome, "The weights of 'vit_tiny_patch16_224' could not be downloaded", "--weights")
    assert not (tmp_path / "s").exists()


class Evil:
    """Unpickling it would write a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def weights_with(change: Callable[[dict[str, torch.Tensor]], object], model: str = TINY) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        state = {key: value.clone() for key, value in vit(model, num_classes=10).state_dict().items()}
        change(state)
        (torch.save if path.suffix == ".pth" else safetensors.torch.save_file)(state, path)

    return write


def truncated(path: Path) -> None:
    weights_with(lambda _: None)(path)
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("name", "write", "texts"),
    [
        ("w.safetensors", lambda p: None, ["does not exist"]),
        ("w.safetensors", lambda p: p.write_bytes(b""), ["cannot be read as weights"]),
        ("w.safetensors", lambda p: p.write_bytes(struct.pack("<Q", 1 << 62) + b"{}"), ["cannot be read as weights"]),
        ("w.safetensors", truncated, ["cannot be read as weights", "make it again"]),
        ("w.safetensors", weights_with(lambda _: None, "test_vit3"), ["does not fit this model", "same architecture"]),
        ("w.safetensors", weights_with(lambda s: s.pop("cls_token")), ["missing cls_token; left over nothing"]),
        ("w.safetensors", weights_with(lambda s: s.update({"cls_token": torch.ones(3)})), ["cls_token has shape [3]"]),
        ("w.safetensors", weights_with(lambda s: s["norm.bias"].fill_(torch.nan)), ["norm.bias holds NaN"]),
        ("w.pth", lambda p: p.write_text("Not Found"), ["damaged, or a pickle that holds more than tensors"]),
        ("w.pth", lambda p: torch.save([1, 2], p), ["holds no tensors by name", "state dict"]),
        ("w.pth", lambda p: torch.save(vit(), p), ["holds more than tensors", "best as .safetensors"]),
    ],
)
def test_weights_that_do_not_serve(
    name: str, write: Callable[[Path], object], texts: list[str], tmp_path: Path, sparsify: Callable[..., Outcome]
) -> None:
    path = tmp_path / name
    write(path)
    assert_refused(sparsify(weights=path), str(path), *texts)


@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_code_in_a_pickle_is_not_run(save: Any, tmp_path: Path, sparsify: Callable[..., Outcome]) -> None:
    path, marker = tmp_path / "w.pth", tmp_path / "marker"
    save({"cls_token": Evil(marker)}, path)
    assert_refused(sparsify(weights=path), str(path), "nothing in it was run")
    assert not marker.exists()
