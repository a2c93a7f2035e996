"""A whole search on a small model: what is written, gone on from, refused."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sparsifiner_edge as se
from sparsifiner_edge.artifacts import kind_of
from sparsifiner_edge.cli.main import main
from sparsifiner_edge.config import keep_text, merge_text, parse_merge
from sparsifiner_edge.errors import ConfigError, SparsifinerError
from sparsifiner_edge.images import list_images
from sparsifiner_edge.profiles.estimate import estimate_bundle
from sparsifiner_edge.records import Unavailable
from sparsifiner_edge.report import write_report
from sparsifiner_edge.results import read_result
from sparsifiner_edge.search import finalists
from sparsifiner_edge.search.asked import Asked, what_is_asked
from sparsifiner_edge.search.explore import STATE_SCHEMA, Search
from sparsifiner_edge.search.finalists import Contender, Stopwatch
from sparsifiner_edge.search.front import Finalist, SearchResult
from sparsifiner_edge.search.latency import Deployment
from sparsifiner_edge.search.plan import LayerPlan
from sparsifiner_edge.search.search import _place, _state
from sparsifiner_edge.search.start import start_of
from sparsifiner_edge.search.trial import Trial
from sparsifiner_edge.sparse.student import load_student
from tests.commands import call, handlers_kept
from tests.models import TINY
from tests.once import Once

ENGINE: dict[str, Any] = {"backends": ["onnxruntime"], "precisions": ["fp32"]}
PLAIN = ("--backend", "onnxruntime", "--precision", "fp32")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch's exporter, about its own calls


@pytest.fixture(scope="module")
def photographs(once: Once) -> Path:
    """Ten smooth images."""

    def draw(folder: Path) -> None:
        for number in range(10):
            coarse = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((160, 160), Image.Resampling.BICUBIC).save(folder / f"{number}.png")

    return once("photographs", draw)


@pytest.fixture(scope="module")
def found(once: Once, tiny_weights: Path, photographs: Path) -> Path:
    """The folder of a search by fidelity, which the command made; what it said lies beside it."""
    asked = ("search", TINY, "--weights", tiny_weights, "--data", photographs, *PLAIN, "--at-least", "0.97")

    def search(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
            patch.setattr(finalists, "SECONDS", 0.2)
            with handlers_kept(), pytest.raises(SystemExit) as caught:
                main([*map(str, asked), "-o", str(folder / "found")])
        assert caught.value.code == 0
        (folder / "said").write_text(said.getvalue())

    return once("search", search) / "found"


@pytest.fixture
def again(found: Path, tmp_path: Path) -> Path:
    """A copy of it, to go on from."""
    return shutil.copytree(found, tmp_path / "again")


@pytest.fixture(autouse=True)
def shortly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole models are timed for a moment."""
    monkeypatch.setattr(finalists, "SECONDS", 0.2)


@pytest.mark.everything
@pytest.mark.long
def test_the_answer_is_what_was_asked_for(found: Path, photographs: Path, tiny_weights: Path) -> None:
    front = json.loads((found / "front.json").read_text())
    answer, check = front["statistics"]["answer"], front["statistics"]["check"]
    assert answer["fidelity"] >= 0.97
    assert check["images"] == 2
    assert kind_of(found / "bundle") == "bundle"
    assert kind_of(found / "student") == "student"
    with Image.open(found / "front.png") as picture:
        assert picture.width == 800
    images = front["method"]["images"]
    assert not set(images["searched"]) & set(images["checked"])
    assert len(images["searched"]) == 8
    # What `evaluate` says of it, on the images that it was judged by.
    judged = [photographs / name for name in images["tried"]]
    again = se.evaluate_student(found / "bundle", judged, against=TINY, weights=tiny_weights)
    assert again.statistics["patches_cosine"].mean.value == pytest.approx(answer["fidelity"], abs=1e-4)
    again = se.evaluate_student(found / "student", judged, against=TINY, weights=tiny_weights)
    assert again.statistics["patches_cosine"].mean.value == pytest.approx(answer["fidelity"], abs=1e-3)
    # One that merges nowhere says so by no rates; on a busy machine such a plan may be the fastest of so small a model.
    rates = parse_merge(answer["merge"])
    assert load_student(found / "student").sparsity.merge == (rates if any(rates) else ())
    points = front["statistics"]["points"]
    assert any(point["on_front"] for point in points)
    assert all(0 < point["fidelity"] <= 1 for point in points)
    assert len(front["samples"]["check"]) == 2
    typed = read_result(found / "front.json", SearchResult).statistics
    assert isinstance(typed.answer, Finalist)
    assert typed.answer.merge == answer["merge"]


