"""Classes of tries: what a stranger may hand to which command."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from sparsifiner_edge.errors import SparsifinerError
from sparsifiner_edge.signing import fingerprint_of, sign_bundle
from tests.fuzz.generators import TEXTS, text
from tests.fuzz.harness import FailureError, Target, Try, command, refused
from tests.fuzz.materials import SHORT
from tests.fuzz.mutate import (
    TOML_VALUES,
    json_text,
    mutated_bytes,
    mutated_json,
    mutated_object,
    mutated_toml,
    mutated_zip,
)
from tests.package.reseal import reseal

PACKAGE = Path(__file__).parents[2] / "sparsifiner_edge"


def copied(one: Try, name: str, to: str = "subject") -> Path:
    """A copy of a good folder, in the place of the one of the try before."""
    place = one.work / to
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(one.good / name, place)
    return place


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
                        "variant": "",
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


def report(one: Try) -> None:
    path, page = one.work / "result.json", one.work / "page.html"
    name = one.rng.choice(["comparison", "profile", "evaluation", "estimate", "sweep"])
    path.write_bytes(mutated_json(json.loads((one.good / "results" / f"{name}.json").read_text()), one.rng))
    page.unlink(missing_ok=True)
    more = ["--lang", one.rng.choice(["en", "ja"])] + ([] if one.number % 20 == 0 else ["--no-pictures"])
    more += (["--price-kwh", "0.3"] if one.number % 3 == 0 else []) + (["--json"] if one.number % 4 == 0 else [])
    other = [one.good / "results" / "estimate.json"] if one.number % 5 == 0 else []
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
    import torch

    work = copied(one, "out.training", "out.training")
    shutil.rmtree(one.work / "out", ignore_errors=True)
    path, history = work / "checkpoint.pt", work / "history.jsonl"
    if one.number % 4 == 0:
        path.write_bytes(mutated_zip(path.read_bytes(), one.rng))
    elif one.number % 4 < 3:
        content = torch.load(path, weights_only=True)
        try:
            torch.save(_spoilt_checkpoint(content, one.rng), path)
        except Exception:  # Some of what JSON can say, no pickle can.
            return
    else:
        lines = history.read_text().splitlines()
        place = one.rng.randrange(len(lines))
        lines[place] = mutated_json(json.loads(lines[place]), one.rng).decode("utf-8", "surrogateescape")
        written = "\n".join(lines).encode("utf-8", "surrogateescape")
        history.write_bytes(mutated_bytes(written, one.rng) if one.number % 3 == 0 else written)
    overrides = [part for override in SHORT for part in ("--set", override)]
    command("distill", one.good / "start", "--data", one.good / "data", "-o", one.work / "out", "--resume", *overrides)


def _spoilt_checkpoint(content: Any, rng: Any) -> Any:
    import torch

    part = rng.choice(["state", "recent", "optimiser", "student", "average", "fingerprint", None])
    if part is None:
        return mutated_object(content, rng)
    if part in ("student", "average") and rng.random() < 0.5:
        tensors = content[part]
        name = rng.choice(list(tensors))
        tensor = tensors[name]
        tensors[name] = rng.choice(
            [
                tensor.flatten(),
                tensor * float("nan"),
                tensor.double(),
                tensor.int(),
                tensor[None],
                torch.empty(0),
                tensor.bool(),
                tensor.to(torch.bfloat16),
                tensor + float("inf"),
                tensor.to("meta"),
                tensor.to(torch.complex64),
            ]
        )
        return content
    changed = mutated_object({"x": content[part]}, rng)
    return content | {part: changed.get("x") if isinstance(changed, dict) else changed}


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
            mutated_toml(one.rng.choice(sorted((PACKAGE / "profiles" / "boards").glob("*.toml"))).read_text(), one.rng)
        )
        more = one.rng.choice(([], ["--json"]))
        command("estimate", one.good / "bundle", "--board-file", board, "--precision", "fp32", *more)
        return
    from sparsifiner_edge.distill.recipe import read_recipe

    recipe = one.work / "recipe.toml"
    recipe.write_bytes(
        mutated_toml(one.rng.choice(sorted((PACKAGE / "distill" / "recipes").glob("*.toml"))).read_text(), one.rng)
    )
    name = one.rng.choice(["batch", "distil.steps", "budgets.keep", "ema", "x", "", "distil"])
    overrides = [f"{name}={one.rng.choice(TOML_VALUES)}"] if one.number % 3 == 0 else []
    refused(lambda: json.dumps(read_recipe(str(recipe), overrides).to_dict()))


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


def usage(one: Try) -> None:
    """Options with values that are none."""
    rng, good = one.rng, one.good
    plain, images = good / "plain", good / "images"
    lines: list[list[Any]] = [
        [
            "run",
            plain,
            "--source",
            images,
            rng.choice(
                ["--threads", "--top", "--threshold", "--fps", "--stall", "--metrics", "--duration", "--frames"]
            ),
        ],
        ["profile", plain, rng.choice(["--threads", "--batch", "--seconds", "--sweep", "--rules", "--price-kwh"])],
        [
            "estimate",
            plain,
            "--board",
            "jetson-orin-nano-8gb",
            rng.choice(["--precision", "--power-mode", "--kernels", "--batch"]),
        ],
        [
            "build",
            plain,
            "--backend",
            "tensorrt-rtx",
            rng.choice(["--compute-capability", "--timeout", "--min-batch", "--option"]),
        ],
        ["package", plain, "--for", "triton", "-o", one.work / "out", "--batch"],
        [
            "report",
            good / "results" / "profile.json",
            "-o",
            one.work / "page.html",
            rng.choice(["--price-kwh", "--lang", "--currency"]),
        ],
        [
            "sparsify",
            "test_vit",
            "--weights",
            good / "weights.safetensors",
            "-o",
            one.work / "made",
            rng.choice(
                ["--keep", "--tile", "--probe", "--channels", "--cells", "--dense-layers", "--token-keep", "--img-size"]
            ),
        ],
        [
            "export",
            good / "student",
            "-o",
            one.work / "made",
            rng.choice(["--keep", "--tile", "--probe", "--batch", "--token-keep", "--precision", "--board"]),
        ],
        [
            "evaluate",
            good / "student",
            "--data",
            images,
            rng.choice(["--keep", "--token-keep", "--metric", "--gallery"]),
        ],
        [
            "distill",
            good / "student",
            "--data",
            images,
            "-o",
            one.work / "made",
            rng.choice(["--set", "--recipe", "--keep"]),
        ],
        [
            "bundle",
            rng.choice(["verify", "sign", "keygen", "x"]),
            plain,
            rng.choice(["--public-key", "--key", "-o", "--backend"]),
        ],
    ]
    shutil.rmtree(one.work / "made", ignore_errors=True)
    shutil.rmtree(one.work / "out", ignore_errors=True)
    value = rng.choice((*NUMBERS, *NUMBERS, *TEXTS))
    value = value.replace("\0", "").encode(
        "utf-8", "surrogateescape" if not any("\ud7ff" < c < "\udc80" for c in value) else "replace"
    )
    chosen = rng.choice(lines)
    name = str(chosen[-1])
    if name in ("--duration", "--seconds") or (name == "--set" and len(value) < 40):
        value = rng.choice([b"nan", b"-1", b"inf", b"x", b"0", b"9" * 5000])
    command(*chosen, value.decode("utf-8", "replace"))


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
    line = [sys.executable, "-m", "tests.native.allocation", "--trials", "100", "--seed", str(one.number), "--json"]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=28, cwd=PACKAGE.parent)
    found = json.loads(done.stdout) if done.returncode == 0 and done.stdout else {}
    if found.get("failures") != 0:
        raise FailureError(f"{found or done.returncode}: {done.stderr[-300:]}")


TARGETS = {
    "golden": Target(105, golden, ("plain",)),
    "model": Target(308, hostile_model, ("plain", "images", "keys")),
    "external": Target(18, external, ("plain", "images")),
    "signature": Target(53, signature, ("signed", "images")),
    "swapped": Target(150, swapped, ("keys",)),
    "manifest": Target(5694, manifest, ("plain", "bundle", "images", "keys")),
    "injection": Target(195, injection, ("plain",)),
    "report": Target(2100, report, ("results",)),
    "student": Target(294, student, ("student",)),
    "checkpoint": Target(1399, checkpoint, ("training",)),
    "weights": Target(31, weights, ("student",)),
    "settings": Target(560, settings, ("bundle",)),
    "usage": Target(601, usage, ("plain", "student", "results", "images")),
    "video": Target(328, videos, ("plain", "video")),
    "allocation": Target(20, allocations),
}
