"""Compares complete models on this CPU, ours in fp32 and int8, with the best dense engines at any precision, batch 1.

    python benchmarks/model_cpu.py [--case vit_small_patch14_dinov2.lvd142m:518:0.1:25 ...] [-o FOLDER]

Models are DINOv2 ViT-S/14 with its real weights and ViT-B/14 with random ones (its weights cannot be installed, and
time does not depend on them). Ours runs in ONNX Runtime, the int8 file with attention in bf16 too, and in OpenVINO in
fp32, bf16 and with the int8 file. Precisions that the CPU does not support are left out, ours and theirs. A case ends
with a share of tokens (":0.7" at three layers), or with merging rates (":merge=200^1.5": 200 in the first layer,
falling to 0 with that power). KEEP may list several layers' shares. Rivals run the dense export of the same model: ONNX
Runtime fp32 and int8 (as ours, but with every linear layer in int8 that the gate allows, which is faster), OpenVINO
fp32, bf16 (its default if the CPU has it) and int8 (the same QDQ file, the rest in fp32 or bf16), torch. Engines are
timed in turn in one process; each engine's peak memory is measured in a separate process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import onnx
import tome
import torch
from accuracy_images import linked
from cpu_engines import Run, by_kernels, has_bf16, openvino_run, ort_session, ratio, time_in_turn
from fidelity_subject import weights_file
from safetensors.torch import save_file
from summary import said, write_summary

from sparsifiner_edge import Execution, ExportOptions, ModelOptions
from sparsifiner_edge.bundle.manifest import manifest_content
from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.cli.common import err_console, print_table
from sparsifiner_edge.config import Keep, parse_keep
from sparsifiner_edge.demo import material, split
from sparsifiner_edge.export.check import smooth_images
from sparsifiner_edge.export.export import export_bundle
from sparsifiner_edge.export.int8 import LEAST_MEAN_COSINE, quantise
from sparsifiner_edge.images import load_image
from sparsifiner_edge.machine import available_cores
from sparsifiner_edge.metrics import POSITIONS, cosine
from sparsifiner_edge.ops import native
from sparsifiner_edge.records import write_record
from sparsifiner_edge.results import Result, Subject
from sparsifiner_edge.runtime import open_session
from sparsifiner_edge.sparse.hosts.timm import create, load_model
from sparsifiner_edge.sparse.student import sparsify

BASE = "vit_base_patch14_dinov2.lvd142m"
CASES = (
    f"{material.DINOV2}:224:0.25:16",
    f"{material.DINOV2}:518:0.1:25",
    f"{material.DINOV2}:1036:0.05:49",
    f"{material.DINOV2}:224:1:24:merge=24^1",
    f"{material.DINOV2}:518:0.1,0.1,0.2,1:49:merge=200^1.5",
    f"{material.DINOV2}:1036:0.05,0.05,0.1,0.35,0.35,0.35,1:49:merge=900^1.5",
    f"{BASE}:224:0.25:16",
    f"{BASE}:518:0.1:25",
    f"{BASE}:1036:0.05:49",
    f"{BASE}:518:0.1,0.1,0.2,1:49:merge=200^1.5",
)
OURS, OURS8 = "ours, ONNX Runtime fp32", "ours, ONNX Runtime int8"
ELSEWHERE = {
    "ours, ONNX Runtime int8, attention bf16": (OURS8, "onnxruntime", "bf16"),
    "ours, OpenVINO fp32": (OURS, "openvino", "auto"),
    "ours, OpenVINO bf16": (OURS, "openvino", "bf16"),
    "ours, OpenVINO int8, rest fp32": (OURS8, "openvino", "auto"),
    "ours, OpenVINO int8, rest bf16": (OURS8, "openvino", "bf16"),
}
"""File, backend and compute precision of each of our engines."""
DENSE, DENSE8 = "ONNX Runtime fp32", "ONNX Runtime int8"
FP32 = (DENSE, "OpenVINO fp32", "torch fp32")
STAGES = (3, 6, 9)
"""Layers after which tokens are pruned."""


class Case(NamedTuple):
    """One case; see the module docstring."""

    model: str
    size: int
    keep: Keep
    background_tokens: int
    pruned: tuple[tuple[int, float], ...] = ()
    merge: tuple[int, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Case:
        name, size, keep, cells, *more = text.split(":")
        made = cls(name, int(size), parse_keep(keep), int(cells))
        if not more:
            return made
        if not more[0].startswith("merge="):
            return made._replace(pruned=tuple((layer, float(more[0])) for layer in STAGES))
        first, _, power = more[0].removeprefix("merge=").partition("^")
        depth = len(create(name, 224, 0).blocks)
        merge = tome.schedule((int(first), float(power)) if power else int(first), depth)[0]
        return made._replace(merge=merge)


def build(case: Case, folder: Path, tell: Any) -> dict[str, Path]:
    """Build bundles (ours fp32 and int8, dense fp32), and a folder with dense int8 as fast as the gate allows."""
    name, size, weights = case.model, case.size, weights_file()
    if name != material.DINOV2:
        torch.manual_seed(0)
        weights = folder / "random.safetensors"
        save_file(create(name, size, 0).state_dict(), weights)
    pictures = linked(folder / "pictures", split.images("calibration"))
    tell("sparsify")
    student = sparsify(
        name,
        folder / "student",
        weights=weights,
        img_size=size,
        keep=case.keep,
        background_tokens=case.background_tokens,
        token_keep=case.pruned,
        merge=case.merge,
        calibrate=pictures,
    )
    tell(f"export {OURS}")
    made = {OURS: export_bundle(student, folder / "ours")}
    tell(f"export {OURS8}")
    int8 = ExportOptions(precision="int8", calibrate=pictures)
    made[OURS8] = export_bundle(student, folder / "ours-int8", options=int8)
    tell(f"export {DENSE}")
    made[DENSE] = export_bundle(name, folder / "dense", model=ModelOptions(weights=weights, img_size=size))
    tell(f"export {DENSE8}")
    images = [load_image(path, size)[None] for path in split.images("calibration")]
    quantised, found = quantise(onnx.load(made[DENSE] / "model.onnx"), images, goal=LEAST_MEAN_COSINE)
    made[DENSE8] = folder / "dense-int8"
    made[DENSE8].mkdir()
    onnx.save(quantised, made[DENSE8] / "model.onnx")
    (made[DENSE8] / "quantisation.json").write_text(json.dumps(write_record(found)))
    return made


def ours_elsewhere() -> dict[str, tuple[str, str]]:
    return {label: (file, how) for label, (file, how) in ELSEWHERE.items() if has_bf16() or how == "openvino"}


def engines(
    bundles: dict[str, Path], name: str, size: int, threads: int
) -> tuple[dict[str, Run], dict[str, dict[str, str]]]:
    """Return the function that runs each engine, and the reported execution of ours in other backends."""
    image = smooth_images(size)
    runs: dict[str, Run] = {}
    said = {}
    for label, bundle in bundles.items():
        session = ort_session(str(bundle / "model.onnx"), threads)
        runs[label] = lambda session=session: session.run(None, {"image": image})
    for label, (file, backend, precision) in ours_elsewhere().items():
        opened = open_session(bundles[file], by_kernels(backend, precision, threads))
        said[label] = {"precision": opened.description.precision, "kernels": opened.description.kernels}
        runs[label] = lambda opened=opened: opened.infer({"image": image})
    for rest, hint in (("fp32", "f32"), ("bf16", "bf16"))[: 2 if has_bf16() else 1]:
        dense, dense8 = (str(bundles[label] / "model.onnx") for label in (DENSE, DENSE8))
        runs[f"OpenVINO {rest}"] = openvino_run(dense, {"image": image}, threads, hint)
        runs[f"OpenVINO int8, rest {rest}"] = openvino_run(dense8, {"image": image}, threads, hint)
    torch.set_num_threads(threads)
    model = load_model(name, weights_file(), size) if name == material.DINOV2 else create(name, size, 0)
    tensor = torch.from_numpy(image).float().permute(0, 3, 1, 2)

    def run_torch() -> Any:
        with torch.inference_mode():
            return model.forward_features(tensor)

    return runs | {"torch fp32": run_torch}, said


PEAK = """
import json, resource, sys
import numpy as np
from pathlib import Path
from cpu_engines import by_kernels, openvino_run, ort_session
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
    """Return peak resident memory of a process that loads and runs a file, and its memory before."""
    wanted = {label: ("ort", bundle) for label, bundle in bundles.items()}
    wanted["OpenVINO fp32"] = ("openvino", bundles[DENSE])
    found = {}
    for label, (kind, bundle) in wanted.items():
        command = [sys.executable, "-c", PEAK, kind, str(bundle / "model.onnx"), str(size), str(threads)]
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        found[label] = json.loads(done.stdout)
    return found


