"""A native library that cannot be loaded: `auto` goes on without it and says why, `native` is an error."""

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

ROOT = Path(__file__).parents[2]
SAID = {
    "missing": "is not built",
    "cut short": "is cut short",
    "another file": "is no 64-bit ELF library",
    "needs another library": "libhwy-that-is-not-there.so",
}


def damaged(kind: str, path: Path) -> None:
    source = library_path()
    assert source is not None, native.NOT_BUILT
    if kind == "missing":
        return
    shutil.copyfile(source, path)
    if kind == "cut short":
        os.truncate(path, path.stat().st_size // 2)
    elif kind == "another file":
        path.write_bytes(b"<html>not found</html>" * 100)
    else:
        code = path.with_suffix(".c")
        code.write_text("int nothing(void) { return 0; }\n")
        stub = path.with_name("libhwy-that-is-not-there.so")
        line = ["gcc", "-shared", "-o"]
        subprocess.run([*line, stub, code], check=True)
        subprocess.run([*line, path, code, f"-L{path.parent}", "-Wl,--no-as-needed", f"-l:{stub.name}"], check=True)
        stub.unlink()


def python(library: Path, code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A process whose native library is ours: what ends it, such as SIGBUS, ends that one."""
    before = (
        "import sys\nfrom pathlib import Path\nfrom sparsifiner_edge.ops import native\n"
        f"place = Path({str(library)!r})\n"
        "native.library_path = lambda: place if place.is_file() else None\n"
    )
    line = [sys.executable, "-c", before + code, *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle", size=8, function=True, preprocessing={"size": 8})


EVERY_WAY = """
import json
import msgspec
from sparsifiner_edge import doctor
from sparsifiner_edge.errors import SparsifinerError
from sparsifiner_edge.runtime import open_session
told = {}
for kernels in ("auto", "portable", "native"):
    try:
        with open_session(sys.argv[1], kernels=kernels) as session:
            told[kernels] = session.description.kernels
    except SparsifinerError as error:
        told[kernels] = f"refused: {error}"
print(json.dumps(told | msgspec.to_builtins(doctor.examine())))
"""


@pytest.mark.parametrize("kind", SAID)
def test_auto_goes_on_and_says_why(kind: str, sparse: Path, tmp_path: Path) -> None:
    library = tmp_path / "libsparsifiner_ops.so"
    damaged(kind, library)
    done = python(library, EVERY_WAY, sparse)
    assert done.returncode == 0, (done.returncode, done.stderr)
    told = json.loads(done.stdout)
    assert told["auto"].startswith("function bodies (the native library ")
    assert SAID[kind] in told["auto"]
    assert told["portable"] == "function bodies"
    assert told["native"].startswith("refused: The native library ")
    assert SAID[kind] in told["native"]
    assert told["native_library"] is None
    assert SAID[kind] in told["native_library_reason"]
