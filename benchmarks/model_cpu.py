"""Whole models on this CPU: ours, fp32 and int8, against the best dense engines at any precision, batch 1.

    python benchmarks/model_cpu.py [--case vit_small_patch14_dinov2.lvd142m:518:0.1:25 ...] [-o FOLDER]

DINOv2 ViT-S/14 with its real weights, ViT-B/14 with random ones (no weights install; time does not depend on them).
Rivals run the dense export of the same model: ONNX Runtime fp32 and int8 (as ours, but with every linear layer in int8
that the gate allows, which is faster), OpenVINO fp32, bf16 (its default where the processor has it) and int8 (the same
QDQ file, the rest in fp32 or bf16), torch.
Engines are timed in turn in one process; each engine's peak memory is found in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import torch
from cpu_engines import Run, openvino_run, ort_session, ratio, time_in_turn
from fidelity_subject import weights_file
from safetensors.torch import save_file

from sparsifiner_edge.artifacts import read_json
from sparsifiner_edge.cli.common import err_console, print_table
from sparsifiner_edge.demo import material, split
from sparsifiner_edge.export.check import smooth_images
from sparsifiner_edge.export.export import export_bundle
from sparsifiner_edge.export.int8 import LEAST_MEAN_COSINE, quantise
from sparsifiner_edge.images import load_image
from sparsifiner_edge.machine import available_cores
from sparsifiner_edge.metrics import POSITIONS, cosine
from sparsifiner_edge.ops import native
from sparsifiner_edge.records import write_record
from sparsifiner_edge.results import Result, Subject, write_result
from sparsifiner_edge.sparse.models import create, load_model
from sparsifiner_edge.sparse.student import sparsify

BASE = "vit_base_patch14_dinov2.lvd142m"
CASES = (
    f"{material.DINOV2}:224:0.25:16", f"{material.DINOV2}:518:0.1:25", f"{material.DINOV2}:1036:0.05:49",
    f"{BASE}:224:0.25:16", f"{BASE}:518:0.1:25", f"{BASE}:1036:0.05:49",
)  # fmt: skip
OURS, OURS8 = "ours fp32", "ours int8"
DENSE, DENSE8 = "ONNX Runtime fp32", "ONNX Runtime int8"
FP32 = (DENSE, "OpenVINO fp32", "torch fp32")
REQUIRED = {
    (material.DINOV2, 518, False, OURS, "fp32"): (1.15, 1.25), (material.DINOV2, 1036, False, OURS, "fp32"): (1.8, 2.2),
    (material.DINOV2, 518, False, OURS8, "any"): (1.15, 1.4), (material.DINOV2, 1036, False, OURS8, "any"): (1.8, 2.3),
    (material.DINOV2, 518, True, OURS8, "any"): (1.6, 2.0), (material.DINOV2, 1036, True, OURS8, "any"): (2.5, 3.2),
}  # fmt: skip
"""Speed over the best dense engine in fp32, or at any precision, without and with token pruning: required, aimed at."""
STAGES = (3, 6, 9)
"""Layers after which tokens are pruned."""


def build(
    name: str, size: int, keep: float, cells: int, pruned: tuple[tuple[int, float], ...], folder: Path, tell: Any
) -> dict[str, Path]:
    """Bundles: ours fp32 and int8, dense fp32; and a folder with dense int8, as fast as the gate allows."""
    weights = weights_file()
    if name != material.DINOV2:
        torch.manual_seed(0)
        weights = folder / "random.safetensors"
        save_file(create(name, size, 0).state_dict(), weights)
    pictures = folder / "pictures"
    pictures.mkdir()
    for path in split.calibration():
        (pictures / path.name).symlink_to(path)
    tell("sparsify")
    student = sparsify(
        name, folder / "student", weights=weights, img_size=size, keep=keep, cells=cells, token_keep=pruned,
        fuse_tokens=bool(pruned), calibrate=pictures,
    )  # fmt: skip
    tell(f"export {OURS}")
    made = {OURS: export_bundle(student, folder / "ours", measure=True)}
    tell(f"export {OURS8}")
    int8 = {"precision": "int8", "calibrate": pictures}
    made[OURS8] = export_bundle(student, folder / "ours-int8", measure=True, **int8)
    tell(f"export {DENSE}")
    made[DENSE] = export_bundle(name, folder / "dense", weights=weights, img_size=size)
    tell(f"export {DENSE8}")
    images = [load_image(path, size)[None] for path in split.calibration()]
    quantised, found = quantise(onnx.load(made[DENSE] / "model.onnx"), images, goal=LEAST_MEAN_COSINE)
    made[DENSE8] = folder / "dense-int8"
    made[DENSE8].mkdir()
    onnx.save(quantised, made[DENSE8] / "model.onnx")
    (made[DENSE8] / "quantisation.json").write_text(json.dumps(write_record(found)))
    return made


def engines(bundles: dict[str, Path], name: str, size: int, threads: int) -> dict[str, Run]:
    image = smooth_images(size)
    runs: dict[str, Run] = {}
    for label, bundle in bundles.items():
        session = ort_session(str(bundle / "model.onnx"), threads)
        runs[label] = lambda session=session: session.run(None, {"image": image})
    dense = str(bundles[DENSE] / "model.onnx")
    runs["OpenVINO fp32"] = openvino_run(dense, {"image": image}, threads, "f32")
    runs["OpenVINO bf16"] = openvino_run(dense, {"image": image}, threads, "bf16")
    dense8 = str(bundles[DENSE8] / "model.onnx")
    runs["OpenVINO int8, rest fp32"] = openvino_run(dense8, {"image": image}, threads, "f32")
    runs["OpenVINO int8, rest bf16"] = openvino_run(dense8, {"image": image}, threads, "bf16")
    torch.set_num_threads(threads)
    model = load_model(name, weights_file(), size) if name == material.DINOV2 else create(name, size, 0)
    tensor = torch.from_numpy(image).float().permute(0, 3, 1, 2)

    def run_torch() -> Any:
        with torch.inference_mode():
            return model.forward_features(tensor)

    return runs | {"torch fp32": run_torch}


PEAK = """
import json, resource, sys
import numpy as np
from pathlib import Path
from cpu_engines import openvino_run, ort_session
kind, path, size, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
def resident():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
before = resident()
image = np.zeros((1, size, size, 3), np.uint8)
if kind == "openvino":
    run = openvino_run(path, {"image": image}, threads, "f32")
