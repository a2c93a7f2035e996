"""Tests of complete searches on a small model: output, interruption and rejected input."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsifiner_edge.artifacts import kind_of
from sparsifiner_edge.bundle.manifest import Intended
from sparsifiner_edge.bundle.store import Bundle, open_bundle
from sparsifiner_edge.cli.main import main
from sparsifiner_edge.config import keep_text, merge_text, parse_merge
from sparsifiner_edge.errors import BackendError, ConfigError
from sparsifiner_edge.execution import Execution
from sparsifiner_edge.optimizer import whole
from sparsifiner_edge.optimizer.clock import Clock, TimeIsUpError
from sparsifiner_edge.optimizer.explore import Search, first_plan
from sparsifiner_edge.optimizer.request import OptimizeOptions, read_request
from sparsifiner_edge.optimizer.trial import Trial
from sparsifiner_edge.optimizer.whole import Attempt
from sparsifiner_edge.pareto import Candidate, SearchResult
from sparsifiner_edge.plan import LayerPlan
from sparsifiner_edge.profiles.estimate import estimate_bundle
from sparsifiner_edge.records import Unavailable
from sparsifiner_edge.report import write_report
from sparsifiner_edge.results import read_result
from sparsifiner_edge.runtime import Session
from sparsifiner_edge.sparse.student import dense_twin
from tests import flat
from tests.commands import assert_refused, call, handlers_kept, process
from tests.flat import load_student
from tests.hosts.factories import Depth
from tests.models import TINY
from tests.once import Once

ENGINE: dict[str, Any] = {"backends": ["onnxruntime"], "compute_precisions": ["auto"], "precisions": ["fp32"]}
BACKENDS = ["onnxruntime", "openvino"]
PLAIN = ("--backend", "onnxruntime", "--compute-precision", "auto", "--precision", "fp32")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch's exporter, about its own calls


@pytest.fixture(scope="module")
def found(once: Once, tiny_weights: Path, folder: Path) -> Path:
    """Folder of a search by fidelity with the command's output in it."""
    asked = ("optimize", TINY, "--weights", tiny_weights, "--data", folder, *PLAIN, "--at-least", "0.97")

    def run(place: Path) -> None:
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
            patch.setattr(whole, "THOROUGH", whole.QUICK)
            with handlers_kept(), pytest.raises(SystemExit) as caught:
                main([*map(str, asked), "-o", str(place / "found")])
        assert caught.value.code == 0
        (place / "said").write_text(said.getvalue())

    return once("optimize", run) / "found"


