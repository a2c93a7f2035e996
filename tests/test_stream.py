"""Tests of streaming inference: full and incremental updates, bundles, backends and independent states."""

from __future__ import annotations

import doctest
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import sparsifiner_edge as se
from sparsifiner_edge.camera.model import Model
from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.errors import ArtifactError, BackendError, ConfigError, UnsupportedModelError
from sparsifiner_edge.metrics import cosine
from sparsifiner_edge.runtime.session import Session
from sparsifiner_edge.runtime.stream import FIRST_CHECK, PAUSE, STILL
from sparsifiner_edge.sparse.hosts import backbone_of
from sparsifiner_edge.sparse.stream import Passage, StreamModel, carry
from sparsifiner_edge.sparse.student import save_student
from tests.commands import process
from tests.flat import export_bundle
from tests.hosts import factories
from tests.models import KINDS, eva, sparse, student, vit
from tests.native.test_kernels import LACKING
from tests.seal import reseal

BACKENDS = ("onnxruntime", "openvino")


class Tensors(torch.nn.Module):
    """A model for streaming: images in, a tuple of tensors out."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = self.model(images)
        found = found if isinstance(found, (tuple, torch.Tensor)) else found.to_tuple()
        return tuple(x for x in (found if isinstance(found, tuple) else (found,)) if isinstance(x, torch.Tensor))


MODELS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "timm": (vit, (5,)),
    "merging": (lambda: sparse("test_vit", vit(), KINDS["merging"]).model, (5,)),
    "rotary": (lambda: eva(rope_rotate_half=True, class_token=False, global_pool="avg"), (1,)),
    "rotary by head": (lambda: eva(rope_type="mixed", attn_type="rope"), (1,)),
    "transformers": (lambda: factories.model("DINOv2-registers"), (3,)),
    "rotary, transformers": (lambda: factories.model("DINOv3"), (3,)),
    "a decoder of two layers": (factories.Segmenter, (2, 5)),
    "a decoder of four": (factories.depth_anything, (0, 1, 2, 3)),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_step_over_all_tokens_is_the_dense_model_and_what_is_kept_serves(name: str) -> None:
    make, read = MODELS[name]
    with torch.no_grad():
        model = make()
        dense = Tensors(se.restore_model(make()))
        size = backbone_of(model).image_size
        first, second = torch.rand(2, 1, 3, *size)
        second[..., size[1] // 3 :] = first[..., size[1] // 3 :]
        stream = StreamModel(Tensors(model), first)
        assert stream.read == read
        before = stream.whole(stream.embed(first))
        _close(stream.step(first, before), dense(first))
        # Recompute all rows next to the cached ones, which have weight 0.
        tokens, rows = stream.embed(second), torch.arange(stream.count)
        none = torch.zeros(1, len(rows))
        kept = [qkv[..., qkv.shape[-1] // 3 :] for qkv in before.new]
        every = Passage(rows, tokens, none, len(rows) + rows, none, kept, read=before.outputs)
        _close(stream.step(second, every), dense(second))
        # Recompute the prefix and some patches of the same frame: the outputs stay the same.
        prefix = backbone_of(model).prefix
        some = torch.cat([rows[:prefix], rows[prefix::3]])
        counts = torch.ones(1, len(rows)).index_fill(1, some, 0)
        places = rows.index_copy(0, some, len(rows) + torch.arange(len(some)))
        still = torch.ones(1, len(some))
        again = Passage(some, stream.embed(first)[:, some], counts, places, still, kept, read=before.outputs)
        _close(stream.step(first, again), dense(first))


def _close(found: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...]) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert float((a - b).abs().max()) <= 1e-4 * float(b.max() - b.min())


def test_what_is_kept_moves_as_what_is_like_it() -> None:
    kinds = torch.nn.functional.one_hot(torch.arange(12) % 3, 8).float()[None]
    moved = kinds + torch.tensor([0.0, 0.0, 0.5])[torch.arange(12) % 3, None] * torch.ones(8)
    rows = torch.tensor([0, 1, 2, 4])
    found = carry(kinds, moved[:, rows], rows, torch.ones(1, 4))
    torch.testing.assert_close(found, moved, rtol=0, atol=1e-3)
    # A patch that changed itself gives no information about others; if all changed, no estimate moves.
    found = carry(kinds, moved[:, rows] + 1, rows, torch.zeros(1, 4))
    torch.testing.assert_close(found, kinds)


@pytest.mark.parametrize(("kind", "reason"), [("pruned", "prunes"), ("paper", "preset paper")])
def test_what_no_stream_runs_is_refused(kind: str, reason: str) -> None:
    model = sparse("test_vit", vit(), KINDS[kind]).model
    with pytest.raises(UnsupportedModelError, match=reason):
        StreamModel(Tensors(model), torch.rand(1, 3, 160, 160))


def frames(count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Return frames of a moving square on a still picture with a little noise."""
    random = np.random.default_rng(seed)
    still = np.kron(random.integers(40, 200, (1, 20, 20, 3)), np.ones((1, 8, 8, 1)))
    made = []
    for number in range(count):
        image = still + random.normal(0, 2, still.shape)
        image[:, 40:60, 5 * number : 5 * number + 20] = 255
        made.append({"image": image.clip(0, 255).astype(np.uint8)})
    return made


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bundle_follows_a_camera(stream_bundle: Path, backend: str) -> None:
    verified = se.verify_bundle(stream_bundle, backend)
    assert verified.passed
    assert "a stream of 3 frames" in verified.checks[-1].details
    with se.open_session(stream_bundle, backend) as session:
        one, other, share = session.stream(0.5), session.stream(0.5), session.stream(share=0.25)
        alone = [(one.infer(frame), one.computed) for frame in frames(6)]
        assert [computed.by for _, computed in alone if computed] == ["full"] + 5 * ["incremental"]
        for frame, elsewhere, (wanted, _) in zip(frames(6), frames(6, 1), alone, strict=True):
            share.infer(elsewhere)  # Interleaved calls: the states are independent.
            found = other.infer(frame)
            assert set(found) == {spec.name for spec in session.outputs}
            for name, value in wanted.items():
                np.testing.assert_array_equal(found[name], value)
        assert share.computed is not None
        assert (share.computed.by, share.computed.share, share.computed.oldest) == ("incremental", 0.25, 5)
        for frame in frames(3, 2):  # another scene
            other.infer(frame)
        assert other.computed is not None
        assert other.computed.by == "full"