def fidelity(bundles: dict[str, Path], size: int, threads: int) -> dict[str, Any]:
    """Return mean patch cosines over the eight photographs: each of ours to ours in fp32, and to the dense model."""
    tokens = {}
    files = {label: (label, "onnxruntime", "auto") for label in (OURS, OURS8)} | ours_elsewhere()
    for label, (file, backend, precision) in files.items():
        with open_session(bundles[file], by_kernels(backend, precision, threads)) as opened:
            feeds = ({"image": load_image(path, size)[None]} for path in split.images("development"))
            tokens[label] = [opened.infer(feed) for feed in feeds]
    with open_session(bundles[DENSE], Execution(threads=threads)) as opened:
        feeds = ({"image": load_image(path, size)[None]} for path in split.images("development"))
        tokens[DENSE] = [opened.infer(feed) for feed in feeds]

    def mean(a: str, b: str) -> float:
        return float(np.mean([_patches_cosine(x, y) for x, y in zip(tokens[a], tokens[b], strict=True)]))

    return {
        "to fp32 student": {label: mean(label, OURS) for label in files},
        "to dense": {label: mean(label, DENSE) for label in files},
    }


def _patches_cosine(a: dict[str, Any], b: dict[str, Any]) -> float:
    """Return the mean over the patches that both have."""
    places = [x.get(POSITIONS, np.arange(x["tokens"].shape[1] - 1)[None])[0] for x in (a, b)]
    _, mine, theirs = np.intersect1d(*places, return_indices=True)
    return float(cosine(a["tokens"][0, 1 + mine], b["tokens"][0, 1 + theirs]).mean())