@pytest.mark.everything
@pytest.mark.long
def test_a_search_goes_on_beside_rivals_and_another_is_refused(
    again: Path, photographs: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = json.loads((again / "search.json").read_text())["seen"]
    measured_now: list[LayerPlan] = []
    distances = Trial.distances
    monkeypatch.setattr(Trial, "distances", lambda self, plan: measured_now.append(plan) or distances(self, plan))
    before = json.loads((again / "front.json").read_text())["statistics"]["answer"]
    rival = shutil.copytree(again / "bundle", tmp_path / "rival")
    result = se.search_model(
        TINY, photographs, again, at_most_ms=1e5, weights=tiny_weights, against=[rival], **ENGINE
    )  # fmt: skip
    known = {LayerPlan(tuple(row["merge"]), tuple(row["keep"])) for row in seen}
    assert not known & set(measured_now)
    assert result.statistics.answer.fidelity > 0.97
    (row,) = result.statistics.rivals
    # It was the answer, judged by the same images.
    assert row.fidelity == pytest.approx(before["fidelity"], abs=1e-6)
    assert row.ms.value > 0
    assert result.statistics.drift.keys() == result.statistics.dense_ms.keys()
    assert all(drift > 0 for drift in result.statistics.drift.values())
    with pytest.raises(ConfigError, match="holds another search"):
        se.search_model(TINY, photographs, again, at_least=0.9, metric="class", weights=tiny_weights, **ENGINE)


@pytest.mark.everything
@pytest.mark.long
def test_the_command_says_what_it_found_and_what_is_nearest_to_a_bound_that_nothing_meets(
    found: Path, again: Path, photographs: Path, tiny_weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = (found.parent / "said").read_text()
    assert "Finalists, whole models measured" in said
    assert "On 2 images kept for this" in said
    program, *following = said.splitlines()[-1].removeprefix("Next: ").split()
    assert (program, following.pop()) == ("sparsifiner-edge", "IMAGES/")
    ran = call(capsys, *following, photographs)
    assert (ran.code, len(ran.out.splitlines())) == (0, 10), ran.err
    asked = ("search", TINY, "--weights", tiny_weights, "--data", photographs, *PLAIN, "-o", again)
    done = call(capsys, *asked, "--at-most-ms", "0.0001")
    assert done.code == 1
    assert "no plan meets 0.0001 ms; the nearest has" in done.err
    assert not (again / "bundle").exists(), "an earlier answer is none to this"
    assert not (again / "student").exists()
    assert "unavailable" in json.loads((again / "front.json").read_text())["statistics"]["answer"]


@pytest.mark.everything
@pytest.mark.long
def test_a_board_is_estimated_and_its_page_says_so(again: Path, photographs: Path, tiny_weights: Path) -> None:
    board = {"board": "jetson-orin-nano-8gb", "precisions": ["fp16"]}
    energy = 7.0 * estimate_bundle(again / "bundle", board["board"], precision="fp16").statistics.latency_ms.value
    within = se.search_model(TINY, photographs, again, at_most_mj=energy, weights=tiny_weights, **board)
    answer = within.statistics.answer
    assert (answer.backend, answer.precision) == ("jetson-orin-nano-8gb", "fp16")
    assert "not measured" in answer.ms.interval
    # What `estimate` says of the bundle, which counts every layer by itself.
    assert answer.predicted_ms == pytest.approx(answer.ms.value, rel=0.1)
    assert within.method.watts is not None
    assert within.method.at_most_ms == pytest.approx(energy / within.method.watts)
    for language, words in (("en", "None of them was measured."), ("ja", "実測値は含まれません")):
        write_report([again / "front.json"], again / "page.html", language=language)
        page = (again / "page.html").read_text()
        assert words in page
        assert {"en": "estimated and not measured", "ja": "推定値、未測定"}[language] in page
        assert answer.merge in page
        assert "<svg" in page


def test_the_last_check_suffers_other_corruptions(photographs: Path) -> None:
    def asked(seed: int, corruptions: str | None) -> Asked:
        engine = ("patches", None, ["onnxruntime"], ["fp32"], None)
        found = what_is_asked((0.9, None, None), *engine, photographs, seed, corruptions, "3" if corruptions else None)
        return found.judged_by(100)

    common = asked(0, "common")
    tried = common.suffered(common.images.tried)
    checked = common.suffered(common.images.checked, len(tried))
    assert (len(tried), len(checked), len({*tried, *checked})) == (8, 2, 10)
    assert asked(1, "common").suffered(common.images.tried) != tried
    assert common.suffered([Path("x.png")] * 32)[15:30] == common.suffered([Path("x.png")] * 15)
    clean = asked(0, None)
    assert clean.suffered(clean.images.tried) == []


def test_the_score_novelty_is_fitted_to_more_images_than_predictors(
    photographs: Path, tiny_weights: Path, tmp_path: Path
) -> None:
    made = start_of(TINY, tmp_path, tiny_weights, None, None, list_images(photographs), (), None)
    found = load_student(made)
    assert found.novelty is not None
    assert (found.novelty.images, found.provenance.calibration.images) == (10, 8)


@pytest.mark.everything
@pytest.mark.long
def test_fidelity_may_be_asked_for_under_a_corruption(
    photographs: Path, tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("search", TINY, "--weights", tiny_weights, "--data", photographs, "--board", "jetson-orin-nano-8gb")
    bound = ("--precision", "fp16", "--at-least", "0.95", "--minutes", "1")
    done = call(capsys, *asked, *bound, "--corruptions", "fog", "--severity", "3", "-o", tmp_path / "found")
    assert done.code == 0, done.err
    assert "every image under one of 1 corruptions" in " ".join(done.out.split())
    found = read_result(tmp_path / "found/front.json", SearchResult)
    assert found.method.corruptions == ["fog 3"]
    # What `evaluate` says of the student on the same images, in the same fog.
    judged = [photographs / name for name in found.method.images["tried"]]
    again = se.evaluate_student(
        tmp_path / "found/student", judged, against=TINY, weights=tiny_weights, corruptions="fog", severity="3"
    )
    fidelity = again.statistics.stability["patches"]["fog 3"].subject
    assert fidelity == pytest.approx(found.statistics.answer.fidelity, abs=1e-3)
    assert fidelity != pytest.approx(again.statistics.clean["patches"]["subject"], abs=1e-6)
    assert fidelity >= 0.95


@pytest.mark.everything
@pytest.mark.long
def test_ctrl_c_keeps_the_front_so_far(
    again: Path, photographs: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = json.loads((again / "search.json").read_text())
    state["seen"] = state["seen"][:5]  # of twelve layers alone, which are always measured
    (again / "search.json").write_text(json.dumps(state))
    distances, left = Trial.distances, iter(range(3))

    def interrupted(self: Trial, plan: LayerPlan) -> list[float]:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return distances(self, plan)

    monkeypatch.setattr(Trial, "distances", interrupted)
    before = (again / "front.json").read_text()
    with pytest.raises(KeyboardInterrupt):
        se.search_model(TINY, photographs, again, at_least=0.97, weights=tiny_weights, **ENGINE)
    assert (again / "front.json").read_text() == before, "it goes with the answer that lies there"
    shutil.rmtree(again / "bundle")
    with pytest.raises(KeyboardInterrupt):
        se.search_model(TINY, photographs, again, at_least=0.97, weights=tiny_weights, **ENGINE)
    front = json.loads((again / "front.json").read_text())["statistics"]
    assert len(front["points"]) == 8
    assert "the same command goes on" in front["answer"]["unavailable"]


@pytest.mark.everything
@pytest.mark.long
def test_a_student_is_trained_for_the_points_of_a_front(
    again: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # On a busy machine the front of so small a model may have a point alone, or one alone that is near its answer.
    front = json.loads((again / "front.json").read_text())
    for point in front["statistics"]["points"][-3:]:
        point |= {"on_front": True, "fidelity": front["statistics"]["finalists"][0]["fidelity"]}
    (again / "front.json").write_text(json.dumps(front))
    settings = ["distil.steps=2", "batch=2", "images.held_out=2", "check_every=2", "losses.logits=0"]
    done = call(
        capsys, "distill", again / "start", "--data", photographs, "--budgets", again / "front.json",
        *(word for setting in settings for word in ("--set", setting)), "--json", "-o", tmp_path / "better",
    )  # fmt: skip
    assert done.code == 0, done.err
    judged = json.loads(done.out)["fidelity"]["budgets"]
    points = {(p["merge"], p["keep"]) for p in front["statistics"]["points"]}
    assert 2 <= len(judged) <= 6
    for row in judged:
        keep = row["keep"] if isinstance(row["keep"], list) else [row["keep"]]
        rates = tuple(row["merge"]) or (0,) * 6
        assert (merge_text(rates), keep_text(tuple(keep))) in points
    trained = load_student(tmp_path / "better")
    assert trained.sparsity == load_student(again / "start").sparsity, "every layer still has its predictor"
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    done = call(capsys, "distill", again / "start", "--data", photographs, "--budgets", bad, "-o", tmp_path / "no")
    assert done.code == 2
    assert not (tmp_path / "no").exists()


def test_energy_is_bounded_by_the_power_that_a_sensor_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contender, stopwatch = Contender(tmp_path, Deployment("onnxruntime", "fp32")), Stopwatch(None, None)

    def profiled(power: Any) -> Any:
        return lambda *_, **__: SimpleNamespace(statistics=SimpleNamespace(subject=SimpleNamespace(energy=power)))

    monkeypatch.setattr(finalists, "profile_bundle", profiled(SimpleNamespace(mean_w=12.5)))
    assert stopwatch.watts(contender) == 12.5
    monkeypatch.setattr(finalists, "profile_bundle", profiled(Unavailable("no sensor")))
    with pytest.raises(ConfigError, match="cannot be read here: no sensor"):
        stopwatch.watts(contender)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seen": [{"merge": [0], "keep": [1], "distances": [float("nan")]}]}, "is nan"),
        ({"seen": [{"merge": ["x"], "keep": [1], "distances": [0]}]}, "not int"),
        ({"seen": [{"merge": [-1], "keep": [1], "distances": [0]}]}, "is -1"),
        ({"seen": [{"merge": [0], "keep": [2], "distances": [0]}]}, "is 2"),
        ({"seen": [{"merge": [0], "keep": [1], "distances": [0]}]}, "not of 2 layers and 1 images"),
        ({"seen": [{"merge": [0, 0], "keep": [1, 1], "distances": [0, 0]}]}, "not of 2 layers and 1 images"),
        ({"seen": 5}, "seen is 5"),
        ({"about": {"source": "other"}}, "holds another search"),
    ],
)
def test_what_a_search_goes_on_from_is_checked(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    file = tmp_path / "search.json"
    file.write_text(json.dumps({"schema_version": STATE_SCHEMA, "about": {"source": "x"}} | change))
    with pytest.raises(SparsifinerError, match=said):
        Search(SimpleNamespace(selects=[True, True], images=1), _state(tmp_path, {"source": "x"}), file, None)


def test_a_search_is_known_however_its_paths_are_spelt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "student").mkdir()
    monkeypatch.chdir(tmp_path)
    spelt = ["student", "./student/", Path("student/../student"), tmp_path / "student"]
    assert {_place(name) for name in spelt} == {str(tmp_path / "student")}
    assert (_place("vit_small"), _place(None)) == ("vit_small", None)


def test_what_is_refused(tmp_path: Path, photographs: Path, tiny_weights: Path, pictures: Path) -> None:
    given: dict[str, Any] = {"weights": tiny_weights, **ENGINE}
    out = tmp_path / "out"
    for words, options in (
        ("one bound", {}),
        ("one bound", {"at_least": 0.9, "at_most_ms": 3.0}),
        ("between 0 and 1", {"at_least": 98.0}),
        ("more than 0", {"at_most_ms": 0.0}),
        ("is for a student", {"at_least": 0.9, "teacher": TINY}),
        ("one bound", {"at_most_mj": 5.0, "at_least": 0.9}),
        ("more than 0", {"at_most_mj": float("nan")}),
        ("metric is", {"at_least": 0.9, "metric": "top1"}),
        ("goes with", {"at_least": 0.9, "task": "maps"}),
        ("severity is that of", {"at_least": 0.9, "severity": "3"}),
        ("'mist' is unknown", {"at_least": 0.9, "corruptions": "mist"}),
        ("precision is", {"at_least": 0.9, "precisions": ["fp16"]}),
        ("no backend", {"at_least": 0.9, "board": "t4"}),
        ("no board", {"at_least": 0.9, "board": "orin", "backends": []}),
        ("does not run on the processor", {"at_least": 0.9, "backends": ["tensorrt-rtx"]}),
    ):
        with pytest.raises(ConfigError, match=words):
            se.search_model(TINY, photographs, out, **(given | options))
    with pytest.raises(ConfigError, match="has 3 images"):
        se.search_model(TINY, pictures, out, at_least=0.9, **given)
    assert not out.exists()
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(ConfigError, match="is a file"):
        se.search_model(TINY, photographs, file, at_least=0.9, **given)
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds something else"):
        se.search_model(TINY, photographs, out, at_least=0.9, **given)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
