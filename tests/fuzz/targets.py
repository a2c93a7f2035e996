"""Fuzz targets for everything untrusted.

Bundles (golden pairs, models, manifests, names that act as configuration), results, sparse models, checkpoints,
settings, options, and requests to the metrics server.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import re
import shutil
import socket
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx

from sparsifiner_edge.bundle.sign import sign_bundle
from sparsifiner_edge.camera.health import HealthServer
from sparsifiner_edge.camera.status import Status
from sparsifiner_edge.errors import SparsifinerError
from tests.fuzz.harness import FailureError, Target, Try, command
from tests.fuzz.mutate import (
    TEXTS,
    TOML_VALUES,
    json_text,
    mutated_bytes,
    mutated_json,
    mutated_object,
    mutated_toml,
    mutated_zip,
)
from tests.made import SHORT_OPTIONS
from tests.seal import reseal

ROOT = Path(__file__).parents[2]
ON_BUNDLES = (
    "run {work}/subject --source {good}/images/picture0.png",
    "run {work}/subject --source {good}/images/picture0.png --require-signature {good}/keys/key.pub",
    "bundle verify {work}/subject",
    "bundle verify {work}/subject --json",
    "build {work}/subject --backend tensorrt-rtx --compute-capability 9.9",
    *(f"estimate {{work}}/subject --board jetson-orin-nano-8gb{more}" for more in ("", " --json")),
    "evaluate {work}/subject --against {work}/subject --data {good}/images",
    *(f"package {{work}}/subject --for {kind} -o {{work}}/out" for kind in ("triton", "deepstream", "gstreamer")),
)
"""Commands that open a bundle."""
VERIFY, BUILD, TRITON = (ON_BUNDLES[place] for place in (2, 4, -3))


def one_of(one: Try, lines: tuple[str, ...] = ON_BUNDLES) -> None:
    """Run one of the commands on the bundle; no package may contain an injected key, line or hidden character."""
    out = one.work / "out"
    shutil.rmtree(out, ignore_errors=True)
    command(*one.words(one.rng.choice(lines)))
    for path in out.rglob("*") if out.is_dir() else ():
        if path.suffix not in (".md", ".txt", ".pbtxt") or not path.is_file() or "bundle" in path.parts:
            continue
        content = path.read_text(encoding="utf-8")
        hidden = [c for c in content if not c.isprintable() and c not in "\n\t\u3000"]
        if hidden or "injected" in content.replace("_injected", "").replace("injected_", "").split():
            raise FailureError(f"{path.name} holds {hidden[:3] or 'an injected word'}")


def writable(text: str) -> str:
    """Return the text without lone surrogates."""
    return text.encode("utf-8", "replace").decode()


ODD = (
    np.zeros(0),
    np.zeros((0, 8)),
    np.array("text"),
    np.array([b"x"]),
    np.array(1.5),
    np.full((1, 8), np.nan),
    np.full((1, 8), 1e308),
    np.zeros((1, 8), np.complex64),
    np.zeros((1, 8), "M8[s]"),
    np.zeros((2, 8)),
    np.array([(1, 2.0)], [("a", int), ("b", float)]),
    np.zeros((1, 8), object),
    np.zeros((1, 8, 8, 3), np.uint8),
)


def golden(one: Try) -> None:
    path = one.copied("plain") / "golden.npz"
    if one.number % 4 < 2:
        path.write_bytes(mutated_zip(path.read_bytes(), one.rng))
    else:
        names = one.rng.sample(["input.image", "output.features", "input.x", "output.x", "x", "input.", "output."], 2)
        np.savez(path, **dict.fromkeys(names, one.rng.choice(ODD)))
    reseal(path.parent)
    one_of(one, (VERIFY, BUILD, TRITON))


def hostile_model(one: Try) -> None:
    """Try models that ONNX Runtime may accept and that contradict the bundle."""
    bundle = one.copied("plain")
    model = onnx.load(bundle / "model.onnx")
    kind = one.number % 6
    if kind:
        _change_model(one.rng, model.graph, kind)
    written = model.SerializeToString()
    (bundle / "model.onnx").write_bytes(written if kind else mutated_bytes(written, one.rng))
    reseal(bundle)
    with contextlib.suppress(SparsifinerError):  # Signed by its maker: the error is not about its origin.
        sign_bundle(bundle, one.good / "keys" / "key.pem")
    one_of(one)


ANSWERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("ReduceSum", {"keepdims": 0}),
    ("Shape", {}),
    ("NonZero", {}),
    ("Transpose", {}),
    ("Size", {}),
    ("Log", {}),
    *(("Cast", {"to": kind}) for kind in (1, 2, 6, 7, 8, 9, 10, 11, 16)),
    ("SequenceConstruct", {}),
    ("Unsqueeze", {}),
)
"""Possible operations on the features: operators with their attributes."""


def _change_model(rng: random.Random, graph: Any, kind: int) -> None:
    if kind == 1:  # Another shape of the answer.
        name, attributes = rng.choice(ANSWERS)
        inputs = ["features", *{"SequenceConstruct": ["features"], "Unsqueeze": ["axes"]}.get(name, [])]
        graph.node.append(onnx.helper.make_node(name, inputs, ["other"], **attributes))
        del graph.output[:]
        graph.output.append(onnx.helper.make_empty_tensor_value_info("other"))
        if rng.random() < 0.7:
            wanted = rng.choice(["logits", "features", "tokens"])
            for field in (field for node in graph.node for field in (node.input, node.output)):
                for place, old in enumerate(field):
                    field[place] = {"other": wanted, "features": "before"}.get(old, old)
            graph.output[0].name = wanted
    elif kind == 2:  # Weights that are NaN or infinite.
        tensor = rng.choice([t for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT])
        values = np.full_like(onnx.numpy_helper.to_array(tensor), rng.choice([np.nan, np.inf, -np.inf, 1e38, 0.0]))
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    elif kind == 3:  # Names and shapes of inputs and outputs.
        value = rng.choice([*graph.input, *graph.output])
        if rng.random() < 0.4:
            value.name = writable(rng.choice(TEXTS))[:1000]
        elif value.type.tensor_type.shape.dim:
            rng.choice(list(value.type.tensor_type.shape.dim)).dim_value = rng.choice([0, -1, 1, 5, 2**31, 2**62])
    elif kind == 4:
        del rng.choice([graph.input, graph.output, graph.node, graph.initializer])[:]
    else:
        for _ in range(rng.randrange(1, 4)):
            _change_node(rng.choice(list(graph.node)), rng)


def _change_node(node: Any, rng: random.Random) -> None:
    kind = rng.randrange(6)
    if kind < 3:
        node.ClearField(("input", "output", "attribute")[kind])
    elif kind == 3:
        node.op_type = rng.choice(["If", "Loop", "Scan", "Nothing", "Identity", "KeySelect"])
    elif kind == 4:
        node.domain = rng.choice(["", "sparsifiner", "com.microsoft", "x"])
    else:
        node.input.append("w0")


def manifest(one: Try) -> None:
    bundle = one.copied(one.rng.choice(("plain", "plain", "bundle")))
    content = json.loads((bundle / "manifest.json").read_text())
    part = one.rng.choice([*content, None, None])
    if part is None or part == "files":
        written = mutated_json(content, one.rng)
    else:
        changed = mutated_object({"x": content[part]}, one.rng)
        written = json_text(content | {part: changed.get("x") if isinstance(changed, dict) else changed})
    (bundle / "manifest.json").write_bytes(written)
    one_of(one)


INJECTED = (
    "x\ninjected",
    "x]\n[injected]\ny=1",
    'x"\ninjected: 1',
    "x;injected=1",
    "x}\n injected {",
    "x\\ninjected",
    "$(injected)",
    "x\r\ninjected",
    "x\u2028injected",
    "x\x85injected",
    "../../injected",
    "x\x1b[31m",
    *TEXTS[10:30],
)
ENGINE = {
    "backend": "tensorrt",
    "compute_capability": "8.7",
    "os": "linux",
    "cpu": "aarch64",
    "precision": "fp32",
    "file": "engines/a.engine",
    "compatible": [],
    "details": {},
    "batch": {"least": 1, "best": 1, "most": 1},
}


def injection(one: Try) -> None:
    """Try names, labels and versions that could become keys or lines of a configuration."""
    bundle, bad = one.copied("plain"), writable(one.rng.choice(INJECTED))
    changes: dict[str, Any] = one.rng.choice(
        [
            {"name": bad},
            {"precision": bad},
            {"preprocessing": {"size": 8, "fit": bad}},
            {"outputs": [{"name": bad, "dtype": "float32", "shape": ["batch", 8]}]},
            {"outputs": [{"name": "features", "dtype": bad, "shape": ["batch", bad]}]},
            {"engines": [ENGINE | {"version": bad}]},
            {},
        ]
    )
    if "engines" in changes:
        (bundle / "engines").mkdir()
        (bundle / "engines" / "a.engine").write_bytes(b"engine")
    if not changes:
        (bundle / "labels.txt").write_text(f"{bad}\ndog\n", encoding="utf-8")
    reseal(bundle, **changes)
    one_of(one, ON_BUNDLES[-3:])


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
    folder = one.copied("student")
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
    work = one.copied("out.training", "out.training")
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
    command(*one.words(line))


def _spoil_checkpoint(path: Path, rng: Any) -> None:
    """Change the metadata or one of the tensors."""
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
    """Try boards and recipes."""
    kind, folder = ("board", "profiles/boards") if one.number % 2 else ("recipe", "export/recipes")
    path = one.work / f"{kind}.toml"
    path.write_bytes(mutated_toml(one.rng.choice(sorted((ROOT / folder).glob("*.toml"))).read_text(), one.rng))
    if kind == "board":
        more = one.rng.choice(([], ["--json"]))
        command("estimate", one.good / "bundle", "--board", path, "--compute-precision", "fp32", *more)
        return
    from sparsifiner_edge.distill.recipe import read_recipe
    from sparsifiner_edge.records import write_record

    name = one.rng.choice(["batch", "distil.steps", "budgets", "ema", "x", "", "distil"])
    overrides = [f"{name}={one.rng.choice(TOML_VALUES)}"] if one.number % 3 == 0 else []
    with contextlib.suppress(SparsifinerError):
        json.dumps(write_record(read_recipe(str(path), overrides)))


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
USAGES = {
    "run {good}/plain --source {good}/images": "--threads --top --threshold --stall --metrics --frames",
    "profile {good}/plain": "--threads --seconds",
    "estimate {good}/plain --board jetson-orin-nano-8gb": "--compute-precision --power-mode",
    "build {good}/plain --backend tensorrt-rtx": "--compute-capability --timeout --batch --kernels",
    "report {good}/results/profile.json -o {work}/page.html": "--lang",
    "sparsify test_vit --weights {good}/weights.safetensors -o {work}/made": "--keep --set --token-keep --img-size",
    "export {good}/student -o {work}/made": "--keep --batch --merge --precision --board",
    "evaluate {good}/student --data {good}/images": "--keep --token-keep --metric --gallery --queries --workers",
    "distill {good}/student --data {good}/images -o {work}/made": "--set --recipe",
    "bundle verify {good}/plain": "--public-key --backend",
    "bundle sign {good}/plain": "--key",
}
"""Commands, and their options that take a value."""


def usage(one: Try) -> None:
    """Try options with invalid values."""
    rng = one.rng
    line = rng.choice(list(USAGES))
    name = rng.choice(USAGES[line].split())
    shutil.rmtree(one.work / "made", ignore_errors=True)
    text = rng.choice((*NUMBERS, *NUMBERS, *TEXTS)).replace("\0", "")
    value = text.encode("utf-8", "replace").decode()
    if name == "--seconds" or (name == "--set" and len(value) < 40):
        value = rng.choice(["nan", "-1", "inf", "x", "0", "9" * 5000])
    if "No such option" in command(*one.words(line), name, value):
        raise FailureError(f"{line} has no {name}")


def http(one: Try) -> None:
    """Run hostile clients of the metrics server; its threads must all survive."""
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


TARGETS = {
    "golden": Target(105, golden, ("plain",)),
    "model": Target(308, hostile_model, ("plain", "images", "keys")),
    "manifest": Target(5694, manifest, ("plain", "bundle", "images", "keys")),
    "injection": Target(195, injection, ("plain",)),
    "report": Target(2100, report, ("results",)),
    "student": Target(294, student, ("student",)),
    "checkpoint": Target(1399, checkpoint, ("training",)),
    "settings": Target(560, settings, ("bundle",)),
    "usage": Target(601, usage, ("plain", "student", "results", "images")),
    "http": Target(200, http),
}
"""Targets and the number of tries of each in a full run."""
