"""Tests of a native library that cannot be loaded: `auto` continues without it and reports why, `native` fails."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sparsifiner_edge.ops import native
from sparsifiner_edge.ops.native import library_path
from tests.tiny import make_bundle

SAID = {
    "missing": "is not built",
    "cut short": "is cut short",
    "another file": "is not a 64-bit ELF library",
    "needs another library": "libhwy-that-is-not-there.so",
}
EVERY_WAY = """
import json, sys
from pathlib import Path
import msgspec
from sparsifiner_edge import doctor
from sparsifiner_edge.errors import SparsifinerError
from sparsifiner_edge.ops import native
from sparsifiner_edge import Execution
from sparsifiner_edge.runtime import open_session
place = Path(sys.argv[1])
native.library_path = lambda: place if place.is_file() else None
told = {}
for kernels in ("auto", "portable", "native"):
    try:
        with open_session(sys.argv[2], Execution(kernels=kernels)) as session:
            told[kernels] = session.description.kernels
    except SparsifinerError as error:
        told[kernels] = f"refused: {error}"
print(json.dumps(told | msgspec.to_builtins(doctor.examine())))
"""
"""Run in a separate process: a fatal signal such as SIGBUS ends only that one."""


def damaged(kind: str, path: Path) -> None:
    source = library_path()
    assert source is not None, native.NOT_BUILT
    if kind == "cut short":
        shutil.copyfile(source, path)
        os.truncate(path, path.stat().st_size // 2)
    elif kind == "another file":
        path.write_bytes(b"<html>not found</html>" * 100)
    elif kind == "needs another library":
        code, stub = path.with_suffix(".c"), path.with_name(SAID[kind])
        code.write_text("int nothing(void) { return 0; }\n")
        line = ["gcc", "-shared", "-o"]
        subprocess.run([*line, stub, code], check=True)
        subprocess.run([*line, path, code, f"-L{path.parent}", "-Wl,--no-as-needed", f"-l:{stub.name}"], check=True)
        stub.unlink()


@pytest.mark.parametrize("kind", SAID)
def test_auto_goes_on_and_says_why(kind: str, tmp_path: Path) -> None:
    library, bundle = tmp_path / "libsparsifiner_ops.so", tmp_path / "bundle"
    make_bundle(bundle, size=8, function=True, preprocessing={"size": 8})
    damaged(kind, library)
    line = [sys.executable, "-c", EVERY_WAY, library, bundle]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr)
    told = json.loads(done.stdout)
    assert told["auto"].startswith("function bodies (the native library ")
    assert SAID[kind] in told["auto"]
    assert told["portable"] == "function bodies"
    assert told["native"].startswith("refused: The native library ")
    assert SAID[kind] in told["native"]
    assert told["native_library"] is None
    assert SAID[kind] in told["native_library_reason"]
