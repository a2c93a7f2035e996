"""Tests of complete searches on a small model: output, interruption and rejected input."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
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
from sparsifiner_edge.export.export import ExportOptions
from sparsifiner_edge.optimizer import models, search, subject
from sparsifiner_edge.optimizer.clock import Clock, TimeIsUpError
from sparsifiner_edge.optimizer.family import family
from sparsifiner_edge.optimizer.models import Models, Stopwatch
from sparsifiner_edge.optimizer.request import OptimizeOptions, read_request
from sparsifiner_edge.optimizer.search import Search, choose_deployments
from sparsifiner_edge.optimizer.subject import Subject
from sparsifiner_edge.optimizer.trial import Trial
from sparsifiner_edge.pareto import Candidate, Deployment, Interim, Lever, ParetoFront, SearchMethod, SearchResult
from sparsifiner_edge.profiles.estimate import estimate_bundle
from sparsifiner_edge.profiles.stats import quantity
from sparsifiner_edge.records import Unavailable, write_record
from sparsifiner_edge.report import write_report
from sparsifiner_edge.results import Subject as File
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
            patch.setattr(models, "THOROUGH", models.QUICK)
            with handlers_kept(), pytest.raises(SystemExit) as caught:
                main([*map(str, asked), "-o", str(place / "found")])
        assert caught.value.code == 0
        (place / "said").write_text(said.getvalue())

    return once("optimize", run) / "found"


@pytest.fixture(autouse=True)
def shortly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the timing of complete models."""
    monkeypatch.setattr(models, "THOROUGH", models.QUICK)


@pytest.mark.everything
@pytest.mark.long
def test_the_answer_is_what_was_asked_for(found: Path, folder: Path, tiny_weights: Path) -> None:
    result = read_result(found / "front.json", SearchResult)
    front, images = result.statistics, result.method.images
    assert isinstance(front.answer, Candidate)
    assert front.answer == front.finalists[0]
    assert front.answer.held_out_fidelity >= 0.97
    assert (front.unverified, front.left_out) == ([], {})
    assert (kind_of(found / "bundle"), kind_of(found / "student")) == ("bundle", "student")
    assert not set(images["search"]) & set(images["held_out"])
    assert set(images["selection"]) <= set(images["search"])
    assert (len(images["search"]), len(images["held_out"])) == (8, 4)
    assert {len(values) for values in result.samples.values()} == {4}
    assert front.answer.fidelity >= 0.97
    # `evaluate` gives the same: on all images, and on those held out.
    every = images["search"] + images["held_out"]
    for names, fidelity in ((every, front.answer.fidelity), (images["held_out"], front.answer.held_out_fidelity)):
        judged = [path for path in sorted(folder.rglob("*.png")) if path.name in names]
        again = flat.evaluate_student(found / "bundle", judged, against=TINY, weights=tiny_weights)
        assert again.statistics["patches_cosine"].mean.value == pytest.approx(fidelity, abs=1e-4)
    # A plan without merging has no rates; on a busy machine it may be the fastest of so small a model.
    rates = parse_merge(front.answer.merge)
    assert load_student(found / "student").sparsity.merge == (rates if any(rates) else ())
    assert any(point.pareto_optimal for point in front.points)
    assert all(0 < point.fidelity <= 1 and point.ms > 0 for point in front.points)
    assert {point.deployment for point in front.points} == {"onnxruntime, fp32"}
    changes = [lever.change for lever in front.levers]
    assert changes[:1] == ["dense model"]
    assert front.levers[-1].candidate.ms == front.answer.ms
    assert front.speed_up == pytest.approx(front.dense[0].ms.value / front.answer.ms.value)
    assert open_bundle(found / "bundle").manifest.intended == Intended("onnxruntime")
    assert {"front.png", "report.html", "start"} <= {path.name for path in found.iterdir()}
    assert result.method.seconds < 60 * result.method.minutes
    said = (found.parent / "said").read_text()
    headline = r"\d+\.\d\d times faster than the dense model at a patch cosine of 0\.9\d\d \(onnxruntime, fp32\)\."
    assert re.fullmatch(headline, said.splitlines()[0])
    assert "Full models, measured in turn" in said
    assert "What each change contributes, one after the other" in said
    assert "fidelity on 4 held out" in said
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
    assert "The nearest plan is " in done.err
    assert kind_of(tmp_path / "other" / "bundle") == "bundle"
    front = read_result(tmp_path / "other" / "front.json", SearchResult).statistics
    assert isinstance(front.answer, Unavailable)
    assert front.answer.why.startswith("no plan meets 0.0001 ms; the nearest has")
    assert done.out.startswith(f"No answer: {front.answer.why}.\n")
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
    same = [point.ms for point in within.statistics.points if (point.merge, point.keep) == (answer.merge, answer.keep)]
    assert all(ms == pytest.approx(answer.ms.value, rel=0.1) for ms in same), "of the plan before it was exported"
    assert (within.statistics.levers, within.statistics.unverified) == ([], [])
    assert any("The dense model is at least as fast" in remark for remark in within.statistics.remarks)
    for language, words in (("en", "None of them was measured."), ("ja", "実測値は含まれません")):
        write_report([out / "front.json"], out / "page.html", language=language)
        assert words in (out / "page.html").read_text()


