"""Students, checkpoints and histories that were changed or damaged, trainings that move, and disks that are full."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from sparsifiner_edge.artifacts import STUDENT_FILE, WEIGHTS_FILE, sha256
from sparsifiner_edge.distill import checkpoint
from sparsifiner_edge.distill.checkpoint import Checkpoint, Optimiser, TrainingState
from sparsifiner_edge.distill.data import folder_source
from sparsifiner_edge.distill.distill import distill_student
from sparsifiner_edge.distill.recipe import read_recipe
from sparsifiner_edge.distill.tensorboard import recorder
from sparsifiner_edge.distill.train import Training, make_accelerator
from sparsifiner_edge.errors import ArtifactError, SparsifinerError
from sparsifiner_edge.records import write_record
from sparsifiner_edge.sparse.student import dense_twin, load_student, save_student
from tests.bad_input.damage import edit_json
from tests.commands import assert_refused, call
from tests.fuzz.mutate import json_text, mutated_json, mutated_object, mutated_zip
from tests.models import student as make_student

SHORT = ("distil.steps=4", "batch=2", "check_every=2", "save_every=2", "images.held_out=2", "ema=0.9")
Content = dict[str, Any]
FOREIGN_NORM = "student.norm.weight does not belong to this training"


class Stop(Exception):
    pass


def stop_after_three(_stage: str, done: float, _total: float) -> None:
    if done == 3:
        raise Stop


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """A folder with a student `start`, images `data`, and a training of `out` that was stopped, begun from within."""
    place = tmp_path_factory.mktemp("begun")
    save_student(make_student(num_classes=2), place / "start")
    shutil.copytree(folder, place / "data")
    with contextlib.chdir(place) if hasattr(contextlib, "chdir") else _inside(place), pytest.raises(Stop):
        distill_student("start", "data", "out", overrides=SHORT, progress=stop_after_three)
    return place


@contextlib.contextmanager
def _inside(place: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        yield


@pytest.fixture(scope="module")
def training(begun: Path, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """What would resume it."""
    plan, found = read_recipe("cpu", SHORT), load_student(begun / "start")
    source, work = folder_source(begun / "data", 2, False, None), tmp_path_factory.mktemp("work")
    return Training(make_accelerator(plan), found, dense_twin(found), source, plan, work)


@pytest.fixture(scope="module")
def written(begun: Path) -> Content:
    """What its checkpoint's file holds."""
    return dict(torch.load(begun / "out.training" / checkpoint.CHECKPOINT, weights_only=True))


@pytest.fixture
def saved(begun: Path) -> Checkpoint:
    """The same as read, to be changed."""
    return checkpoint.load(begun / "out.training")


def put(record: object, **fields: Any) -> None:
    for name, value in fields.items():
        setattr(record, name, value)


def test_what_a_checkpoint_holds(written: Content) -> None:
    parts = {"fingerprint", "student", "optimiser", "average", "recent", "state"}
    state = {"step", "fidelity", "cosines", "best_step", "best", "unreadable", "captured", "top1", "predictors"}
    assert (set(written), set(written["state"])) == (parts, state)
    assert set(written["optimiser"]) == {"state", "param_groups"}
    assert type(written["state"]["unreadable"]) is list