def test_a_stream_in_int8_has_the_layers_of_the_file_beside_it_so(
    tiny_student: Path, pictures: Path, tmp_path: Path
) -> None:
    bundle = export_bundle(tiny_student, tmp_path / "int8", stream=True, precision="int8", calibrate=pictures)
    files = [onnx.load(bundle / name) for name in ("model.onnx", "stream/step.onnx")]
    counts = [sum(node.op_type == "QuantizeLinear" for node in file.graph.node) for file in files]
    assert counts[0] == counts[1] > 0
    for backend in BACKENDS:
        assert se.verify_bundle(bundle, backend).passed
        with se.open_session(bundle, backend) as session:
            stream = session.stream(share=0.25)
            found = [stream.infer(frame)["features"] for frame in frames(2)]
            assert found[0].shape == found[1].shape
            assert {x.dtype for name, x in stream._state.caches.items() if "cache" in name} == {np.dtype(np.float16)}
    with se.open_session(bundle, se.Execution(backend="onnxruntime", kernels="portable")) as session:
        stream = session.stream(share=0.25)
        bodies = [stream.infer(frame)["features"] for frame in frames(2)]
    assert cosine(bodies[1], found[1]).min() > 0.999


@LACKING
def test_attention_of_steps_is_bfloat16_where_that_is_asked_for(stream_bundle: Path, tmp_path: Path) -> None:
    """Nothing else of a dense model is bfloat16; full frames are unchanged."""
    dense = export_bundle(
        save_student(student(sparsity=SparsityConfig(keep=1)), tmp_path / "dense"), tmp_path / "bundle", stream=True
    )
    for bundle in (stream_bundle, dense):
        with se.open_session(bundle, se.Execution(backend="onnxruntime", compute_precision="bf16")) as session:
            stream = session.stream(share=0.25)
            assert all(np.isfinite(stream.infer(frame)["features"]).all() for frame in frames(2))
            assert "attention in bfloat16" in stream.description.kernels
        assert ("attention bf16" in session.description.precision) == (bundle == stream_bundle)


OLD_RUNTIME = Path(sys.prefix) / "onnxruntime-1.21"