else:
    session = ort_session(path, threads)
    run = lambda: session.run(None, {"image": image})
for _ in range(3):
    run()
print(json.dumps({"peak_rss_bytes": resident(), "before_bytes": before}))
"""


def peak_memory(bundles: dict[str, Path], size: int, threads: int) -> dict[str, Any]:
    """Peak resident memory of a process that loads a file and runs it, and what it held before."""
    wanted = {label: ("ort", bundle) for label, bundle in bundles.items()}
    wanted["OpenVINO fp32"] = ("openvino", bundles[DENSE])
    found = {}
    for label, (kind, bundle) in wanted.items():
        command = [sys.executable, "-c", PEAK, kind, str(bundle / "model.onnx"), str(size), str(threads)]
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        found[label] = json.loads(done.stdout)
    return found


def fidelity(bundles: dict[str, Path], size: int, threads: int) -> dict[str, Any]:
    """Mean patch cosine over the eight photographs: our int8 to our fp32, and ours to dense fp32."""
    tokens = {}
    for label in (OURS, OURS8, DENSE):
        session = ort_session(str(bundles[label] / "model.onnx"), threads)
        feeds = ({"image": load_image(path, size)[None]} for path in split.development())
        names = [output.name for output in session.get_outputs()]
        tokens[label] = [dict(zip(names, session.run(names, feed), strict=True)) for feed in feeds]

    def mean(a: str, b: str) -> float:
        return float(np.mean([_patches_cosine(x, y) for x, y in zip(tokens[a], tokens[b], strict=True)]))

    return {
        "int8_to_fp32_student": mean(OURS8, OURS),
        "fp32_to_dense": mean(OURS, DENSE),
        "int8_to_dense": mean(OURS8, DENSE),
    }


def _patches_cosine(a: dict[str, Any], b: dict[str, Any]) -> float:
    """Mean over the patches that both have."""
    places = [x.get(POSITIONS, np.arange(x["tokens"].shape[1] - 1)[None])[0] for x in (a, b)]
    _, mine, theirs = np.intersect1d(*places, return_indices=True)
    return float(cosine(a["tokens"][0, 1 + mine], b["tokens"][0, 1 + theirs]).mean())


def measure(case: str, threads: int, rounds: int, tell: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    name, size, keep, cells, *share = case.split(":")
    pruned = tuple((layer, float(share[0])) for layer in STAGES) if share else ()
    with tempfile.TemporaryDirectory() as scratch:
        bundles = build(name, int(size), float(keep), int(cells), pruned, Path(scratch), tell)
        memory = peak_memory(bundles, int(size), threads)
        times = time_in_turn(engines(bundles, name, int(size), threads), rounds, 2 if int(size) < 1000 else 1, tell)
        manifests = {label: read_json(bundles[label] / "manifest.json", 1) for label in (OURS, OURS8)}
        rival8 = json.loads((bundles[DENSE8] / "quantisation.json").read_text())
        real = name == material.DINOV2
        agreement = fidelity(bundles, int(size), threads) if real else {"unavailable": "random weights"}
    medians = {label: float(np.median(x)) for label, x in times.items()}
    dense = [label for label in times if label not in (OURS, OURS8)]
    best = {"fp32": min(FP32, key=lambda x: medians[x]), "any": min(dense, key=lambda x: medians[x])}
    ratios = {
        f"{ours} against the best dense engine, {kind}": {"engine": rival, **ratio(times[rival], times[ours])}
        for kind, rival in best.items()
        for ours in (OURS, OURS8)
    }
    statistics = {
        "median_ms": medians, "best_dense": best, "ratios": ratios, "peak_memory": memory, "patch_cosine": agreement,
        "chosen": manifests[OURS].get("measured"),
        "quantisation": {OURS8: manifests[OURS8]["quantisation"], DENSE8: rival8},
    }  # fmt: skip
    return {label: x.tolist() for label, x in times.items()}, statistics


def show(case: str, found: dict[str, Any]) -> None:
    name, size, keep, _, *share = case.split(":")
    rows = [
        [
            label,
            f"{ms:.1f}",
            f"{found['peak_memory'][label]['peak_rss_bytes'] / 1e6:.0f}" if label in found["peak_memory"] else "",
        ]
        for label, ms in found["median_ms"].items()
    ]
    print_table(f"{name}, {size} px, keep {keep}{', tokens ' + share[0] if share else ''}", ["", "ms", "peak MB"], rows)
    for label, estimate in found["ratios"].items():
        ours, _, kind = label.partition(" against the best dense engine, ")
        wanted = REQUIRED.get((name, int(size), bool(share), ours, kind))
        aim = f" (required {wanted[0]}, aim {wanted[1]})" if wanted else ""
        bounds = " to ".join(f"{estimate[k]:.2f}" if isinstance(estimate[k], float) else "?" for k in ("low", "high"))
        click.echo(f"{ours}: {estimate['value']:.2f} times {estimate['engine']}, {bounds}{aim}")
    click.echo(f"patch cosine: {found['patch_cosine']}")


def picture(statistics: dict[str, Any], path: Path) -> None:
    """Latency of every engine, one panel per case."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(statistics), 4.5), layout="constrained")
    axes = figure.subplots(1, len(statistics), squeeze=False)[0]
    for axis, (case, found) in zip(axes, statistics.items(), strict=True):
        name, size, keep, _, *share = case.split(":")
        labels = sorted(found["median_ms"], key=lambda x: found["median_ms"][x])
        colours = ["C1" if label.startswith("ours") else "C0" for label in labels]
        axis.barh(labels, [found["median_ms"][x] for x in labels], color=colours)
        axis.invert_yaxis()
        axis.set(
            xlabel="ms",
            title=f"{name.split('_patch')[0]}/14, {size} px, keep {keep}{', tokens ' + share[0] if share else ''}",
        )
    figure.savefig(path, dpi=80)


@click.command()
@click.option("--case", "cases", multiple=True, default=CASES, help="MODEL:SIZE:KEEP:CELLS[:TOKENS]; repeatable.")
@click.option("--threads", type=int, default=available_cores())
@click.option("--rounds", type=int, default=9, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for model_cpu.json and .png.")
def main(cases: tuple[str, ...], threads: int, rounds: int, output: Path | None) -> None:
    samples, statistics = {}, {}
    for case in cases:
        with err_console.status("") as status:
            samples[case], statistics[case] = measure(
                case, threads, rounds, lambda w, c=case: status.update(f"{c}: {w}")
            )
        show(case, statistics[case])
        if output:  # after every case: they take minutes
            output.mkdir(parents=True, exist_ok=True)
            method = {"threads": threads, "rounds": rounds, "kernels": native.target()}
            subjects = [Subject(path=c, sha256="exported in this run") for c in statistics]
            result = Result("comparison", subjects, method, samples, statistics)
            write_result(output / "model_cpu.json", result)
            picture(statistics, output / "model_cpu.png")


if __name__ == "__main__":
    main()