def test_a_training_goes_on_wherever_its_folders_lie(
    begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = Path(shutil.copytree(begun, tmp_path / "elsewhere"))
    monkeypatch.chdir(tmp_path)
    summary = distill_student(moved / "start", "elsewhere/data", moved / "out", overrides=SHORT, resume=True)
    assert summary.steps == 4


def test_images_are_the_same_by_name_and_size(begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fingerprint(data: Path, held_out: Path | None = None) -> str:
        return folder_source(data, 2, False, held_out).fingerprint

    data = Path(shutil.copytree(begun / "data", tmp_path / "data"))
    held_out = Path(shutil.copytree(begun / "data", tmp_path / "held"))
    first, apart = fingerprint(begun / "data"), fingerprint(data, held_out)
    monkeypatch.chdir(data)
    assert first == fingerprint(data) == fingerprint(Path())
    assert apart == fingerprint(Path(), Path("../held")) != first
    image = next(data.rglob("*.png"))
    image.touch()
    assert fingerprint(data) == first
    image.write_bytes(image.read_bytes() + b"\0")
    assert fingerprint(data) != first
    image.rename(image.with_name("other.png"))
    assert fingerprint(data) != first


@pytest.mark.parametrize("output", [".", "", "/", "..", "x/.."])
def test_outputs_that_are_no_folder_of_their_own(
    output: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = call(capsys, "distill", tmp_path / "none", "--data", tmp_path / "none", "-o", output)
    assert_refused(outcome, "names no folder of its own")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda c: c.update(labels=1e308), "labels is 1e+308, not list"),
        (lambda c: c.update(labels="ab"), 'labels is "ab", not list'),
        (lambda c: c.update(labels={"a": 1}), 'labels is {"a": 1}, not list'),
        (lambda c: c.update(labels=[3] * 10), "labels[0] is 3, not str"),
        (lambda c: c.update(labels=["a"] * 9 + [None]), "labels[9] is null, not str"),
        (lambda c: c.update(labels=["a"] * 9 + ["\ud800"]), "labels[9] is"),
        (lambda c: c.update(labels=["a"] * 9 + ["x" * 100_000]), 'labels[9] is "xxx'),
        (lambda c: c.update(labels=["a"] * 9 + [""]), 'labels[9] is ""'),
        (lambda c: c.update(labels=["a"]), "names 1 labels for 10 classes"),
        (lambda c: c["provenance"].update(x=[float("nan")]), "provenance.x[0] is nan"),
        (lambda c: c["provenance"].update(x=1e999), "provenance.x is inf"),
        (lambda c: c["provenance"].update(x=json.loads("[" * 200 + "]" * 200)), "nested deeper than 64 levels"),
        (lambda c: c.update(img_size=64_000), "image size 64000 is too large"),
        (lambda c: c.update(img_size=16 * 2**60), "image size 18446744073709551616 is too large"),
        (lambda c: c.update(num_classes=10**9), "num_classes is 1000000000"),
        (lambda c: c.update(num_classes=-1), "num_classes is -1"),
        (lambda c: c.update(model="vit_giant_patch14_dinov2.lvd142m"), "does not fit this model"),
        (lambda c: c.update(model="x" * 100_000), "timm has no model"),
        (lambda c: c["sparsity"].update(tile=2**62, probe=1), "tile is 4611686018427387904"),
    ],
)
def test_a_student_of_nothing(change: Callable[[Content], object], text: str, student: Path) -> None:
    edit_json(student / STUDENT_FILE, change)
    with pytest.raises(SparsifinerError) as caught:
        load_student(student)
    assert text in caught.value.what


@pytest.mark.parametrize("kind", [torch.float8_e5m2, torch.int32, torch.complex64, torch.bool])
def test_weights_of_another_kind(kind: torch.dtype, student: Path) -> None:
    state = safetensors.torch.load_file(student / WEIGHTS_FILE)
    state["norm.weight"] = torch.full_like(state["norm.weight"], torch.nan).to(kind)
    safetensors.torch.save_file(state, student / WEIGHTS_FILE)
    edit_json(student / STUDENT_FILE, lambda c: c.update(weights_sha256=sha256(student / WEIGHTS_FILE)))
    with pytest.raises(SparsifinerError, match=r"norm\.weight (is|holds)"):
        load_student(student)


def test_any_student_is_read_or_refused(student: Path) -> None:
    """Forty students that were changed at random."""
    path, good, read = student / STUDENT_FILE, json.loads((student / STUDENT_FILE).read_text()), 0
    for number in range(40):
        path.write_bytes(mutated_json(good, random.Random(number)))
        with contextlib.suppress(SparsifinerError):
            json.dumps(write_record(load_student(student).provenance), allow_nan=False)
            read += 1
    assert read


