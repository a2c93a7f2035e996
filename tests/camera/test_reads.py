"""What layers read, live: the same as torch's lists, through merges; drawn into the overlay."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch

from sparsifiner_edge.camera.model import Model
from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.errors import BackendError
from sparsifiner_edge.evaluate.connections import look, weights_of
from sparsifiner_edge.export.check import smooth_images
from sparsifiner_edge.export.export import export_bundle
from sparsifiner_edge.order import inverse
from sparsifiner_edge.sparse.student import save_student
from tests.commands import assert_refused, call
from tests.everything import first
from tests.models import student
from tests.once import Once

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of torch's exporter, about its own calls
]

KINDS = {
    "merging": SparsityConfig(keep=0.2, cells=4, channels=8, merge=(12, 8, 6, 0, 0, 0)),
    "some dense": SparsityConfig(keep=0.3, cells=4, channels=8, dense_layers=(0, 3), merge=(6,)),
    "paper": SparsityConfig.for_preset("paper", keep=0.25, channels=8),
}


def exported(once: Once, kind: str) -> Path:
    """A student's bundle."""

    def make(folder: Path) -> None:
        save_student(student(sparsity=KINDS[kind], img_size=(96, 160)), folder / "student")
        export_bundle(folder / "student", folder / "bundle")

    return once(f"reads {kind}", make) / "bundle"


@pytest.mark.parametrize(
    ("kind", "tokens"), first([("merging", (60, 34)), ("some dense", (54, 30)), ("paper", (60, 60))])
)
def test_it_is_what_torch_reads(kind: str, tokens: tuple[int, int], once: Once) -> None:
    bundle = exported(once, kind)
    made, image = student(sparsity=KINDS[kind], img_size=(96, 160)), smooth_images((96, 160))[0]
    with torch.no_grad():
        seen = look(made, image)
        curve = torch.from_numpy(inverse(made.backbone.layers[0].curve.order.numpy()))
    shares, keys = [], []
    for layer in seen:
        read = weights_of(layer).read
        if layer.sparse is not None and read is not None:
            places = torch.arange(60) if layer.tokens.places is None else layer.tokens.places[0]
            shares.append(read.float().mean((0, 1))[places[curve]].numpy())
            keys.append(float(read.float().mean()))
    with Model(bundle, "onnxruntime", 1, reads=True) as model:
        outputs, found = model.infer(image), model.read
    with Model(bundle, "onnxruntime", 1) as plain:
        without = plain.infer(image)
        assert plain.read is None
    assert list(outputs) == list(without)
    assert np.array_equal(outputs["logits"], without["logits"])
    assert found is not None
    assert found.shares.shape == (6, 10)
    assert found.shares.ravel() == pytest.approx(np.mean(shares, 0), abs=1e-6)
    assert found.keys == pytest.approx(np.mean(keys), abs=1e-6)
    assert found.tokens == tokens
    assert found.line.endswith("   60 tokens" if kind == "paper" else f"   {tokens[0]} > {tokens[1]} tokens")


def test_it_is_drawn(once: Once, video: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    asked = ("run", exported(once, "merging"), "--source", video, "--frames", 3)
    done = call(capfd, *asked, "--overlay", tmp_path / "o.mp4", "--overlay-reads")
    assert done.code == 0, done.err
    plain = call(capfd, *asked, "--overlay", tmp_path / "plain.mp4")
    assert plain.code == 0, plain.err
    frames = []
    for name in ("o.mp4", "plain.mp4"):
        with av.open(str(tmp_path / name)) as file:
            frames.append([frame.to_ndarray(format="rgb24").astype(int) for frame in file.decode(video=0)])
    assert [len(found) for found in frames] == [3, 3]
    with_reads, without = (found[0] for found in frames)
    assert with_reads[100:, :, 0].mean() > without[100:, :, 0].mean() + 3, "what is read is tinted"


def test_what_is_refused(
    once: Once, cells: Path, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, shown = exported(once, "merging"), ("--source", video, "--overlay-reads")
    assert_refused(call(capsys, "run", bundle, *shown), "Give --overlay FILE.mp4")
    overlay = tmp_path / "o.mp4"
    assert_refused(call(capsys, "run", cells, *shown, "--overlay", overlay), "does not say which tokens it reads")
    with pytest.raises(BackendError, match="openvino cannot show what layers read"):
        Model(bundle, "openvino", 1, reads=True)
    assert not overlay.exists()
