"""What the commands of README, the example and the documentation print and write.

    python benchmarks/commands.py -o FILE [--against profiles/results/commands.json]

Every command runs as a process of its own, one after another in one folder, on DINOv2 ViT-S/14 and photographs. Kept
are its exit code, its lines and the fields of the JSON that it writes; numbers, times and hashes are left out, which
differ between any two runs and have benchmarks of their own. With --against what differs is printed, exit code 1.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
from fidelity_subject import weights_file

from sparsifiner_edge.demo import material, split

ROOT = Path(__file__).parents[1]
DEMO = "sparsifiner_edge.demo.saliency"
DINOV2 = f"{material.DINOV2} --weights dinov2.safetensors --img-size 224"
MORE = """\
sparsifiner-edge sparsify $DINOV2 --merge 8 -o merging/
sparsifiner-edge sparsify $DINOV2 --keep .25 --merge 16..0 -o both/
sparsifiner-edge sparsify $DINOV2 --token-keep 3:.7,6:.7,9:.7 -o pruned/
sparsifiner-edge sparsify $DINOV2 --preset paper -o paper/
sparsifiner-edge export merging/ -o merging-bundle/
sparsifiner-edge export both/ --precision int8 --calibrate images/ -o both-bundle/
sparsifiner-edge export pruned/ -o pruned-bundle/
sparsifiner-edge export paper/ -o paper-bundle/
sparsifiner-edge export student/ --precision fp16 -o half/
sparsifiner-edge evaluate student/ --data labelled/ --gallery labelled/ --metric knn --json
sparsifiner-edge evaluate student/ --data images/ --corruptions fog,snow -o stability.json
sparsifiner-edge explain student/ --data images/ -o explained.html
sparsifiner-edge profile both-bundle/ --backend openvino --seconds 1 --json
sparsifiner-edge profile sparse/ --seconds 1 --json
sparsifiner-edge run both-bundle/ --source images/ --backend openvino
sparsifiner-edge package sparse/ --for deepstream -o deepstream/
sparsifiner-edge package sparse/ --for triton -o triton/
sparsifiner-edge package sparse/ --for gstreamer -o gstreamer/
sparsifiner-edge bundle verify sparse/
sparsifiner-edge verify sparse/
sparsifiner-edge doctor --json
sparsifiner-edge estimate sparse/ --against dense/ --board jetson-orin-nano-8gb --json
sparsifiner-edge export nowhere/ -o x/
sparsifiner-edge run student/ --source images/
sparsifiner-edge sparsify $DINOV2 --img-size 225 -o x/
"""
"""What the documentation names in its text, but for what searches; the last three are mistakes."""


def listed() -> list[tuple[str, str]]:
    """Every command with the folder that it runs in, in the order in which a reader meets it."""
    found: list[tuple[str, str]] = []
    for page, folder in (("README.md", "."), ("examples/saliency/README.md", "saliency")):
        text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", "")
        text = text.replace("$MODEL", f"{DEMO}:saliency").replace("$TRUST", f"--trust {DEMO}")
        for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
            found += [(line.partition("#")[0].strip(), folder) for line in block.splitlines()]
    found += [(line, ".") for line in MORE.replace("$DINOV2", DINOV2).splitlines()]
    return [(line, folder) for line, folder in found if line.startswith("sparsifiner-edge")]


def ran(command: str, place: Path) -> dict[str, Any]:
    """What a command answers, prints and writes."""
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=place, env=os.environ | {"PATH": path, "COLUMNS": "200"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    written = [path for path in place.rglob("*") if path.is_file() and before.get(path) != path.stat().st_mtime_ns]
    files = {blurred(str(path.relative_to(place))): skeleton(path) for path in sorted(written)}
    return {
        "command": command, "exit": done.returncode, "out": lines_of(done.stdout), "err": lines_of(done.stderr),
        "files": files,
    }  # fmt: skip


def lines_of(text: str) -> Any:
    """Lines without what differs between runs; of JSON its fields."""
    try:
        return fields(json.loads(text)) if text.startswith("{") else [blurred(line) for line in text.splitlines()]
    except json.JSONDecodeError:
        return [blurred(line) for line in text.splitlines()]


def blurred(text: str) -> str:
    """Numbers, hashes and what depends on the machine left out."""
    text = re.sub(r"\b[0-9a-f]{12,}\b", "#", text)
    return re.sub(r"[-+]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?", "#", re.sub(r"\s+", " ", text)).strip()


def skeleton(path: Path) -> Any:
    """Fields of a JSON file; of another nothing."""
    if path.suffix != ".json":
        return None
    return " ".join(sorted(set(fields(json.loads(path.read_text(encoding="utf-8"))))))


def fields(value: Any, at: str = "") -> list[str]:
    """Paths of the fields of JSON, entries of lists as one."""
    if isinstance(value, dict):
        return [path for name, one in value.items() for path in fields(one, f"{at}.{blurred(name)}")]
    if isinstance(value, list):
        return sorted({path for one in value for path in fields(one, f"{at}[]")}) or [at]
    return [at]


@click.command()
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path, dir_okay=False))
@click.option("--against", type=click.Path(path_type=Path, exists=True, dir_okay=False))
def main(output: Path, against: Path | None) -> None:
    """See the module's documentation."""
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        shutil.copy(weights_file(), place / "dinov2.safetensors")
        photographs = split.images("calibration")[:8]
        for number, path in enumerate(photographs):
            few = (place / "images", place / "labelled" / "ab"[number % 2], place / "saliency" / "images")
            for target in (place / "many", *(few if number < 4 else ())):
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
        rows = []
        for command, folder in listed():
            rows.append(ran(command, place / folder))
            click.echo(f"{rows[-1]['exit']} {command}", err=True)
    text = "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"
    output.write_text(text, encoding="utf-8")
    if against is not None:
        pairs = [[json.dumps(row, indent=1) for row in found] for found in (json.loads(against.read_text()), rows)]
        told = "\n".join(difflib.unified_diff(*("\n".join(rows).splitlines() for rows in pairs), lineterm="", n=1))
        click.echo(told or "All as before.")
        sys.exit(bool(told))


if __name__ == "__main__":
    main()