def measure(text: str, threads: int, rounds: int, tell: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    case = Case.parse(text)
    name, size = case.model, case.size
    with tempfile.TemporaryDirectory() as scratch:
        bundles = build(case, Path(scratch), tell)
        memory = peak_memory(bundles, size, threads)
        runs, said = engines(bundles, name, size, threads)
        times = time_in_turn(runs, rounds, 2 if size < 1000 else 1, tell)
        manifests = {label: manifest_content(open_bundle(bundles[label]).manifest) for label in (OURS, OURS8)}
        rival8 = json.loads((bundles[DENSE8] / "quantisation.json").read_text())
        real = name == material.DINOV2
        agreement = fidelity(bundles, size, threads) if real else {"unavailable": "random weights"}
    medians = {label: float(np.median(x)) for label, x in times.items()}
    mine, dense = ([label for label in times if label.startswith("ours") == own] for own in (True, False))
    best = {"fp32": min(FP32, key=lambda x: medians[x]), "any": min(dense, key=lambda x: medians[x])}
    own = {
        "fp32": min((x for x in mine if x.endswith("fp32") and "int8" not in x), key=lambda x: medians[x]),
        "any": min(mine, key=lambda x: medians[x]),
    }
    ratios = {
        f"ours at its best against the best dense engine, {kind}": {
            "ours": own[kind],
            "engine": rival,
            **ratio(times[rival], times[own[kind]]),
        }
        for kind, rival in best.items()
    }
    statistics = {
        "median_ms": medians,
        "best_dense": best,
        "ratios": ratios,
        "peak_memory": memory,
        "patch_cosine": agreement,
        "ran in": said,
        "quantisation": {OURS8: manifests[OURS8]["quantisation"], DENSE8: rival8},
    }
    return {label: x.tolist() for label, x in times.items()}, statistics


def show(case: str, found: dict[str, Any]) -> None:
    peaks = {label: f"{x['peak_rss_bytes'] / 1e6:.0f}" for label, x in found["peak_memory"].items()}
    rows = [[label, f"{ms:.1f}", peaks.get(label, "")] for label, ms in found["median_ms"].items()]
    print_table(case, ["", "ms", "peak MB"], rows)
    for figure in found["ratios"].values():
        click.echo(f"{figure['ours']}: {said(figure)} times {figure['engine']}")
    click.echo(f"patch cosine: {found['patch_cosine']}")


@click.command()
@click.option("--case", "cases", multiple=True, default=CASES, help="MODEL:SIZE:KEEP:CELLS[:MORE]; repeatable.")
@click.option("--threads", type=int, default=available_cores())
@click.option("--rounds", type=int, default=9, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for model_cpu.json.")
def main(cases: tuple[str, ...], threads: int, rounds: int, output: Path | None) -> None:
    samples, statistics = {}, {}
    for case in cases:
        with err_console.status("") as status:
            samples[case], statistics[case] = measure(
                case, threads, rounds, lambda w, c=case: status.update(f"{c}: {w}")
            )
        show(case, statistics[case])
        if output:  # after every case: they take minutes
            method = {"threads": threads, "rounds": rounds, "kernels": native.target()}
            subjects = [Subject(path=c, sha256="exported in this run") for c in statistics]
            result = Result("comparison", subjects, method, samples, statistics)
            write_summary(output / "model_cpu.json", result)


if __name__ == "__main__":
    main()