@pytest.fixture(autouse=True)
def shortly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the timing of complete models."""
    monkeypatch.setattr(whole, "THOROUGH", whole.QUICK)


@pytest.mark.everything
@pytest.mark.long
def test_the_answer_is_what_was_asked_for(found: Path, folder: Path, tiny_weights: Path) -> None:
    result = read_result(found / "front.json", SearchResult)
    front, images = result.statistics, result.method.images
    assert isinstance(front.answer, Candidate)
    assert front.answer.fidelity >= 0.97
    assert (kind_of(found / "bundle"), kind_of(found / "student")) == ("bundle", "student")
    assert not set(images["searched"]) & set(images["checked"])
    assert (len(images["searched"]), len(result.samples["check"])) == (10, 2)
    # `evaluate` gives the same on the images that the search used.
    judged = [path for path in sorted(folder.rglob("*.png")) if path.name in images["tried"]]
    again = flat.evaluate_student(found / "bundle", judged, against=TINY, weights=tiny_weights)
    assert again.statistics["patches_cosine"].mean.value == pytest.approx(front.answer.fidelity, abs=1e-4)
    # A plan without merging has no rates; on a busy machine it may be the fastest of so small a model.
    rates = parse_merge(front.answer.merge)
    assert load_student(found / "student").sparsity.merge == (rates if any(rates) else ())
    assert any(point.pareto_optimal for point in front.points)
    assert all(0 < point.fidelity <= 1 for point in front.points)
    assert open_bundle(found / "bundle").manifest.intended == Intended("onnxruntime")
    assert {"front.png", "report.html", "start"} <= {path.name for path in found.iterdir()}
    assert result.method.seconds < 60 * result.method.minutes
    said = (found.parent / "said").read_text()
    assert "Full models, measured in turn" in said
    assert "fidelity on 2 held out" in said
    line = next(line for line in said.splitlines() if line.startswith("Next: "))
    program, *following = line.removeprefix("Next: ").partition("  ")[0].split()
    assert (program, following.pop()) == ("sparsifiner-edge", "IMAGES/")
    ran = process(*following, folder)
    assert (ran.code, len(ran.out.splitlines())) == (0, 12), ran.err


@pytest.mark.everything
@pytest.mark.long
def test_where_no_plan_meets_a_bound_the_nearest_is_said(
    folder: Path, tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("optimize", TINY, "--weights", tiny_weights, "--data", folder, *PLAIN, "--at-most-ms", "0.0001")
    done = call(capsys, *asked, "-o", tmp_path / "other")
    assert done.code == 1
    assert "no plan meets 0.0001 ms; the nearest has" in done.err
    assert kind_of(tmp_path / "other" / "bundle") == "bundle"
    front = read_result(tmp_path / "other" / "front.json", SearchResult).statistics
    assert isinstance(front.answer, Unavailable)
    assert all(one.ms.value > 0 and one.fidelity == pytest.approx(1, abs=1e-5) for one in front.dense)


@pytest.mark.everything
@pytest.mark.long
def test_a_board_is_estimated_and_its_page_says_so(folder: Path, tiny_weights: Path, tmp_path: Path) -> None:
    board, out = {"board": "jetson-orin-nano-8gb", "precisions": ["fp16"]}, tmp_path / "board"
    within = flat.optimize(TINY, folder, out, at_least=0.9, weights=tiny_weights, **board)
    answer = within.statistics.answer
    assert (answer.backend, answer.precision, answer.compute_precision) == ("jetson-orin-nano-8gb", "fp16", "auto")
    assert "not measured" in answer.ms.interval
    # `estimate` gives the same for the bundle, for which it counts every layer separately.
    estimate = estimate_bundle(out / "bundle", board["board"], compute_precision="fp16")
    said = estimate.statistics.latency_ms
    compiled = importlib.util.find_spec("triton") is not None
    assert (estimate.method.kernels == "native") == compiled, "it carries kernels for the board"
    bodies = [remark for remark in within.statistics.remarks if "estimated as ONNX function bodies" in remark]
    assert len(bodies) == (not compiled)
    old = {**board, "board": "jetson-agx-xavier", "precisions": ["fp16"]}
    without = flat.optimize(TINY, folder, tmp_path / "old", at_least=0.9, weights=tiny_weights, minutes=1, **old)
    assert any(
        "estimated as ONNX function bodies, which are slow: TensorRT 8.5" in x for x in without.statistics.remarks
    )
    assert answer.ms.value == pytest.approx(said.value)
    assert answer.predicted_ms == pytest.approx(answer.ms.value, rel=0.1)
    assert any("The dense model is at least as fast" in remark for remark in within.statistics.remarks)
    for language, words in (("en", "None of them was measured."), ("ja", "実測値は含まれません")):
        write_report([out / "front.json"], out / "page.html", language=language)
        assert words in (out / "page.html").read_text()


@pytest.mark.everything
@pytest.mark.long
@pytest.mark.parametrize("ended_by", ["Ctrl-C", "the cap"])
def test_what_was_found_by_then_is_there(
    folder: Path, tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended_by: str
) -> None:
    """The best result so far is kept if a step hangs, even if foreign code catches the alarm as an error of its own."""
    errors, begun = Trial.errors, time.monotonic()

    def interrupted(self: Trial, plan: LayerPlan, most: int | None = None) -> list[float]:
        if most is not None:  # One layer only: a first bundle exists.
            if ended_by == "Ctrl-C":
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1000)
        return errors(self, plan, most)

    monkeypatch.setattr(Trial, "errors", interrupted)
    minutes = 1.0 if ended_by == "the cap" else 8.0
    options = {"at_least": 0.97, "minutes": minutes, "weights": tiny_weights, **ENGINE}
    found = flat.optimize(TINY, folder, tmp_path / "found", **options)
    assert isinstance(found.statistics.answer, Candidate)
    assert kind_of(tmp_path / "found" / "bundle") == "bundle"
    assert found.statistics.finalists[0].keep == "1"
    assert time.monotonic() - begun < 60 * minutes + 1
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL


@pytest.mark.everything
@pytest.mark.long
def test_a_module_in_memory_becomes_a_bundle_and_stays_as_it_is(folder: Path, tmp_path: Path) -> None:
    module, images = Depth().eval(), sorted(folder.rglob("*.png"))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    found = flat.optimize(module, images[:6], tmp_path / "found", at_least=0.5, minutes=2, **ENGINE)
    assert isinstance(found.statistics.answer, Candidate)
    assert isinstance(found.subjects[0].path, Unavailable)
    assert not {"student", "start"} & {path.name for path in (tmp_path / "found").iterdir()}
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert "6 images give only a rough estimate" in " ".join(found.statistics.remarks)
    with flat.open_session(tmp_path / "found" / "bundle") as session:
        assert session.description.backend == "onnxruntime"


def test_time_ends_what_runs_and_code_of_others_cannot_take_it() -> None:
    begun, clock = time.monotonic(), Clock(0.5)
    with clock.ending():
        with contextlib.suppress(TimeIsUpError):
            time.sleep(100)
        with contextlib.suppress(Exception):
            time.sleep(100)
    assert time.monotonic() - begun < 10
    assert not clock.fits()
    with pytest.raises(TimeIsUpError):
        Clock(0.0).tell("late")


def test_time_that_is_over_in_an_objects_end_waits_for_it() -> None:
    ended = list[bool]()

    class Slow:
        def __del__(self) -> None:
            while time.monotonic() < begun + 0.6:  # The alarm is at half a second.
                pass
            ended.append(True)

    begun, clock = time.monotonic(), Clock(0.5)
    with clock.ending():
        Slow()
        time.sleep(100)
    assert ended
    assert time.monotonic() - begun < 10


@pytest.mark.everything
@pytest.mark.long
def test_a_student_is_trained_for_the_points_of_a_front(
    found: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # On a busy machine the Pareto front of so small a model may have one point, or one close to its answer.
    front = json.loads((found / "front.json").read_text())
    for point in front["statistics"]["points"][-3:]:
        point |= {"pareto_optimal": True, "fidelity": front["statistics"]["finalists"][0]["fidelity"]}
    (tmp_path / "front.json").write_text(json.dumps(front))
    settings = ["distil.steps=2", "batch=2", "images.held_out=2", "check_every=2", "losses.logits=0"]
    plain = ["distill", found / "start", "--data", folder, *(w for each in settings for w in ("--set", each))]
    done = call(capsys, *plain, "--budgets", tmp_path / "front.json", "--json", "-o", tmp_path / "better")
    assert done.code == 0, done.err
    judged = json.loads(done.out)["budgets"]
    points = {(point["merge"], point["keep"]) for point in front["statistics"]["points"]}
    assert 2 <= len(judged) <= 6
    for row in judged:
        keep = row["keep"] if isinstance(row["keep"], list) else [row["keep"]]
        assert (merge_text(tuple(row["merge"]) or (0,) * 6), keep_text(tuple(keep))) in points
    assert load_student(tmp_path / "better").sparsity == load_student(found / "start").sparsity
    (tmp_path / "bad.json").write_text("{}")
    assert_refused(call(capsys, *plain, "--budgets", tmp_path / "bad.json", "-o", tmp_path / "no"), "bad.json")


def test_what_is_refused(tmp_path: Path, folder: Path, tiny_weights: Path, pictures: Path) -> None:
    given: dict[str, Any] = {"weights": tiny_weights, **ENGINE}
    out = tmp_path / "out"
    for words, options in (
        ("Two bounds", {"at_least": 0.9, "at_most_ms": 3.0}),
        ("minutes is", {"minutes": 0.0}),
        ("between 0 and 1", {"at_least": 98.0}),
        ("more than 0 ms", {"at_most_ms": 0.0}),
        ("requires a sparse model", {"at_least": 0.9, "teacher": TINY}),
        ("more than 0", {"at_most_ms": float("nan")}),
        ("metric is", {"at_least": 0.9, "metric": "top1"}),
        ("precision is", {"at_least": 0.9, "precisions": ["fp16"]}),
        ("cannot be combined with a backend", {"at_least": 0.9, "board": "t4"}),
        ("no board", {"at_least": 0.9, "board": "orin", "backends": [], "compute_precisions": []}),
        ("onnxruntime does not support the compute precision fp16", {"at_least": 0.9, "compute_precisions": ["fp16"]}),
        ("does not run on the processor", {"at_least": 0.9, "backends": ["tensorrt-rtx"]}),
    ):
        with pytest.raises(ConfigError, match=words):
            flat.optimize(TINY, folder, out, **(given | options))
    with pytest.raises(ConfigError, match="has 3 images"):
        flat.optimize(TINY, pictures, out, at_least=0.9, **given)
    assert not out.exists()
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(ConfigError, match="is a file"):
        flat.optimize(TINY, folder, file, at_least=0.9, **given)
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty"):
        flat.optimize(TINY, folder, out, at_least=0.9, **given)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_an_engine_that_refuses_the_model_is_left_out_and_said(
    tmp_path: Path, tiny_student: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenVINO rejects our operators like this on processors that have fp16."""
    opened, refusing = whole.session_on, ["openvino"]

    def refused(found: Bundle, execution: Execution) -> Session:
        if execution.backend in refusing:
            raise BackendError("It runs in fp32, not fp16.", "Choose another.")
        return opened(found, execution)

    monkeypatch.setattr(whole, "session_on", refused)
    student, kept = load_student(tiny_student), list[Attempt]()
    dense, clock = dense_twin(student), Clock(600)
    options = OptimizeOptions(at_least=0.9, backends=BACKENDS, compute_precisions=["auto"], precisions=["fp32"])
    request = read_request(options, folder)
    trial = Trial(student, dense.model, [*request.images, *request.reserved], "patches")
    with whole.WholeModels(tmp_path, student, dense, request.images, None, clock) as models:
        search = Search(request, trial, models, clock, 3, kept.append)
        plan = first_plan(search)
        assert search.excluded == dict.fromkeys(request.deployments[:1], "It runs in fp32, not fp16.")
        assert [str(found.deployment) for found in search.attempts] == ["onnxruntime, fp32"]
        assert search.attempts == kept
        refusing.append("onnxruntime")
        search.attempts.clear()
        with pytest.raises(BackendError, match="not fp16"):
            search.try_out(plan, request.deployments[1])
