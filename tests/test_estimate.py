"""The estimate: what it reads, what must hold whatever the constants, and that the constants are those of the fit."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import boards_expected
from benchmarks import estimate_fit as fitting
from sparsifiner_edge.artifacts import BUNDLE_FILE
from sparsifiner_edge.bundle.kernels import table_file
from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.costs import MAC_KINDS, ModelShape, summary
from sparsifiner_edge.errors import ArtifactError, BackendError
from sparsifiner_edge.profiles import roofline
from sparsifiner_edge.profiles.boards.board import Board, load_board
from sparsifiner_edge.profiles.estimate import estimate_model, memory_bytes, model_of, peak_activations
from sparsifiner_edge.profiles.roofline import CPU_FIT, GPU_FIT, IDEAL, Workload
from sparsifiner_edge.records import write_record
from tests.commands import assert_refused, process
from tests.plain import estimate_bundle, read_result
from tests.seal import seal_bundle
from tests.tiny import make_bundle

pytestmark = pytest.mark.slow

VIT_S = ModelShape(12, 6, 384, 1536, 1, 1369, 14)
DENSE = SparsityConfig(keep=1)
EDGE = SparsityConfig(keep=0.1, cells=25)
BOARDS = st.sampled_from(["jetson-orin-nano-8gb", "jetson-agx-thor", "jetson-xavier-nx", "rtx-4090", "a100"])


def counted(
    folder: Path, shape: ModelShape = VIT_S, sparsity: SparsityConfig = DENSE, costs: Any = None, **manifest: Any
) -> Path:
    """A bundle whose manifest speaks of a larger model than its file holds."""
    sparse = not sparsity.is_dense
    content = {
        "shape": dataclasses.asdict(shape),
        "tokens": {"prefix": shape.prefix, "grid": [1, shape.patches]},
        "sparsity": sparsity.to_dict() if sparse else None,
        "ops": {"sparsifiner::KeySelect": 1} if sparse else {},
        "costs": summary(shape, sparsity) if costs is None else costs,
        "dense_costs": summary(shape, DENSE),
    }
    return make_bundle(folder, batch=1, **(content | manifest))


def changed(folder: Path, change: dict[str, Any]) -> Path:
    """The bundle with other entries in its manifest, sealed again."""
    manifest = json.loads((folder / BUNDLE_FILE).read_text()) | change
    (folder / BUNDLE_FILE).unlink()
    seal_bundle(folder, {name: value for name, value in manifest.items() if name != "files"})
    return folder


def merged(patches: int = 1369, rate: int = 160, keep: Any = 1.0) -> Workload:
    shape = dataclasses.replace(VIT_S, patches=patches)
    return Workload(shape, SparsityConfig(keep=keep, merge=(rate, 0)), merging="bodies")


def total(work: Workload, board: Board, precision: str = "fp16") -> float:
    return roofline.seconds(roofline.costs(work, board, precision, GPU_FIT if board.kind == "gpu" else CPU_FIT))


@pytest.mark.parametrize(
    "sparsity",
    [
        DENSE,
        EDGE,
        SparsityConfig(keep=0.25, dense_layers=(0, 3)),
        SparsityConfig(keep=1, token_keep=((3, 0.7), (6, 0.7))),
        SparsityConfig(keep=0.2, token_keep=((2, 0.5),), fuse_tokens=True),
        SparsityConfig(keep=1, merge=(20, 0)),
        SparsityConfig(keep=(0.1, 0.2, 1.0), merge=(12,), dense_layers=(1,)),
        SparsityConfig.for_preset("paper", keep=0.25, channels=32),
    ],
)
@pytest.mark.parametrize("shape", [VIT_S, ModelShape(7, 3, 192, 770, 5, 256, 8)])
def test_sizes_are_what_the_manifest_says(tmp_path: Path, sparsity: SparsityConfig, shape: ModelShape) -> None:
    folder = counted(tmp_path / "bundle", shape, sparsity)
    found, settings_found = model_of(open_bundle(folder))
    assert settings_found == sparsity
    assert found == shape
    work = Workload(found, settings_found)
    macs = sum(o.macs for o in roofline.operators(work))
    assert macs == summary(shape, sparsity)["total_macs"]


def test_a_real_bundle_through_the_command_line(tmp_path: Path, tiny_bundle: Path) -> None:
    path = tmp_path / "estimate.json"
    done = process(
        "estimate", tiny_bundle, "--board", "jetson-orin-nano-8gb", "--precision", "fp16", "--json", "-o", path
    )
    assert (done.code, done.err) == (0, "")
    result = json.loads(done.out)
    assert result == read_result(path)
    assert result["kind"] == "estimate"
    assert "not measured" in result["method"]["estimate"]
    assert result["method"]["board"]["name"] == "jetson-orin-nano-8gb"
    assert result["method"]["kernels"]["assumed"] == "portable"
    figures = result["statistics"]
    for name in ("latency_ms", "memory_bytes", "energy_j"):
        assert 0 < figures[name]["low"] < figures[name]["value"] < figures[name]["high"]
    operators = {row["kind"]: row for row in figures["operators"]}
    costs = open_bundle(tiny_bundle).manifest.costs
    assert set(operators) == {"embedding", "projections", "predictor", "attention", "cells", "mlp"}
    assert {kind: row["macs"] for kind, row in operators.items()} == {k: costs[f"{k}_macs"] for k in operators}
    assert sum(row["ms"] for row in operators.values()) == pytest.approx(figures["latency_ms"]["value"])


def test_the_table_says_that_it_is_an_estimate_and_what_is_assumed(tiny_bundle: Path) -> None:
    done = process("estimate", tiny_bundle, "--board", "jetson-orin-nano-8gb-super", "--power-mode", "25W")
    assert (done.code, done.err) == (0, "")
    text = " ".join(done.out.split())
    for part in (
        "ESTIMATE of bundle",
        "Computed, not measured",
        "Sparse operators: portable, because the bundle carries no kernels compiled for SM 87",
        "Fits the board's 8 GB: yes",
        "Not confirmed by any document: tf32_tflops",
    ):
        assert part in text, text


def test_bad_use_is_a_message_and_exit_2(tmp_path: Path, tiny_bundle: Path) -> None:
    refused = {
        "There is no board 'abacus'": [tiny_bundle, "--board", "abacus"],
        "t4 states no peak for fp8": [tiny_bundle, "--board", "t4", "--precision", "fp8"],
        "cpu-generic states no peak for fp16": [tiny_bundle, "--board", "cpu-generic", "--precision", "fp16"],
        "kernels is 'fast'": [tiny_bundle, "--board", "t4", "--kernels", "fast"],
        "no power mode 'MAXN'": [tiny_bundle, "--board", "t4", "--power-mode", "MAXN"],
        "nowhere.toml cannot be read": [tiny_bundle, "--board-file", tmp_path / "nowhere.toml"],
        "is not a folder": [tmp_path / "nowhere", "--board", "t4"],
        "is a folder or a device. Give a file's name": [tiny_bundle, "--board", "t4", "-o", tmp_path],
    }
    for message, arguments in refused.items():
        assert_refused(process("estimate", *arguments), message)


def test_an_altered_bundle_is_refused(tmp_path: Path) -> None:
    altered = counted(tmp_path / "altered")
    (altered / "model.onnx").write_bytes(b"other")
    assert_refused(process("estimate", altered, "--board", "t4"), "does not match its SHA-256")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"costs": None}, "costs is null"),
        ({"costs": {}}, "not those of its model"),
        ({"dense_costs": {**summary(VIT_S, DENSE), "attention_macs": 0}}, "not those of its model"),
        ({"dense_costs": {**summary(VIT_S, DENSE), "mlp_macs": 7}}, "not those of its model"),
        ({"dense_costs": {**summary(VIT_S, DENSE), "attention_macs": -1}}, "not those of its model"),
        ({"dense_costs": {**summary(VIT_S, DENSE), "attention_macs": 10**400}}, "not those of its model"),
        ({"costs": {**summary(VIT_S, DENSE), "cells_macs": 12}}, "not those of its model"),
        ({"shape": None}, "shape is missing"),
        ({"shape": dataclasses.asdict(VIT_S) | {"depth": "x"}}, 'shape.depth is "x", not int'),
        ({"shape": dataclasses.asdict(VIT_S) | {"width": -384}}, "shape.width is -384, not int >= 1"),
        ({"shape": dataclasses.asdict(VIT_S) | {"depth": 1 << 30}}, "shape.depth is 1073741824, not int <= 1024"),
        ({"shape": dataclasses.asdict(VIT_S) | {"hidden": 5}}, "not those of its model"),
        ({"tokens": {"prefix": 1, "grid": ["x"]}}, "tokens.grid is"),
        ({"tokens": {"prefix": 1, "grid": []}}, r"tokens.grid is \[\], not list of length 2"),
        ({"tokens": 3}, "tokens is 3, not dict"),
        ({"precision": 3}, "precision is 3"),
        ({"sparsity": EDGE.to_dict()}, "not those of its model"),
        ({"sparsity": {**EDGE.to_dict(), "tile": 100_000, "probe": 100_000}}, "exceeds the 1369 patches"),
    ],
)
def test_manifests_that_do_not_hold_together(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = counted(tmp_path / "bundle")
    with pytest.raises(ArtifactError, match=message):
        estimate_bundle(changed(folder, change), "t4")


def test_settings_out_of_range_are_a_message(tmp_path: Path) -> None:
    folder = changed(counted(tmp_path / "bundle"), {"sparsity": {"keep": 7}})
    with pytest.raises(ArtifactError, match="keep is 7"):
        estimate_bundle(folder, "t4")


def test_which_kernels_are_assumed(tmp_path: Path) -> None:
    def kernels(folder: Path, board: str, **options: Any) -> str:
        method = estimate_bundle(folder, board, **options)["method"]["kernels"]
        assert method["because"]
        return str(method["assumed"])

    sparse = counted(tmp_path / "sparse", sparsity=EDGE)
    assert kernels(sparse, "rtx-3060") == "portable"
    assert kernels(sparse, "rtx-3060", kernels="native") == "native"
    assert kernels(sparse, "cpu-generic") == "native"
    assert kernels(counted(tmp_path / "dense"), "rtx-3060") == "none"
    carried = counted(tmp_path / "carried", sparsity=EDGE)
    (carried / "kernels").mkdir()
    (carried / table_file(86)).write_text("{}")
    changed(carried, {})
    assert kernels(carried, "rtx-3060") == "native"
    assert kernels(carried, "rtx-4090") == "portable"
    native, portable = (estimate_bundle(f, "rtx-3060")["statistics"]["latency_ms"] for f in (carried, sparse))
    assert portable["value"] > 1.5 * native["value"]
    assert portable["high"] / portable["low"] > native["high"] / native["low"]


def test_a_fixed_batch_costs_more_and_less_for_each(tmp_path: Path) -> None:
    def milliseconds(batch: int) -> float:
        inputs = [{"name": "image", "dtype": "uint8", "shape": [batch, 4, 4, 3]}]
        folder = counted(tmp_path / f"batch{batch}", inputs=inputs)
        return float(estimate_bundle(folder, "a100", precision="fp16")["statistics"]["latency_ms"]["value"])

    one, eight = milliseconds(1), milliseconds(8)
    assert one < eight < 8 * one


def test_precisions_and_what_is_int8() -> None:
    orin = load_board("jetson-orin-nano-8gb")
    assert roofline.other_precision("int8", orin) == "fp16"
    assert roofline.other_precision("fp32", orin) == "fp32"
    assert roofline.other_precision("int8", load_board("cpu-generic")) == "fp32"
    products = {engine: roofline.OperatorWork(0, "mlp", engine, 1e12, 0, 0, 0) for engine in ("linear", "attention")}
    linear, other = (roofline.cost(work, orin, "int8", IDEAL).seconds for work in products.values())
    assert other / linear == pytest.approx(orin.peak("int8") / orin.peak("fp16"))
    times = [total(Workload(VIT_S, DENSE), orin, precision) for precision in ("fp32", "tf32", "fp16", "int8")]
    assert times == sorted(times, reverse=True)


def test_energy_and_memory_are_bounded_by_the_board(tmp_path: Path) -> None:
    folder = counted(tmp_path / "bundle")
    full = estimate_bundle(folder, "jetson-orin-nano-8gb-super", precision="fp16")["statistics"]
    low = estimate_bundle(folder, "jetson-orin-nano-8gb-super", precision="fp16", power_mode="7W")["statistics"]
    assert low["latency_ms"]["value"] > full["latency_ms"]["value"]
    for figures, most in ((full, 25), (low, 7)):
        assert 0.25 * most <= figures["energy_j"]["power_w"] <= most
        assert figures["energy_j"]["high"] == pytest.approx(most * figures["latency_ms"]["high"] / 1e3)
    assert full["fits_memory"] == "yes"
    small = msgspec.structs.replace(load_board("t4"), memory_gb=0.1)
    assert estimate_bundle(folder, small)["statistics"]["fits_memory"] == "no"
    larger = msgspec.structs.replace(small, memory_gb=0.5)
    assert estimate_bundle(folder, larger)["statistics"]["fits_memory"] == "perhaps"


def test_a_stated_idle_power_is_used(tmp_path: Path) -> None:
    board = msgspec.structs.replace(load_board("cpu-generic"), idle_w=15.0)
    energy = estimate_bundle(counted(tmp_path / "bundle"), board)["statistics"]["energy_j"]
    assert energy["power_w"] == 15.0


@settings(max_examples=60, deadline=None)
@given(
    board=BOARDS,
    sparsity=st.sampled_from([DENSE, EDGE]),
    portable=st.booleans(),
    precision=st.sampled_from(["fp32", "fp16", "int8"]),
    bandwidth=st.floats(1, 20),
    peak=st.floats(1, 20),
)
def test_more_of_anything_is_never_slower(
    board: str, sparsity: SparsityConfig, portable: bool, precision: str, bandwidth: float, peak: float
) -> None:
    base, work = load_board(board), Workload(VIT_S, sparsity, portable=portable)
    wider = msgspec.structs.replace(base, bandwidth_gb_s=base.bandwidth_gb_s * bandwidth)
    peaks = {name: getattr(base, name) * peak for name in ("fp32_tflops", "fp16_tflops", "int8_tops")}
    before = total(work, base, precision)
    assert total(work, wider, precision) <= before
    assert total(work, msgspec.structs.replace(base, **peaks), precision) <= before
    ideal = roofline.seconds(roofline.costs(work, base, precision, IDEAL))
    assert 0 < ideal < before


@settings(max_examples=60, deadline=None)
@given(
    board=BOARDS,
    sparsity=st.sampled_from([DENSE, EDGE]),
    portable=st.booleans(),
    patches=st.integers(64, 4000),
    more=st.integers(0, 2000),
    batch=st.integers(1, 8),
)
def test_more_tokens_are_never_faster(
    board: str, sparsity: SparsityConfig, portable: bool, patches: int, more: int, batch: int
) -> None:
    few, many = (
        Workload(dataclasses.replace(VIT_S, patches=count), sparsity, portable=portable)
        for count in (patches, patches + more)
    )
    device = load_board(board)
    assert total(few, device) <= total(many, device)
    assert total(many, device) <= total(dataclasses.replace(many, batch=batch), device)
    for less, greater in zip(peak_activations(few, 2), peak_activations(many, 2), strict=True):
        assert less <= greater


def test_what_merging_costs_by_hand() -> None:
    """Two layers that merge 4 and 2 of 40 patches: tokens, traffic and launches of each."""
    shape = ModelShape(3, 2, 64, 256, 1, 40, 16)
    work = Workload(shape, SparsityConfig(keep=1, merge=(4, 2, 0), merge_window=8))
    found = [o for o in roofline.operators(work) if o.kind == "pruning" and o.layer >= 0]
    assert [(o.layer, o.launches) for o in found] == [(0, 0), (0, 8), (1, 0), (1, 8)]
    ranking, moving = found[:2]
    # Means of keys over the heads' channels, then 20 seekers look at 8 partners of 32 channels.
    assert ranking.macs == 41 * 64 + 20 * 8 * 32
    assert ranking.activations == 41 * 64
    assert moving.activations == 64 * (41 + 37)
    assert (moving.macs, moving.scores) == (0, 0)
    attention = [o.macs for o in roofline.operators(work) if o.kind == "attention"]
    assert attention == [2 * tokens**2 * 64 for tokens in (41, 37, 35)]
    linear = [o.macs for o in roofline.operators(work) if o.kind == "mlp"]
    assert linear == [2 * tokens * 64 * 256 for tokens in (37, 35, 35)]  # After the merge.
    bodies = roofline.operators(dataclasses.replace(work, merging="bodies", batch=3))
    moving = next(o for o in bodies if o.kind == "pruning" and o.launches)
    assert (moving.launches, moving.scores) == (25, 3 * 2 * 20 * 8 * 32)
    compiled = roofline.operators(dataclasses.replace(work, merging="kernels"))
    assert [(o.launches, o.scores) for o in compiled if o.kind == "pruning" and o.launches] == [(10, 0), (10, 0)]
    board = load_board("jetson-orin-nano-8gb")
    launches = sum(o.launches for o in bodies)
    plain = sum(o.launches for o in roofline.operators(Workload(shape, DENSE)))
    assert launches == plain + 2 * 25
    least = launches * GPU_FIT.launch_us * 1e-6
    assert total(dataclasses.replace(work, merging="bodies"), board) > least


@settings(max_examples=60, deadline=None)
@given(board=BOARDS, patches=st.integers(600, 3000), rate=st.integers(0, 100), more=st.integers(0, 40))
def test_merging_more_never_costs_more_in_a_later_layer(board: str, patches: int, rate: int, more: int) -> None:
    def layers(work: Workload) -> dict[tuple[int, str], float]:
        found: dict[tuple[int, str], float] = {}
        for cost in roofline.costs(work, load_board(board), "fp16", GPU_FIT):
            key = cost.operator.layer, cost.operator.kind
            found[key] = found.get(key, 0.0) + cost.seconds
        return found

    less, greater = (
        layers(dataclasses.replace(merged(patches), sparsity=SparsityConfig(keep=1, merge=(r,) + (0,) * 11)))
        for r in (rate, rate + more)
    )
    for key, seconds in greater.items():
        if key[0] > 0 or key[1] in ("mlp", "projections", "attention"):
            assert seconds <= less[key], key
    assert rate or not any(kind == "pruning" for _, kind in less)


def test_nothing_merged_is_the_unmerged_model() -> None:
    """Without a pair, whatever the window and whoever would run it."""
    for base in (DENSE, EDGE):
        for merging in roofline.MERGE_LAUNCHES:
            still = dataclasses.replace(base, merge=(0, 0), merge_window=64)
            work = Workload(VIT_S, still, merging=merging)
            assert roofline.operators(work) == roofline.operators(Workload(VIT_S, base))
            assert peak_activations(work, 2) == peak_activations(Workload(VIT_S, base), 2)


def test_merging_runs_by_bodies_where_there_are_no_kernels_for_it(tmp_path: Path) -> None:
    def launches(board: str, **options: Any) -> float:
        """Of merging, in microseconds at most."""
        result = estimate_bundle(folder, board, **options)
        operators = {o["kind"]: o for o in result["statistics"]["operators"]}
        return float(operators["pruning"]["ms"] * 1e3)

    def carried(names: str) -> Any:
        """By a table for SM 86 of the launches that `names` names, each of the same code."""
        launch = {
            "symbol": "k",
            "grid": [1, 1],
            "threads": 128,
            "shared": 0,
            "inputs": [],
            "outputs": [],
            "tensors": {},
        }
        table = {
            "schema_version": 1,
            "launches": {f"{n}_1": launch | {"kernel": n} for n in names.split()},
            "nodes": {},
        }
        (folder / "kernels").mkdir(exist_ok=True)
        (folder / table_file(86)).write_text(json.dumps(table))
        changed(folder, {})
        return estimate_bundle(folder, "rtx-3060")

    folder = counted(tmp_path / "merged", sparsity=SparsityConfig(keep=0.25, merge=(40, 0)))
    least = 11 * GPU_FIT.launch_us
    assert 10 * least <= launches("rtx-3060", kernels="native") < 25 * least <= launches("rtx-3060", kernels="portable")
    assert launches("rtx-3060") == launches("rtx-3060", kernels="portable")
    found = carried("select attend")
    assert found["method"]["kernels"]["because"].endswith("for SM 86, but none that merge tokens")
    assert launches("rtx-3060") == launches("rtx-3060", kernels="portable")
    assert "none" not in carried("select attend pairs merge")["method"]["kernels"]["because"]
    assert launches("rtx-3060") == launches("rtx-3060", kernels="native")
    assert launches("cpu-generic") < launches("cpu-generic", kernels="portable")
    assert launches("cpu-generic") >= 11 * 8 * CPU_FIT.launch_us


def test_bounds_are_wide_where_tokens_merge_on_a_gpu(tmp_path: Path) -> None:
    """Nobody published what that takes; on a CPU it is as sure as the rest."""
    merging = counted(tmp_path / "merged", sparsity=SparsityConfig(keep=1, merge=(160, 0)))
    plain = counted(tmp_path / "plain")
    width = {}
    for name, folder in (("merged", merging), ("plain", plain)):
        for board, precision in (("jetson-orin-nano-8gb", "fp16"), ("cpu-generic", "fp32")):
            found = estimate_bundle(folder, board, precision=precision)["statistics"]["latency_ms"]
            width[name, board] = found["high"] / found["low"]
    assert width["merged", "jetson-orin-nano-8gb"] > 1.2 * width["plain", "jetson-orin-nano-8gb"]
    assert width["merged", "cpu-generic"] <= CPU_FIT.spread**2


def test_memory_is_of_the_tokens_that_a_layer_sees() -> None:
    """Sparse layers behind a merge gather less; the first layer's other tensors are as large as before."""
    late = (1.0, 1.0, 1.0, 0.1)
    sparsity = SparsityConfig(keep=late, merge=(300, 300, 200) + (0,) * 9)
    work = Workload(VIT_S, sparsity, portable=True, merging="bodies")
    layer, scores = peak_activations(work, 2)
    seen = sparsity.layer_tokens(12, 1369, 1)[3][0]  # The first sparse layer.
    assert seen == 1369 - 300 - 1069 // 4 - 200
    alone = ModelShape(1, 6, 384, 1536, 1, seen, 14)
    _, expected = peak_activations(Workload(alone, SparsityConfig(keep=0.1), portable=True), 2)
    assert scores == max(expected, 4 * (1369 // 2) * 16 * 64)
    assert layer == peak_activations(Workload(VIT_S, DENSE), 2)[0]


@pytest.mark.parametrize("sparsity", [DENSE, EDGE, SparsityConfig(keep=(0.1, 1.0), merge=(160, 0))])
@pytest.mark.parametrize("kernels", ["native", "portable"])
def test_a_model_without_a_bundle_is_estimated_alike(tmp_path: Path, sparsity: SparsityConfig, kernels: str) -> None:
    board = load_board("jetson-agx-orin-64gb")
    bundle = estimate_bundle(counted(tmp_path / "b", sparsity=sparsity), board, precision="fp16", kernels=kernels)
    found = write_record(estimate_model(VIT_S, sparsity, board, "fp16", kernels=kernels))
    statistics = bundle["statistics"]
    for name in ("latency_ms", "energy_j", "operators", "fits_memory"):
        assert found[name] == statistics[name]
    weights = 2 * (12 * 12 * 384**2 + (3 * 14 * 14 + 1370) * 384)
    own = found["memory_bytes"]["value"] - statistics["memory_bytes"]["value"]
    assert own == pytest.approx(1.1 * weights, rel=0.01)  # The bundle's file holds next to nothing.
    with pytest.raises(BackendError, match="kernels is 'fast'"):
        estimate_model(VIT_S, sparsity, board, "fp16", kernels="fast")


def test_the_page_is_what_the_estimate_says(tmp_path: Path) -> None:
    """The tables of docs/boards.md, and budgets that are those of recorded results (or the script raises)."""
    page = tmp_path / "boards.md"
    shutil.copy(boards_expected.PAGE, page)
    boards_expected.renew_page(boards_expected.markdown(boards_expected.all_rows()), page)
    assert page.read_text(encoding="utf-8") == boards_expected.PAGE.read_text(encoding="utf-8")
    assert "othing was measured" in page.read_text(encoding="utf-8")
    page.write_text("no marks")
    with pytest.raises(ValueError, match="marks 0 times"):
        boards_expected.renew_page("", page)


def test_the_constants_are_those_of_the_fit_to_published_figures() -> None:
    points = fitting.published()
    assert len(points) == GPU_FIT.points == 26
    values = fitting.fit(points, fitting.gpu_ratio, fitting.START_GPU)
    for name in ("linear", "attention", "predictor", "int8", "bandwidth", "launch_us"):
        assert getattr(GPU_FIT, name) == pytest.approx(getattr(fitting.gpu_share(values), name), rel=0.01), name
    by_chip = fitting.errors(fitting.left_out(points, fitting.gpu_ratio, fitting.START_GPU, fitting.chip_of))
    assert GPU_FIT.spread == pytest.approx(by_chip["factor_nine_of_ten"], rel=0.01)


def test_a_left_out_board_is_predicted_within_a_quarter() -> None:
    groups = fitting.left_out(fitting.published(), fitting.gpu_ratio, fitting.START_GPU, fitting.board_of)
    assert set(groups) == {"jetson-orin-nano-8gb", "jetson-orin-nano-8gb-super", "jetson-agx-orin-64gb", "t4", "a100"}
    assert fitting.errors(groups)["median_error"] <= 0.25


def test_the_constants_of_cpus_are_those_of_the_fit_to_recorded_figures() -> None:
    points = fitting.recorded()
    assert len(points) == CPU_FIT.points == 24
    values = fitting.fit(points, fitting.cpu_ratio, fitting.START_CPU)
    for name in ("linear", "attention", "predictor", "int8", "launch_us"):
        assert getattr(CPU_FIT, name) == pytest.approx(getattr(fitting.cpu_share(values), name), rel=0.02), name
    assert CPU_FIT.body_passes == pytest.approx(fitting.body_passes(values), rel=0.02)


@pytest.mark.parametrize("folder", ["model_cpu", "model_cpu_base", "model_cpu_base_1036"])
def test_memory_on_a_cpu_is_what_was_recorded(folder: str) -> None:
    for point in fitting.recorded_memory(folder):
        layer, scores = peak_activations(point.work, 4)
        low, value, high = memory_bytes("cpu", point.weights, layer, scores)
        assert low < point.peak < high, point
        assert value == pytest.approx(point.peak, rel=0.25), point


def test_kinds_are_those_of_the_costs() -> None:
    pruned = SparsityConfig(keep=0.2, token_keep=((2, 0.5),))
    assert {o.kind for o in roofline.operators(Workload(VIT_S, pruned))} == {*MAC_KINDS, "embedding"}
