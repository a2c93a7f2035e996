"""Tests that the estimate's constants are those of the fit to published and recorded figures."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # scripts here import each other by name

import estimate_fit as fitting

from sparsifiner_edge.profiles.estimate import memory_bytes, peak_activations
from sparsifiner_edge.profiles.roofline import CPU_FIT, GPU_FIT


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
