"""`run --require-signature`: native code is loaded only of bundles that the holder of a key signed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparsifiner_edge.artifacts import SIGNATURE_FILE
from sparsifiner_edge.bundle.sign import sign_bundle
from tests.commands import assert_refused, process
from tests.package.reseal import reseal

pytest.importorskip("cryptography", reason="the extra sign is not installed")


@pytest.fixture
def signed(cells: Path, keys: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "signed"
    shutil.copytree(cells, folder)
    sign_bundle(folder, keys / "key.pem")
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.fromarray(np.full((40, 50, 3), 90, np.uint8)).save(folder / "grey.png")
    return folder


def test_a_signed_bundle_runs(signed: Path, keys: Path, pictures: Path) -> None:
    required = ("--require-signature", keys / "key.pub")
    for source, more in ((pictures, ()), ("test", ("--frames", 2))):
        outcome = process("run", signed, "--source", source, *more, *required)
        assert outcome.code == 0, outcome.err
        assert all("features" in json.loads(line) for line in outcome.out.splitlines())
        assert outcome.out


def another_manifest(folder: Path) -> None:
    reseal(folder, name="another")


def an_unlisted_file(folder: Path) -> None:
    (folder / "kernels").mkdir()
    (folder / "kernels" / "sm87.json").write_text("{}")


@pytest.mark.parametrize(
    ("alter", "key", "said"),
    [
        (lambda folder: (folder / SIGNATURE_FILE).unlink(), "key.pub", "is not signed"),
        (another_manifest, "key.pub", "was changed after it was signed"),
        (an_unlisted_file, "key.pub", "also holds kernels/sm87.json"),
        (lambda _: None, "other.pub", "signed by another key"),
        (lambda _: None, "none.pub", "none.pub"),
        (lambda _: None, "key.pem", "key.pem"),
    ],
)
def test_others_are_refused(
    alter: Callable[[Path], None], key: str, said: str, signed: Path, keys: Path, pictures: Path
) -> None:
    alter(signed)
    outcome = process(
        "run", signed, "--source", pictures, "--require-signature", keys / key,
        "--output", signed.parent / "lines.jsonl",
    )  # fmt: skip
    assert_refused(outcome)
    assert said in outcome.err
    assert not (signed.parent / "lines.jsonl").exists()
