"""Tries with what else a stranger may hand over: results, students, checkpoints, weights, settings, options, videos."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.fuzz.generators import TEXTS
from tests.fuzz.harness import FailureError, Try, command, copied, refused
from tests.fuzz.materials import SHORT
from tests.fuzz.mutate import (
    TOML_VALUES,
    mutated_bytes,
    mutated_json,
    mutated_toml,
)

ROOT = Path(__file__).parents[2]


def report(one: Try) -> None:
    path, page = one.work / "result.json", one.work / "page.html"
    name = one.rng.choice(["comparison", "profile", "evaluation"])
    path.write_bytes(mutated_json(json.loads((one.good / "results" / f"{name}.json").read_text()), one.rng))
    page.unlink(missing_ok=True)
    more = ["--lang", one.rng.choice(["en", "ja"]), *(["--json"] if one.number % 4 == 0 else [])]
    other = [one.good / "results" / "profile.json"] if one.number % 5 == 0 else []
    command("report", path, *other, "-o", page, *more)
    if page.exists():
        lowered = page.read_text(encoding="utf-8").lower()
        if "<script>alert" in lowered or "<img src=x" in lowered or "' onload='" in lowered:
            raise FailureError("a script is in the page")


def student(one: Try) -> None:
    folder = copied(one, "student")
    config, weights = folder / "config.json", folder / "model.safetensors"
    content = json.loads(config.read_text())
    if one.number % 3 == 2:
        raw = weights.read_bytes()
        spoilt = mutated_bytes(raw, one.rng)
        if one.number % 2:
            end = 8 + int.from_bytes(raw[:8], "little")
            header = mutated_json(json.loads(raw[8:end]), one.rng)
            spoilt = len(header).to_bytes(8, "little") + header + raw[end:]
        weights.write_bytes(spoilt)
        config.write_text(json.dumps(content | {"weights_sha256": hashlib.sha256(spoilt).hexdigest()}))
    else:
        labels = [f"class {number}" for number in range(10)] if one.number % 6 == 0 else []
        config.write_bytes(mutated_json({"labels": labels} | content, one.rng))
    shutil.rmtree(one.work / "made", ignore_errors=True)
    command("export", folder, "-o", one.work / "made")


def checkpoint(one: Try) -> None:
    work = copied(one, "out.training", "out.training")
    shutil.rmtree(one.work / "out", ignore_errors=True)
    path, history = work / "checkpoint.safetensors", work / "history.jsonl"
    if one.number % 4 == 0:
        path.write_bytes(mutated_bytes(path.read_bytes(), one.rng))
    elif one.number % 4 < 3:
        _spoil_checkpoint(path, one.rng)
    else:
        lines = history.read_text().splitlines()
        place = one.rng.randrange(len(lines))
        lines[place] = mutated_json(json.loads(lines[place]), one.rng).decode("utf-8", "surrogateescape")
        written = "\n".join(lines).encode("utf-8", "surrogateescape")
        history.write_bytes(mutated_bytes(written, one.rng) if one.number % 3 == 0 else written)
    overrides = [part for override in SHORT for part in ("--set", override)]
    command("distill", one.good / "start", "--data", one.good / "data", "-o", one.work / "out", "--resume", *overrides)


def _spoil_checkpoint(path: Path, rng: Any) -> None:
    """What it says, or one of its tensors."""
    import safetensors.torch
    import torch

    with safetensors.safe_open(path, "pt") as file:
        state, tensors = file.metadata()["state"], {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if rng.random() < 0.5:
        state = mutated_json(json.loads(state), rng).decode("utf-8", "replace")
    else:
        name = rng.choice(list(tensors))
        tensor = tensors[name]
        others = [tensor.flatten(), tensor * float("nan"), tensor.double(), tensor.int(), tensor[None], torch.empty(0)]
        others += [tensor.bool(), tensor.to(torch.bfloat16), tensor + float("inf")]
        tensors[name] = rng.choice(others).clone()
    safetensors.torch.save_file(tensors, path, {"state": state})


def weights(one: Try) -> None:
    """Pickles that would run code, and files that are not what they say."""
    ran = one.work / "ran"
    ran.unlink(missing_ok=True)
    code = f"c__builtin__\neval\n(V__import__('pathlib').Path({str(ran)!r}).touch()\ntR.".encode()
    suffix = one.rng.choice([".pth", ".safetensors", ".pt", ".bin"])
    path = one.work / f"weights{suffix}"
    good = (one.good / "weights.safetensors").read_bytes()
    path.write_bytes(
        one.rng.choice([code, b"\x80\x02" + code, mutated_bytes(good, one.rng), b"", good[:8], b"PK\x03\x04" + code])
    )
    shutil.rmtree(one.work / "made", ignore_errors=True)
    command("sparsify", "test_vit", "--weights", path, "-o", one.work / "made")
    if ran.exists():
        raise FailureError(f"code in a {suffix} file ran")


def settings(one: Try) -> None:
    """Boards and recipes."""
    if one.number % 2:
        board = one.work / "board.toml"
        board.write_bytes(
            mutated_toml(one.rng.choice(sorted((ROOT / "profiles" / "boards").glob("*.toml"))).read_text(), one.rng)
        )
        more = one.rng.choice(([], ["--json"]))
        command("estimate", one.good / "bundle", "--board", board, "--precision", "fp32", *more)
        return
    from sparsifiner_edge.distill.recipe import read_recipe
    from sparsifiner_edge.records import write_record

    recipe = one.work / "recipe.toml"
    recipe.write_bytes(
        mutated_toml(one.rng.choice(sorted((ROOT / "export" / "recipes").glob("*.toml"))).read_text(), one.rng)
    )
    name = one.rng.choice(["batch", "distil.steps", "budgets", "ema", "x", "", "distil"])
    overrides = [f"{name}={one.rng.choice(TOML_VALUES)}"] if one.number % 3 == 0 else []
    refused(lambda: json.dumps(write_record(read_recipe(str(recipe), overrides))))


NUMBERS = (
    "nan",
    "inf",
    "-inf",
    "1e999",
    "-1",
    "0",
    "2147483648",
    "9" * 5000,
    "٣",
    "²",
    "0x10",
    "1_0",
    "",
    " ",
    "1e308",
    "x",
    "\u202e1",
)


USAGES = (
    (
        "run {good}/plain --source {good}/images",
        "--threads --top --threshold --stall --metrics --frames",
    ),
    ("profile {good}/plain", "--threads --seconds"),
    ("estimate {good}/plain --board jetson-orin-nano-8gb", "--precision --power-mode"),
    ("build {good}/plain --backend tensorrt-rtx", "--compute-capability --timeout --batch --kernels"),
    ("report {good}/results/profile.json -o {work}/page.html", "--lang"),
    (
        "sparsify test_vit --weights {good}/weights.safetensors -o {work}/made",
        "--keep --set --token-keep --img-size",
    ),
    ("export {good}/student -o {work}/made", "--keep --tile --probe --batch --merge --precision --board"),
    (
        "evaluate {good}/student --data {good}/images",
        "--keep --token-keep --metric --gallery --queries --workers",
    ),
    ("distill {good}/student --data {good}/images -o {work}/made", "--set --recipe --held-out"),
    ("bundle verify {good}/plain", "--public-key --backend"),
    ("bundle sign {good}/plain", "--key"),
)
"""Commands, and options of theirs that take a value."""


def usage(one: Try) -> None:
    """Options with values that are none."""
    rng = one.rng
    line, options = rng.choice(USAGES)
    name = rng.choice(options.split())
    chosen = [word.format(good=one.good, work=one.work) for word in line.split()]
    shutil.rmtree(one.work / "made", ignore_errors=True)
    shutil.rmtree(one.work / "out", ignore_errors=True)
    text = rng.choice((*NUMBERS, *NUMBERS, *TEXTS))
    value = text.replace("\0", "").encode(
        "utf-8", "surrogateescape" if not any("\ud7ff" < c < "\udc80" for c in text) else "replace"
    )
    if name == "--seconds" or (name == "--set" and len(value) < 40):
        value = rng.choice([b"nan", b"-1", b"inf", b"x", b"0", b"9" * 5000])
    command(*chosen, name, value.decode("utf-8", "replace"))


def videos(one: Try) -> None:
    """Damaged files through the real decoding process."""
    path = one.work / "video.mp4"
    path.write_bytes(mutated_bytes((one.good / "video.mp4").read_bytes(), one.rng))
    line = [sys.executable, "-m", "sparsifiner_edge", "run", one.good / "plain", "--source", path]
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True, check=False, timeout=25)
    if done.returncode not in (0, 2) or "Traceback" in done.stderr:
        raise FailureError(f"exit code {done.returncode}: {done.stderr[-300:]}")


def allocations(one: Try) -> None:
    """A hundred allocations of the native library that fail, in a process of their own."""
    line = [sys.executable, "-m", "tests.native.allocation", "100", str(one.number)]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=28, cwd=ROOT)
    found = json.loads(done.stdout) if done.returncode == 0 and done.stdout else {}
    if found.get("failures") != 0:
        raise FailureError(f"{found or done.returncode}: {done.stderr[-300:]}")