def _first(content: Checkpoint) -> Any:
    return next(iter(content.optimiser.state.values()))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda c: c.pop("recent"), "is not a training's checkpoint"),
        (lambda c: c.update(more=1), "is not a training's checkpoint"),
        (lambda c: c.update(recent=[1.0, torch.nan]), "is not a training's checkpoint"),
        (lambda c: c.update(recent=["1"]), "is not a training's checkpoint"),
        (lambda c: c["fingerprint"].update(seed=torch.zeros(2)), "is not a training's checkpoint"),
        (lambda c: c["state"].update(step="3"), "is not a training's checkpoint"),
        (lambda c: c["state"].update(unreadable=[3]), "is not a training's checkpoint"),
        (lambda c: c["state"].pop("cosines"), "is not a training's checkpoint"),
        (lambda c: c["optimiser"].pop("state"), "is not a training's checkpoint"),
        (lambda c: c["optimiser"].update(state=[1]), "is not a training's checkpoint"),
        (lambda c: c["student"].update(x="y"), "is not a training's checkpoint"),
        (lambda c: c.update(student=torch.zeros(2)), "is not a training's checkpoint"),
        (lambda c: c.update(state=torch.zeros(2)), "is not a training's checkpoint"),
        (lambda c: c.update(optimiser=torch.zeros(2)), "is not a training's checkpoint"),
    ],
)
def test_a_file_that_is_no_checkpoint(
    change: Callable[[Content], object], text: str, written: Content, tmp_path: Path
) -> None:
    small = {"student": {}, "optimiser": {"state": {}, "param_groups": []}, "average": {}}
    content = copy.deepcopy(written) | copy.deepcopy(small)  # The rest is large, and looked at later.
    torch.save(content, tmp_path / checkpoint.CHECKPOINT)
    checkpoint.load(tmp_path)
    change(content)
    torch.save(content, tmp_path / checkpoint.CHECKPOINT)
    with pytest.raises(ArtifactError, match=text):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda c: put(c.state, step=-1), "steps do not belong to this training"),
        (lambda c: put(c.state, step=99), "steps do not belong to this training"),
        (lambda c: put(c.state, best_step=1), "steps do not belong to this training"),
        (lambda c: put(c.state, fidelity={}), "steps do not belong to this training"),
        (lambda c: c.state.fidelity.update({0: "1"}), "steps do not belong to this training"),
        (lambda c: c.state.cosines.update({0: [0.5]}), "steps do not belong to this training"),
        (lambda c: put(c.state, best={}), "best does not belong to this training"),
        (lambda c: c.student.pop("norm.weight"), "content.student does not belong to this training"),
        (lambda c: c.student.update(x=torch.zeros(1)), "content.student does not belong to this training"),
        (lambda c: c.student.update({"norm.weight": torch.zeros(3)}), FOREIGN_NORM),
        (lambda c: c.student.update({"norm.weight": "x"}), FOREIGN_NORM),
        (lambda c: c.student["norm.weight"].fill_(torch.inf), FOREIGN_NORM),
        (lambda c: c.student.update({"norm.weight": torch.zeros(64).to_sparse()}), FOREIGN_NORM),
        (lambda c: c.student.update({"norm.weight": torch.zeros(1).expand(10**12)}), FOREIGN_NORM),
        (lambda c: put(c, average=None), "content.average does not belong"),
        (lambda c: put(c.optimiser, state=[1]), "optimiser does not belong"),
        (lambda c: c.optimiser.state.update({10**6: {}}), "optimiser does not belong"),
        (lambda c: _first(c).pop("exp_avg"), "does not belong to this training"),
        (lambda c: _first(c).update(step="x"), "does not belong to this training"),
        (lambda c: _first(c)["exp_avg"].fill_(torch.nan), "does not belong to this training"),
    ],
)
def test_a_checkpoint_of_something_else(
    change: Callable[[Checkpoint], object], text: str, saved: Checkpoint, training: Training
) -> None:
    change(saved)
    with pytest.raises(ArtifactError) as caught:
        training.restore(saved)
    assert text in caught.value.what


@pytest.mark.everything
def test_any_checkpoint_is_resumed_or_refused(
    begun: Path, training: Training, written: Content, tmp_path: Path
) -> None:
    """Forty that were changed at random, in their file or in what they say."""
    good, path = (begun / "out.training" / checkpoint.CHECKPOINT).read_bytes(), tmp_path / checkpoint.CHECKPOINT
    parts, restored = ("state", "recent", "optimiser", "average"), 0
    for number in range(40):
        rng = random.Random(number)
        if number % 2:
            path.write_bytes(mutated_zip(good, rng))
        else:
            part = rng.choice(parts)
            changed = mutated_object({part: written[part]}, rng)
            torch.save(written | changed if isinstance(changed, dict) else changed, path)
        with contextlib.suppress(SparsifinerError):
            training.restore(checkpoint.load(tmp_path))
            restored += 1
    assert restored


def test_of_a_history_what_is_one_stays(tmp_path: Path) -> None:
    path = tmp_path / checkpoint.HISTORY
    checkpoint.append_history(tmp_path, 1, loss=0.5, logits=float("nan"))
    lines = ["", "x", "[]", "null", "{}", '{"step": "1"}', '{"step": true}', '{"step": 9}', "[" * 100_000, "9" * 5000]
    lines += ['{"step": 1, "loss": NaN}', '{"step": 1e999}', '{"step": 1']
    with path.open("ab") as file:
        file.write("\n".join(lines).encode() + b"\n\xff\xfe\x00\n" + json_text({"step": 10**5000}))
    checkpoint.cut_history(tmp_path, 5)
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert kept == [{"step": 1, "loss": 0.5, "logits": None}]


@contextlib.contextmanager
def disk_of(size: int) -> Iterator[None]:
    """No file may become larger: what a full disk does, without one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    def of(weights: torch.Tensor) -> Checkpoint:
        return Checkpoint({}, {"x": weights}, Optimiser({}, []), None, [], TrainingState(0, {}, {}, 0, {}, set()))

    checkpoint.save(tmp_path, of(torch.zeros(10)))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    refused = r"checkpoint\.pt cannot be written: (File too large|a write came short)\."
    with disk_of(100_000), pytest.raises(ArtifactError, match=refused):
        checkpoint.save(tmp_path, of(torch.zeros(1_000_000)))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_full_disk_takes_no_history(tmp_path: Path) -> None:
    def write(function: Callable[..., None], *arguments: Any) -> None:
        for _ in range(1000):
            function(*arguments)

    with disk_of(3000), recorder(tmp_path / "tensorboard") as record:
        with pytest.raises(ArtifactError, match=r"events.* cannot be written: File too large"):
            write(record, 1, {"loss": 1.0})
        with pytest.raises(ArtifactError, match=r"history\.jsonl cannot be written: File too large"):
            write(checkpoint.append_history, tmp_path, 1)