@pytest.mark.everything
@pytest.mark.long
@pytest.mark.parametrize("ended_by", ["the event", "Ctrl-C", "the cap"])
def test_what_was_found_by_then_is_there(
    folder: Path, tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended_by: str
) -> None:
    """The best result so far is kept if the search is stopped or does not end; also outside the main thread."""
    stop, begun, results = threading.Event(), time.monotonic(), list[SearchResult]()

    def interrupted(state: Search, *_: Any) -> Any:
        assert state.attempts, "a first bundle exists"
        if ended_by == "Ctrl-C":
            raise KeyboardInterrupt
        if ended_by == "the event":
            stop.set()
        working(state.clock)

    def optimize() -> None:
        options = {"at_least": 0.97, "minutes": minutes, "weights": tiny_weights, **ENGINE}
        results.append(flat.optimize(TINY, folder, tmp_path / "found", stop=stop, **options))

    monkeypatch.setattr(search, "better_shape", interrupted)
    minutes = 1.0 if ended_by == "the cap" else 8.0
    if ended_by == "Ctrl-C":
        optimize()
    else:  # Only the main thread may set signal handlers.
        thread = threading.Thread(target=optimize)
        thread.start()
        thread.join()
    (found,) = results
    assert isinstance(found.statistics.answer, Candidate)
    assert (found.statistics.unverified, found.method.settled) == ([], False)
    assert kind_of(tmp_path / "found" / "bundle") == "bundle"
    assert write_record(read_result(tmp_path / "found" / "front.json", SearchResult)) == write_record(found)
    assert time.monotonic() - begun < 60 * minutes + 1
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL


@pytest.mark.everything
@pytest.mark.long
def test_a_module_in_memory_becomes_a_bundle_and_stays_as_it_is(folder: Path, tmp_path: Path) -> None:
    module, images = Depth().eval(), sorted(folder.rglob("*.png"))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    found = flat.optimize(module, images[:8], tmp_path / "found", at_least=0.5, minutes=2, **ENGINE)
    assert isinstance(found.statistics.answer, Candidate)
    assert isinstance(found.subjects[0].path, Unavailable)
    assert not {"student", "start"} & {path.name for path in (tmp_path / "found").iterdir()}
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert "8 images give only a rough estimate" in " ".join(found.statistics.remarks)
    with flat.open_session(tmp_path / "found" / "bundle") as session:
        assert session.description.backend == "onnxruntime"


def working(clock: Clock, until: Callable[[], object] = lambda: False) -> None:
    """Work on and report progress, until something is true or the clock ends it."""
    while not until():
        clock.tell("working")
        time.sleep(0.001)


def test_time_ends_the_block_and_code_of_others_cannot_take_it() -> None:
    told, clock = list[str](), Clock(0.5, lambda stage, *_: told.append(stage))
    with clock.searching():
        with contextlib.suppress(Exception):
            working(clock)
        told.append("never")
    assert not issubclass(TimeIsUpError, Exception)
    assert set(told) == {"working"}
    assert 0.3 < clock.elapsed_s < 10
    assert not clock.fits()
    clock.tell("closing")  # After the block, nothing ends.
    assert told[-1] == "closing"
    with pytest.raises(ZeroDivisionError), Clock(10).searching():
        _ = 1 / 0


