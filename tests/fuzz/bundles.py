"""Tries with hostile bundles: golden pairs, models, signatures, manifests, names that would be configuration."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from sparsifiner_edge.bundle.sign import fingerprint_of, sign_bundle
from sparsifiner_edge.errors import SparsifinerError
from tests.fuzz.generators import TEXTS, text
from tests.fuzz.harness import FailureError, Try, command, copied, refused
from tests.fuzz.mutate import (
    json_text,
    mutated_bytes,
    mutated_json,
    mutated_object,
    mutated_zip,
)
from tests.package.reseal import reseal


def commands_on(one: Try, bundle: Path) -> None:
    """One of the commands that open a bundle."""
    image, out = one.good / "images" / "image0.png", one.work / "out"
    shutil.rmtree(out, ignore_errors=True)
    lines: list[list[Any]] = [
        ["run", bundle, "--source", image],
        ["run", bundle, "--source", image, "--require-signature", one.good / "keys" / "key.pub"],
        ["bundle", "verify", bundle, *one.rng.choice(([], ["--json"]))],
        ["build", bundle, *one.rng.choice(([], ["--json"]))],
        ["estimate", bundle, "--board", "jetson-orin-nano-8gb", *one.rng.choice(([], ["--json"]))],
        ["evaluate", bundle, "--against", bundle, "--data", one.good / "images"],
        *(["package", bundle, "--for", kind, "-o", out] for kind in ("triton", "deepstream", "gstreamer")),
    ]
    command(*one.rng.choice(lines))
    check_configurations(out)


def check_configurations(folder: Path) -> None:
    """No key, no line and no hidden character of a stranger's in what a package holds.

    Raises:
        FailureError: there is one.
    """
    for path in folder.rglob("*") if folder.is_dir() else ():
        if path.suffix not in (".md", ".txt", ".pbtxt") or not path.is_file() or "bundle" in path.parts:
            continue
        content = path.read_text(encoding="utf-8")
        hidden = [c for c in content if not c.isprintable() and c not in "\n\t\u3000"]
        if hidden or "injected" in content.replace("_injected", "").replace("injected_", "").split():
            raise FailureError(f"{path.name} holds {hidden[:3] or 'an injected word'}")


def golden(one: Try) -> None:
    bundle = copied(one, "plain")
    path = bundle / "golden.npz"
    kind = one.number % 4
    if kind < 2:
        path.write_bytes(mutated_zip(path.read_bytes(), one.rng))
    else:
        odd = one.rng.choice(
            [
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
            ]
        )
        names = one.rng.sample(["input.image", "output.features", "input.x", "output.x", "x", "input.", "output."], 2)
        np.savez(path, **dict.fromkeys(names, odd))
    reseal(bundle)
    command(
        *one.rng.choice(
            (
                ["bundle", "verify", bundle],
                ["build", bundle],
                ["package", bundle, "--for", "triton", "-o", one.work / "out"],
            )
        )
    )
    shutil.rmtree(one.work / "out", ignore_errors=True)


def hostile_model(one: Try) -> None:
    """Models that ONNX Runtime may take, and that are not what a bundle says."""
    bundle = copied(one, "plain")
    model = onnx.load(bundle / "model.onnx")
    kind = one.number % 6
    if kind == 0:
        (bundle / "model.onnx").write_bytes(mutated_bytes(model.SerializeToString(), one.rng))
    else:
        _change_model(one, model, kind)
        (bundle / "model.onnx").write_bytes(model.SerializeToString())
    reseal(bundle)
    # Signed by its maker: what is wrong with it is not who it is from.
    refused(lambda: sign_bundle(bundle, one.good / "keys" / "key.pem"))
    commands_on(one, bundle)


def _change_model(one: Try, model: Any, kind: int) -> None:
    rng, graph, helper = one.rng, model.graph, onnx.helper
    if kind == 1:  # Another shape of the answer.
        node = rng.choice(
            [
                helper.make_node("ReduceSum", ["features"], ["other"], keepdims=0),
                helper.make_node("Shape", ["features"], ["other"]),
                helper.make_node("NonZero", ["features"], ["other"]),
                helper.make_node("Transpose", ["features"], ["other"]),
                helper.make_node("Cast", ["features"], ["other"], to=rng.choice([1, 2, 6, 7, 8, 9, 10, 11, 16])),
                helper.make_node("SequenceConstruct", ["features", "features"], ["other"]),
                helper.make_node("Size", ["features"], ["other"]),
                helper.make_node("Log", ["features"], ["other"]),
                helper.make_node("Unsqueeze", ["features", "axes"], ["other"]),
            ]
        )
        graph.node.append(node)
        del graph.output[:]
        graph.output.append(helper.make_empty_tensor_value_info("other"))
        if rng.random() < 0.7:
            wanted = rng.choice(["logits", "features", "tokens"])
            for one_node in graph.node:
                for field in (one_node.input, one_node.output):
                    for place, name in enumerate(field):
                        field[place] = {"other": wanted, "features": "before"}.get(name, name)
            graph.output[0].name = wanted
    elif kind == 2:  # Weights that are no numbers.
        tensor = rng.choice([t for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT])
        values = np.array(onnx.numpy_helper.to_array(tensor))
        values[...] = rng.choice([np.nan, np.inf, -np.inf, 1e38, 0.0])
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    elif kind == 3:  # Names and shapes of inputs and outputs.
        value = rng.choice([*graph.input, *graph.output])
        if rng.random() < 0.4:
            value.name = text(rng).encode("utf-8", "replace").decode()[:1000]
        elif value.type.tensor_type.shape.dim:
            dim = rng.choice(list(value.type.tensor_type.shape.dim))
            dim.dim_value = rng.choice([0, -1, 1, 5, 2**31, 2**62])
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


def external(one: Try) -> None:
    bundle = copied(one, "plain")
    model = onnx.load(bundle / "model.onnx")
    tensor = one.rng.choice([t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT])
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    location = one.rng.choice(
        ["/etc/passwd", "../../../etc/passwd", "weights.bin", "x/../weights.bin", "", "/proc/self/mem"]
    )
    tensor.external_data.add(key="location", value=location)
    (bundle / "weights.bin").write_bytes(bytes(4096))
    (bundle / "model.onnx").write_bytes(model.SerializeToString())
    reseal(bundle)
    image = one.good / "images" / "image0.png"
    code, out, _ = command(*one.rng.choice((["run", bundle, "--source", image], ["build", bundle])))
    if code != 2 or out:
        raise FailureError(f"external data at {location!r} was taken")


def signature(one: Try) -> None:
    """Whatever is done to a signed bundle: it is refused, or it is as it was signed."""
    bundle, rng = copied(one, "signed"), one.rng
    name = rng.choice(["model.onnx", "golden.npz", "labels.txt", "manifest.json", "manifest.sig"])
    path = bundle / name
    kind = one.number % 9
    changed = True
    if kind < 3:
        before = path.read_bytes()
        path.write_bytes(mutated_bytes(before, rng))
        changed = path.read_bytes() != before
    elif kind == 3:
        path.write_bytes(mutated_json(json.loads((bundle / "manifest.sig").read_text()), rng))
    elif kind == 4:
        extra = bundle / rng.choice(
            ["x", ".hidden", "kernels/sm87.json", "engines/a.engine", "\x1b[31m", "a\nb", "\u202ex"]
        )
        extra.parent.mkdir(exist_ok=True)
        rng.choice([lambda: extra.write_text("x"), lambda: extra.symlink_to("/etc/passwd"), lambda: os.mkfifo(extra)])()
    elif kind == 5:
        path.unlink()
        rng.choice(
            [
                lambda: os.mkfifo(path),
                lambda: path.symlink_to("/dev/zero"),
                path.mkdir,
                lambda: path.symlink_to(path),
                lambda: path.symlink_to("/proc/self/mem"),
            ]
        )()
    elif kind == 6:
        path.unlink()
        path.symlink_to(one.good / "signed" / name)  # The same bytes from elsewhere: outside the folder.
    elif kind == 7:
        reseal(bundle, name=text(rng).encode("utf-8", "replace").decode())
    key: Path = one.good / "keys" / "key.pub"
    if kind == 8:
        key = one.work / "odd.pub"
        key.unlink(missing_ok=True)
        rng.choice(
            [
                lambda: key.write_bytes(mutated_bytes((one.good / "keys" / "key.pub").read_bytes(), rng)),
                lambda: os.mkfifo(key),
                lambda: key.symlink_to("/dev/zero"),
                lambda: shutil.copyfile(one.good / "keys" / "other.pub", key),
            ]
        )()
        changed = not _same_key(key, one.good / "keys" / "key.pub")
    image = one.good / "images" / "image0.png"
    lines = (
        ["run", bundle, "--source", image, "--require-signature", key],
        ["bundle", "verify", bundle, "--public-key", key],
    )
    code, _, _ = command(*rng.choice(lines))
    if changed and code == 0 and not (kind <= 3 and name == "manifest.sig"):
        raise FailureError(f"an altered bundle passed (kind {kind}, {name})")


def _same_key(key: Path, other: Path) -> bool:
    """Whether a changed file still holds the same key: PEM has room for remarks."""
    try:
        return fingerprint_of(key) == fingerprint_of(other)
    except SparsifinerError:
        return False


def swapped(one: Try) -> None:
    """Twenty openings with a key while the model is swapped; see tests/security/test_files.py."""
    from tests.security.test_files import swapped_while_opened

    shutil.rmtree(one.work / "swapped", ignore_errors=True)
    way = ("renamed", "rewritten")[one.number % 2]
    found = swapped_while_opened(one.work / "swapped", one.good / "keys", way, tries=20)
    if found["altered"]:
        raise FailureError(f"an altered model ran: {found}")


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
    commands_on(one, bundle)


def injection(one: Try) -> None:
    """Names, labels and versions that would be keys or lines in a configuration."""
    bundle, rng = copied(one, "plain"), one.rng
    bad = rng.choice(
        [
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
        ]
    )
    bad = bad.encode("utf-8", "replace").decode()
    changes: dict[str, Any] = rng.choice(
        [
            {"name": bad},
            {"precision": bad},
            {"preprocessing": {"size": 8, "resize": bad}},
            {"outputs": [{"name": bad, "dtype": "float32", "shape": ["batch", 8]}]},
            {"outputs": [{"name": "features", "dtype": bad, "shape": ["batch", bad]}]},
            {
                "engines": [
                    {
                        "backend": "tensorrt",
                        "version": bad,
                        "compute_capability": "8.7",
                        "os": "linux",
                        "cpu": "aarch64",
                        "precision": "fp32",
                        "file": "engines/a.engine",
                        "compatible": [],
                        "details": {},
                        "batch": {"least": 1, "best": 1, "most": 1},
                    }
                ]
            },
            {},
        ]
    )
    if "engines" in changes:
        (bundle / "engines").mkdir()
        (bundle / "engines" / "a.engine").write_bytes(b"engine")
    if not changes:
        (bundle / "labels.txt").write_text(f"{bad}\ndog\n", encoding="utf-8")
    reseal(bundle, **changes)
    out = one.work / "out"
    shutil.rmtree(out, ignore_errors=True)
    command("package", bundle, "--for", rng.choice(("triton", "deepstream", "gstreamer")), "-o", out)
    check_configurations(out)
