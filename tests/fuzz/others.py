"""Tries with what else a stranger may hand over: results, students, checkpoints, settings, options, and requests to
the metrics server.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import socket
import threading
from pathlib import Path
from typing import Any
from unittest import mock

from sparsifiner_edge.camera.health import HealthServer
from sparsifiner_edge.camera.status import Status
from sparsifiner_edge.errors import SparsifinerError
from tests.fuzz.harness import FailureError, Try, command, copied, words
from tests.fuzz.materials import SHORT_OPTIONS
from tests.fuzz.mutate import TEXTS, TOML_VALUES, mutated_bytes, mutated_json, mutated_toml

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
    line = f"distill {{good}}/start --data {{good}}/data -o {{work}}/out --resume {SHORT_OPTIONS}"
    command(*words(line, one.good, one.work))


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


def settings(one: Try) -> None:
    """Boards and recipes."""
    kind, folder = ("board", "profiles/boards") if one.number % 2 else ("recipe", "export/recipes")
    path = one.work / f"{kind}.toml"
    path.write_bytes(mutated_toml(one.rng.choice(sorted((ROOT / folder).glob("*.toml"))).read_text(), one.rng))
    if kind == "board":
        more = one.rng.choice(([], ["--json"]))
        command("estimate", one.good / "bundle", "--board", path, "--precision", "fp32", *more)
        return
    from sparsifiner_edge.distill.recipe import read_recipe
    from sparsifiner_edge.records import write_record

    name = one.rng.choice(["batch", "distil.steps", "budgets", "ema", "x", "", "distil"])
    overrides = [f"{name}={one.rng.choice(TOML_VALUES)}"] if one.number % 3 == 0 else []
    with contextlib.suppress(SparsifinerError):
        json.dumps(write_record(read_recipe(str(path), overrides)))


NUMBERS = (
    "nan", "inf", "-inf", "1e999", "-1", "0", "2147483648", "9" * 5000, "٣", "²", "0x10", "1_0", "", " ", "1e308", "x",
    "\u202e1",
)  # fmt: skip
USAGES = {
    "run {good}/plain --source {good}/images": "--threads --top --threshold --stall --metrics --frames",
    "profile {good}/plain": "--threads --seconds",
    "estimate {good}/plain --board jetson-orin-nano-8gb": "--precision --power-mode",
    "build {good}/plain --backend tensorrt-rtx": "--compute-capability --timeout --batch --kernels",
    "report {good}/results/profile.json -o {work}/page.html": "--lang",
    "sparsify test_vit --weights {good}/weights.safetensors -o {work}/made": "--keep --set --token-keep --img-size",
    "export {good}/student -o {work}/made": "--keep --batch --merge --precision --board",
    "evaluate {good}/student --data {good}/images": "--keep --token-keep --metric --gallery --queries --workers",
    "distill {good}/student --data {good}/images -o {work}/made": "--set --recipe",
    "bundle verify {good}/plain": "--public-key --backend",
    "bundle sign {good}/plain": "--key",
}
"""Commands, and options of theirs that take a value."""


def usage(one: Try) -> None:
    """Options with values that are none."""
    rng = one.rng
    line = rng.choice(list(USAGES))
    name = rng.choice(USAGES[line].split())
    shutil.rmtree(one.work / "made", ignore_errors=True)
    text = rng.choice((*NUMBERS, *NUMBERS, *TEXTS)).replace("\0", "")
    value = text.encode("utf-8", "replace").decode()
    if name == "--seconds" or (name == "--set" and len(value) < 40):
        value = rng.choice(["nan", "-1", "inf", "x", "0", "9" * 5000])
    command(*words(line, one.good, one.work), name, value)


def http(one: Try) -> None:
    """Hostile clients of the metrics server, none of which ends one of its threads."""
    request = b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: */*\r\nUser-Agent: x\r\n\r\n"
    lost, status = list[Any](), Status("test", lambda _: None)
    watched = mock.patch.object(threading, "excepthook", lost.append)
    with watched, HealthServer(("127.0.0.1", 0), status, 2.0) as server:
        address = "127.0.0.1", int(re.findall(r":(\d+)/", server.url)[0])
        for _ in range(8):
            with contextlib.suppress(OSError), socket.create_connection(address, 5) as client:
                client.sendall(mutated_bytes(request * one.rng.choice((1, 1, 3)), one.rng))
                if one.rng.random() < 0.5:
                    client.shutdown(socket.SHUT_WR)
                client.settimeout(0.15)
                client.recv(1 << 16)
        with socket.create_connection(address, 5) as client:
            client.settimeout(2)
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = client.recv(1 << 16)
    if lost:
        raise FailureError(f"a thread ended with {lost[0].exc_type.__name__}: {lost[0].exc_value}")
    if b" 503 " not in answer.partition(b"\r\n")[0]:
        raise FailureError(f"health answers {answer[:100]!r}")