def test_the_time_for_the_last_measurement_is_kept() -> None:
    """A step that takes longer than expected ends there."""
    clock, told = Clock(600), list[str]()
    with clock.searching():
        clock.tell("first")
        told.append("first")
        clock.reserve_s = clock.remaining
        clock.tell("second")
        told.append("second")
    assert told == ["first"]
    clock.tell("closing")


def test_a_clock_ends_its_own_block_only() -> None:
    outer, inner, passed = Clock(600), Clock(0.2), list[str]()
    with outer.searching():
        with inner.searching():
            working(inner)
        passed.append("after the inner block")
        outer.tell("on")
    assert passed
    short, long = Clock(0.2), Clock(600)
    with short.searching():
        with long.searching():
            working(short)
        short.tell("over")
        passed.append("never")
    assert passed == ["after the inner block"]
    assert long.elapsed_s < 10


def test_clocks_of_threads_are_apart() -> None:
    ended = dict[str, float]()

    def search_for(name: str, clock: Clock) -> None:
        with clock.searching():
            working(clock)
        ended[name] = clock.elapsed_s

    stop = threading.Event()
    clocks = {"short": Clock(0.2), "long": Clock(1.0), "stopped": Clock(600, stop=stop)}
    threads = [threading.Thread(target=search_for, args=each) for each in clocks.items()]
    for thread in threads:
        thread.start()
    threads[1].join()
    assert set(ended) == {"short", "long"}
    assert ended["short"] < ended["long"]
    assert ended["long"] > 0.8
    stop.set()
    threads[2].join()
    assert "stopped" in ended


@pytest.fixture
def alarms() -> Iterator[list[int]]:
    """Times of the alarms of a host that has its own handler."""
    fired = list[int]()

    def ring(number: int, _frame: object) -> None:
        fired.append(number)

    before = signal.signal(signal.SIGALRM, ring)
    try:
        yield fired
        assert signal.getsignal(signal.SIGALRM) is ring
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_an_alarm_of_the_host_rings_during_a_search_and_after(alarms: list[int]) -> None:
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    clock, handler = Clock(600), signal.getsignal(signal.SIGALRM)
    with clock.searching():
        working(clock, lambda: len(alarms) > 1)
        assert signal.getsignal(signal.SIGALRM) is handler
    assert signal.getitimer(signal.ITIMER_REAL)[1] == pytest.approx(0.05)
    rung = len(alarms)
    working(clock, lambda: len(alarms) > rung)


@pytest.mark.parametrize("stopped", [True, False])
def test_a_search_is_stopped_where_it_next_reports(stopped: bool) -> None:
    stop, passed = threading.Event(), list[str]()
    clock = Clock(600, stop=stop)
    with clock.searching():
        clock.tell("first")
        passed.append("before")
        if stopped:
            stop.set()
            passed.append("between")
            clock.tell("second")
        else:
            raise KeyboardInterrupt
        passed.append("never")
    assert passed == ["before", "between"][: 1 + stopped]
    clock.tell("closing")
    with clock.step("closing", "closing"):
        passed.append("the answer is written")
    assert clock.took("closing") > 0


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
    for few, count in ((pictures, 3), (sorted(folder.rglob("*.png"))[:7], 7)):
        with pytest.raises(ConfigError, match=rf"has {count} images\.\n  Give 8 or more: 4 are held out"):
            flat.optimize(TINY, few, out, at_least=0.9, **given)
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
    opened, refusing = subject.session_on, ["openvino"]

    def refused(found: Bundle, execution: Execution) -> Session:
        if execution.backend in refusing:
            raise BackendError("It runs in fp32, not fp16.", "Choose another.")
        return opened(found, execution)

    monkeypatch.setattr(subject, "session_on", refused)
    student = load_student(tiny_student)
    dense, clock = dense_twin(student), Clock(600)
    options = OptimizeOptions(at_least=0.9, backends=BACKENDS, compute_precisions=["auto"], precisions=["fp32"])
    request = read_request(options, folder)
    trial = Trial(student, dense.model, [*request.images, *request.reserved], "patches")
    files = Models(tmp_path, student, dense, clock, request.images, ExportOptions())
    shape, scale = family(student)
    plan = shape.plan(scale, student.backbone.patches)
    with Stopwatch(clock) as stopwatch:
        measured = Subject(trial, files, stopwatch, clock, None, len(request.images))
        first, second = (Search(request, measured, clock, lambda _: None) for _ in range(2))
        assert [str(found) for found in choose_deployments(first, plan, request.deployments[1])] == [
            "onnxruntime, fp32"
        ]
        assert first.excluded == dict.fromkeys(request.deployments[:1], "It runs in fp32, not fp16.")
        refusing.append("onnxruntime")
        with pytest.raises(BackendError, match="not fp16"):
            choose_deployments(second, plan, request.deployments[1])


