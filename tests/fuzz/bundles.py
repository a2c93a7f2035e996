"""Tries with hostile bundles: golden pairs, models, manifests, names that would be configuration."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from typing import Any

import numpy as np
import onnx

from sparsifiner_edge.bundle.sign import sign_bundle
from sparsifiner_edge.errors import SparsifinerError
from tests.fuzz.harness import FailureError, Try, command, copied, words
from tests.fuzz.mutate import TEXTS, json_text, mutated_bytes, mutated_json, mutated_object, mutated_zip
from tests.package.reseal import reseal

ON_BUNDLES = (
    "run {work}/subject --source {good}/images/picture0.png",
    "run {work}/subject --source {good}/images/picture0.png --require-signature {good}/keys/key.pub",
    "bundle verify {work}/subject", "bundle verify {work}/subject --json",
    "build {work}/subject", "build {work}/subject --json",
    *(f"estimate {{work}}/subject --board jetson-orin-nano-8gb{more}" for more in ("", " --json")),
    "evaluate {work}/subject --against {work}/subject --data {good}/images",
    *(f"package {{work}}/subject --for {kind} -o {{work}}/out" for kind in ("triton", "deepstream", "gstreamer")),
)  # fmt: skip
"""Commands that open a bundle."""
RUN, VERIFY, BUILD, TRITON = (ON_BUNDLES[place] for place in (0, 2, 4, -3))


def one_of(one: Try, lines: tuple[str, ...] = ON_BUNDLES) -> tuple[int, str]:
    """One of the commands on the bundle; see `command`.

    Raises:
        FailureError: a package holds a key, a line or a hidden character of a stranger's.
    """
    out = one.work / "out"
    shutil.rmtree(out, ignore_errors=True)
    found = command(*words(one.rng.choice(lines), one.good, one.work))
    for path in out.rglob("*") if out.is_dir() else ():
        if path.suffix not in (".md", ".txt", ".pbtxt") or not path.is_file() or "bundle" in path.parts:
            continue
        content = path.read_text(encoding="utf-8")
        hidden = [c for c in content if not c.isprintable() and c not in "\n\t\u3000"]
        if hidden or "injected" in content.replace("_injected", "").replace("injected_", "").split():
            raise FailureError(f"{path.name} holds {hidden[:3] or 'an injected word'}")
    return found


def writable(text: str) -> str:
    """Without halves of characters."""
    return text.encode("utf-8", "replace").decode()


ODD = (
    np.zeros(0), np.zeros((0, 8)), np.array("text"), np.array([b"x"]), np.array(1.5), np.full((1, 8), np.nan),
    np.full((1, 8), 1e308), np.zeros((1, 8), np.complex64), np.zeros((1, 8), "M8[s]"), np.zeros((2, 8)),
    np.array([(1, 2.0)], [("a", int), ("b", float)]), np.zeros((1, 8), object), np.zeros((1, 8, 8, 3), np.uint8),
)  # fmt: skip


def golden(one: Try) -> None:
    path = copied(one, "plain") / "golden.npz"
    if one.number % 4 < 2:
        path.write_bytes(mutated_zip(path.read_bytes(), one.rng))
    else:
        names = one.rng.sample(["input.image", "output.features", "input.x", "output.x", "x", "input.", "output."], 2)
        np.savez(path, **dict.fromkeys(names, one.rng.choice(ODD)))
    reseal(path.parent)
    one_of(one, (VERIFY, BUILD, TRITON))


def hostile_model(one: Try) -> None:
    """Models that ONNX Runtime may take, and that are not what a bundle says."""
    bundle = copied(one, "plain")
    model = onnx.load(bundle / "model.onnx")
    kind = one.number % 6
    if kind:
        _change_model(one.rng, model.graph, kind)
    written = model.SerializeToString()
    (bundle / "model.onnx").write_bytes(written if kind else mutated_bytes(written, one.rng))
    reseal(bundle)
    with contextlib.suppress(SparsifinerError):  # Signed by its maker: what is wrong is not who it is from.
        sign_bundle(bundle, one.good / "keys" / "key.pem")
    one_of(one)


ANSWERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("ReduceSum", {"keepdims": 0}), ("Shape", {}), ("NonZero", {}), ("Transpose", {}), ("Size", {}), ("Log", {}),
    *(("Cast", {"to": kind}) for kind in (1, 2, 6, 7, 8, 9, 10, 11, 16)),
    ("SequenceConstruct", {}), ("Unsqueeze", {}),
)  # fmt: skip
"""What could become of the features: operators with their attributes."""


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
    elif kind == 2:  # Weights that are no numbers.
        tensor = _weight(rng, graph)
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


def _weight(rng: random.Random, graph: Any) -> Any:
    return rng.choice([t for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT])


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
    bundle = copied(one, one.rng.choice(("plain", "plain", "bundle")))
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
    "x\ninjected", "x]\n[injected]\ny=1", 'x"\ninjected: 1', "x;injected=1", "x}\n injected {", "x\\ninjected",
    "$(injected)", "x\r\ninjected", "x\u2028injected", "x\x85injected", "../../injected", "x\x1b[31m", *TEXTS[10:30],
)  # fmt: skip
ENGINE = {
    "backend": "tensorrt", "compute_capability": "8.7", "os": "linux", "cpu": "aarch64", "precision": "fp32",
    "file": "engines/a.engine", "compatible": [], "details": {}, "batch": {"least": 1, "best": 1, "most": 1},
}  # fmt: skip


def injection(one: Try) -> None:
    """Names, labels and versions that would be keys or lines in a configuration."""
    bundle, bad = copied(one, "plain"), writable(one.rng.choice(INJECTED))
    changes: dict[str, Any] = one.rng.choice([
        {"name": bad},
        {"precision": bad},
        {"preprocessing": {"size": 8, "resize": bad}},
        {"outputs": [{"name": bad, "dtype": "float32", "shape": ["batch", 8]}]},
        {"outputs": [{"name": "features", "dtype": bad, "shape": ["batch", bad]}]},
        {"engines": [ENGINE | {"version": bad}]},
        {},
    ])  # fmt: skip
    if "engines" in changes:
        (bundle / "engines").mkdir()
        (bundle / "engines" / "a.engine").write_bytes(b"engine")
    if not changes:
        (bundle / "labels.txt").write_text(f"{bad}\ndog\n", encoding="utf-8")
    reseal(bundle, **changes)
    one_of(one, ON_BUNDLES[-3:])