@pytest.mark.skipif(not OLD_RUNTIME.is_dir(), reason=f"{OLD_RUNTIME} is made by `make test`")
def test_onnx_runtime_1_21_runs_a_stream_by_its_bodies(stream_bundle: Path) -> None:
    with se.open_session(stream_bundle, "onnxruntime") as session:
        session.stream()
        assert session._streaming is not None
        shape = session._streaming.shape
    script = (
        "import numpy as np, onnxruntime as ort\n"
        "from sparsifiner_edge.runtime.golden import play\n"
        "from sparsifiner_edge.runtime.stream_files import StreamShape\n"
        "assert ort.__version__.startswith('1.21'), ort.__version__\n"
        "def runner(name):\n"
        f"    path, on = {str(stream_bundle)!r} + '/stream/' + name, ['CPUExecutionProvider']\n"
        "    session = ort.InferenceSession(path, providers=on)\n"
        "    takes, gives = [x.name for x in session.get_inputs()], [x.name for x in session.get_outputs()]\n"
        "    return lambda given: dict(zip(gives, session.run(gives, {name: given[name] for name in takes})))\n"
        f"golden = np.load({str(stream_bundle)!r} + '/stream/golden.npz')\n"
        f"frames = play(StreamShape(*{tuple(shape)!r}), runner('embedding.onnx'), runner('step.onnx'),\n"
        "              golden['input.image'], golden['input.patches'])\n"
        "for number, outputs in enumerate(frames):\n"
        "    for name in outputs:\n"
        "        wanted = golden['output.' + name][number]\n"
        "        assert np.abs(outputs[name] - wanted).max() <= 1e-3 * np.ptp(wanted), (number, name)\n"
        "assert number == 2\n"
    )
    environment = os.environ | {"PYTHONPATH": str(OLD_RUNTIME)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_scene_that_moves_is_answered_by_the_model(stream_bundle: Path) -> None:
    by = []
    with se.open_session(stream_bundle, "onnxruntime") as session:
        stream = session.stream()
        random = np.random.default_rng(0)
        moving = [random.integers(0, 256, (1, 160, 160, 3), dtype=np.uint8) for _ in range(2)]
        still = frames(1)[0]["image"]
        for image in [*moving, *(PAUSE + STILL + 2) * [still], *(STILL + 1) * moving[:1]]:
            found, wanted = stream.infer({"image": image}), session.infer({"image": image})
            assert stream.computed is not None
            by.append(stream.computed.by)
            if by[-1] == "fallback":
                np.testing.assert_array_equal(found["features"], wanted["features"])
        scene = [*(1 + PAUSE + STILL - 1) * ["fallback"], "full", "incremental"]
        assert by == ["full", "fallback", *scene, *STILL * ["fallback"], "full"]
        with pytest.raises(BackendError, match="uint8"):
            stream.infer({"image": still.astype(np.float32)})
        stream.infer({"image": moving[0]})
        assert stream.computed.by == "incremental", "a refused input is no frame"


def test_what_was_kept_is_held_against_a_whole_frame(stream_bundle: Path) -> None:
    with se.open_session(stream_bundle, "onnxruntime") as session:
        stream, by = session.stream(0.5), []
        for frame in frames(FIRST_CHECK + 2):
            stream.infer(frame)
            assert stream.computed is not None
            by.append(stream.computed.by)
    assert by == ["full", *(FIRST_CHECK - 1) * ["incremental"], "full", "incremental"]


@pytest.mark.parametrize(("most", "by"), [(0.5, "full"), (1.0, "incremental")])
def test_an_event_in_an_empty_scene_is_computed_in_full(
    stream_bundle: Path, monkeypatch: pytest.MonkeyPatch, most: float, by: str
) -> None:
    monkeypatch.setattr("sparsifiner_edge.runtime.stream.MOSTLY_EMPTY", most)
    random, event = np.random.default_rng(0), FIRST_CHECK - 2
    with se.open_session(stream_bundle, "onnxruntime") as session:
        stream, done, shape = session.stream(0.5), [], tuple(int(n) for n in session.inputs[0].shape)
        for number in range(event + 1):
            frame = 120 + random.normal(0, 1.5, shape)
            if number == event:
                frame[:, :16, :16] += 60
            stream.infer({"image": frame.round().astype(np.uint8)})
            assert stream.computed is not None
            done.append(stream.computed.by)
    assert done[-2:] == ["incremental", by]


def test_what_is_not_finite_is_kept_by_no_frame_that_follows(stream_bundle: Path) -> None:
    with se.open_session(stream_bundle, "onnxruntime") as session:
        stream, (first, second, third) = session.stream(0.5), frames(3)
        stream.infer(first)
        for cache in stream._state.caches.values():
            cache[:] = np.nan
        for frame, by in ((second, "full"), (third, "incremental")):
            assert all(np.isfinite(value).all() for value in stream.infer(frame).values())
            assert stream.computed is not None
            assert stream.computed.by == by


def test_a_fixed_share_takes_the_same_of_every_frame_of_a_scene(stream_bundle: Path) -> None:
    with se.open_session(stream_bundle, "onnxruntime") as session:
        stream, computed = session.stream(share=0.02), []
        for frame in frames(FIRST_CHECK + 4):  # More than that share of it moves.
            stream.infer(frame)
            computed.append(stream.computed)
    assert [one.by for one in computed if one] == ["full", *(FIRST_CHECK + 3) * ["incremental"]]
    assert {one.share for one in computed[1:] if one} == {0.02}


def test_what_is_asked_for_and_cannot_be_had_is_said(stream_bundle: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    with se.open_session(tiny_bundle, "onnxruntime") as session, pytest.raises(BackendError, match="--stream"):
        session.stream()
    with se.open_session(stream_bundle, "onnxruntime") as session:
        for wrong in (
            {"at_least": 1.0},
            {"at_least": 0.0},
            {"share": 0.0},
            {"share": 1.5},
            {"at_least": 0.9, "share": 0.1},
        ):
            with pytest.raises(ConfigError, match=next(iter(wrong))):
                session.stream(**wrong)
    for more in ({"batch": 2}, {"batch": "dynamic"}, {"precision": "fp16"}):
        with pytest.raises(ConfigError, match="stream"):
            export_bundle("test_vit", tmp_path / "none", stream=True, **more)
    manifest = json.loads((stream_bundle / "manifest.json").read_text())["stream"]
    altered = shutil.copytree(stream_bundle, tmp_path / "altered")
    reseal(altered, stream={**manifest, "read": [0]})
    with se.open_session(altered, "onnxruntime") as session, pytest.raises(ArtifactError, match=r"read\.0"):
        session.stream()
    reseal(altered, stream={**manifest, "step": "elsewhere.onnx"})
    with pytest.raises(ArtifactError, match="elsewhere"):
        se.open_session(altered)
    reseal(altered, stream=manifest)
    with np.load(altered / manifest["golden"]) as golden:
        arrays = dict(golden)
    arrays["output.features"][2] += 1
    np.savez(altered / manifest["golden"], **arrays)
    assert not se.verify_bundle(reseal(altered)).passed
    arrays["input.patches"] = arrays["input.patches"][:, ::-1]
    np.savez(altered / manifest["golden"], **arrays)
    with pytest.raises(ArtifactError, match="golden sequence"):
        se.verify_bundle(reseal(altered))


def test_the_example_runs(stream_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(stream_bundle, tmp_path / "streaming")
    monkeypatch.chdir(tmp_path)
    names = {"open_session": se.open_session}
    (example,) = doctest.DocTestFinder(recurse=False).find(Session.stream, "stream", globs=names)
    assert doctest.DocTestRunner().run(example).failed == 0


def test_run_follows_a_video(stream_bundle: Path, tiny_bundle: Path, pictures: Path, tmp_path: Path) -> None:
    pytest.importorskip("av", reason="the extra camera is not installed")
    from tests.camera.conftest import encode, records_of

    video = encode(tmp_path / "camera.mp4", [frame["image"][0] for frame in frames(12)])
    command = ["run", stream_bundle, "--source", video, "--backend", "onnxruntime", "--at-least", "0.5"]
    by = [record["computed"]["by"] for record in records_of(process(*command))]
    assert by == ["full", *7 * ["incremental"], "full", *3 * ["incremental"]]
    with Model(stream_bundle, se.Execution(backend="onnxruntime")) as model:
        model.session.backend = "tensorrt"  # as an engine in the bundle would be opened
        model.follow()
        assert (
            model.why_whole == "tensorrt does not support streaming inference: the ordinary model runs on every frame"
        )
        assert model.infer_frame(frames(1)[0]["image"][0]).computed is None
    fixed = records_of(process(*command[:-2], "--share", "0.125"))
    assert fixed[3]["computed"]["share"] == 0.12
    assert all("computed" not in record for record in records_of(process(*command[:-2], "--no-stream")))
    for wrong, said in (
        ([*command[:-2], "--no-stream", "--share", "0.5"], "apply only to streaming inference"),
        (["run", stream_bundle, "--source", pictures, "--at-least", "0.9"], "apply only to streaming inference"),
        (["run", tiny_bundle, "--source", video, "--share", "0.5"], "--stream"),
    ):
        outcome = process(*wrong)
        assert outcome.code == 2
        assert said in outcome.err