def candidate(ms: float, **changes: Any) -> Candidate:
    """Return a row of a result."""
    plan = {"merge": "9", "keep": "0.1,1", "backend": "openvino", "precision": "int8", "compute_precision": "auto"}
    errors: Any = {"fidelity": 0.983, "held_out_fidelity": 0.981, "file_bytes": 10**7}
    return Candidate(ms=quantity(ms, ms - 1, ms + 1, "in turn"), **{**plan, **errors, **changes})


def a_result(**changes: Any) -> SearchResult:
    """Return a result of a search."""
    images = {"search": ["a.png"], "selection": ["a.png"], "held_out": ["b.png", "c.png"]}
    method = SearchMethod(metric="patches", at_least=0.98, images=images, minutes=8, seconds=9, settled=True)
    dense = candidate(20, merge="0", keep="1", precision="fp32", held_out_fidelity=1.0)
    content: dict[str, Any] = {
        "points": [],
        "finalists": [candidate(10)],
        "answer": candidate(10),
        "check": quantity(0.981, 0.97, 0.99, "gamma"),
        "dense": [dense],
        "levers": [Lever(change="dense model", candidate=dense), Lever(change="+ int8", candidate=candidate(10))],
        "unverified": [],
        "left_out": {},
        "remarks": [],
    }
    front = ParetoFront(**content | {name: value for name, value in changes.items() if name in content})
    return SearchResult("search", [File(path="model", sha256="0" * 64)], method, {}, front)


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        ({}, 0, ["2.00 times faster than the dense model at a patch cosine of 0.981 (openvino, int8)."]),
        (
            {"unverified": ["There are few images.", "There was no time."], "dense": [], "levers": []},
            1,
            [
                "Not verified: There are few images.",
                "Not verified: There was no time.",
                "10.0 ms at a patch cosine of 0.981 (openvino, int8).",
            ],
        ),
        ({"answer": Unavailable("no plan meets 3 ms")}, 1, ["No answer: no plan meets 3 ms."]),
    ],
)
def test_what_the_command_prints_first_and_its_exit_code(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: Any,
    code: int,
    said: Any,
) -> None:
    stops, result = list[object](), a_result(**changes)

    def found(*_: Any, stop: object, better: Callable[[Interim], None], **__: Any) -> SearchResult:
        stops.append(stop)
        better(
            Interim("8..0", "0.1,1", Deployment("openvino", "int8"), 0.984, 20.0, Deployment("openvino", "int8"), 30)
        )
        return result

    monkeypatch.setattr("sparsifiner_edge.optimize", found, raising=False)
    done = call(capsys, "optimize", TINY, "--data", tmp_path, "-o", tmp_path / "out")
    assert (done.code, done.out.splitlines()[: len(said)]) == (code, said), done
    interim = "So far: 1.50 times faster than the dense model at a patch cosine of 0.984 (openvino, int8)."
    assert interim in " ".join(done.err.split())
    assert "fidelity on 2 held out" in done.out
    assert ("What each change contributes, one after the other" in done.out) == bool(result.statistics.levers)
    assert ("Answer: " in done.out) == isinstance(result.statistics.answer, Candidate)
    assert isinstance(stops[0], threading.Event), "Ctrl-C sets it"
