"""What the decoding process cannot do, each tried in a process that is confined as it is; and that it decodes so."""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import msgspec
import numpy as np
import pytest

from sparsifiner_edge.camera import confine, syscalls
from sparsifiner_edge.camera.pattern import draw_pattern
from sparsifiner_edge.camera.relay import Relay
from sparsifiner_edge.records import write_record
from tests.camera.soak import Server, free_port, python_with_rtsp

ROOT = Path(__file__).parents[2]
NOBODY = 65534
AS_ROOT = os.geteuid() == 0
NAMESPACES = subprocess.run(["unshare", "-U", "true"], capture_output=True, check=False).returncode == 0
"""Whether anyone may make some here, which nobody may in a chroot."""
USERS = [pytest.param(None, id="as started"), pytest.param(NOBODY, id="ordinary user", marks=pytest.mark.skipif(
    not AS_ROOT, reason="only root becomes another user"))]  # fmt: skip
pytestmark = pytest.mark.skipif(
    confine.confinement().landlock is None or not syscalls.filter_works(), reason="this kernel cannot confine"
)
FILES = (
    "create", "append", "truncate", "delete", "rename", "link", "symbolic link", "make a folder", "make a pipe",
    "list a folder", "read a file", "read what is root's", "read the user's own",
)  # fmt: skip
PROGRAMS = ("spawn",)
PARENT = ("signal", "signal a thread", "write its memory", "write its memory by file", "trace")
PARENT_TOO = ("signal by descriptor", "limit it", "slow it", "move it", "outlive it", "be read")
NETWORK = ("bind", "connect")
NETWORK_TOO = ("connect by data", "connect by another protocol", "datagrams", "local sockets", "kernel sockets")
OTHERS = ("change mode", "change the folder", "fork", "shared memory", "keys", "io_uring", "new namespaces")
TRIES = (*FILES, *PROGRAMS, *PARENT, *PARENT_TOO, *NETWORK, *NETWORK_TOO, *OTHERS, "become root")
LAYERS = {
    "none": None,
    "all": {"landlock": "all", "filter": True},
    "filter": {"landlock": None, "filter": True},
    "landlock": {"landlock": 6, "filter": False},
    **{f"landlock {version}": {"landlock": version, "filter": False} for version in (1, 2, 3, 4, 5)},
}
DONE: dict[tuple[int | None, str], dict[str, Any]] = {}


def tried(user: int | None, layers: str) -> dict[str, Any]:
    """What each try came to; made once."""
    if (user, layers) not in DONE:
        DONE[user, layers] = _try_all(user, LAYERS[layers])
    return DONE[user, layers]


def _try_all(user: int | None, layers: dict[str, Any] | None) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp())
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    try:
        folder.chmod(0o777)
        (folder / "open").touch()
        (folder / "open").chmod(0o666)
        other, port = (server.getsockname()[1] for server in servers)
        asked = {"folder": str(folder), "other": other, "port": port, "user": user, "layers": layers}
        done = subprocess.run(
            [sys.executable, "-m", "tests.camera.confined"],
            cwd=ROOT, input=json.dumps(asked), capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        left = {path.name for path in folder.iterdir()}
    finally:
        for server in servers:
            server.close()
        shutil.rmtree(folder)
    found = {key: value for line in lines if isinstance(line, dict) for key, value in line.items()}
    return found | {"another program": "another program" in lines, "left": left}


@pytest.mark.parametrize("user", USERS)
def test_all_of_it_would_work_unconfined(user: int | None) -> None:
    """Or the tests below would say nothing."""
    found = tried(user, "none")
    impossible = {"become root", "read what is root's"} if user or not AS_ROOT else set()
    if not NAMESPACES:
        impossible.add("new namespaces")
    assert {name for name in TRIES if found["tries"][name] != "done"} <= impossible
    assert found["mark"].startswith("TAKEN")
    assert found["another program"]


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("name", TRIES)
def test_it_cannot(name: str, user: int | None) -> None:
    assert tried(user, "all")["tries"][name] in ("EACCES", "EPERM", "ENOSYS")


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("layers", ["all", "filter", "landlock"])
def test_nothing_came_of_it(layers: str, user: int | None) -> None:
    found = tried(user, layers)
    assert found["mark"] == "untouched"
    assert not found["another program"]
    assert found["left"] == {"open", "own", "deleted", "renamed"}
    assert found["tries"]["its one port"] == "done"


@pytest.mark.skipif(not AS_ROOT, reason="only root becomes another user")
def test_it_has_a_user_of_its_own() -> None:
    assert tried(None, "all")["user"] in confine._USERS
    assert tried(NOBODY, "all")["user"] == NOBODY


@pytest.mark.parametrize("user", USERS)
def test_a_kernel_without_landlock_still_refuses_all_but_other_ports(user: int | None) -> None:
    done = {name for name, outcome in tried(user, "filter")["tries"].items() if outcome == "done"}
    assert done == {"connect", "its one port"}


@pytest.mark.parametrize("user", USERS)
def test_a_machine_without_filters_still_refuses_these(user: int | None) -> None:
    found = tried(user, "landlock")["tries"]
    assert [name for name in (*FILES, *PROGRAMS, *PARENT, *NETWORK) if found[name] == "done"] == []


@pytest.mark.everything
@pytest.mark.parametrize("version", [1, 2, 3, 4, 5])
def test_older_versions_of_landlock(version: int) -> None:
    found = tried(None, f"landlock {version}")
    missing = {"truncate"} if version < 3 else set()
    assert {name for name in (*FILES, *PROGRAMS) if found["tries"][name] == "done"} == missing
    assert (found["tries"]["connect"] == "done") == (version < 4)
    assert found["confinement"]["landlock"] == version
    assert any("limits no TCP ports" in sentence for sentence in found["confinement"]["missing"]) == (version < 4)


# It decodes all the same.

DECODE = """
import contextlib, json, os, sys, msgspec
from sparsifiner_edge.camera import child, libav
from sparsifiner_edge.camera.decoder_protocol import Request
request = json.loads(sys.stdin.read())
child.import_decoder()
if request["user"] is not None:
    os.setgroups([])
    os.setresgid(*[request["user"]] * 3)
    os.setresuid(*[request["user"]] * 3)
threads, real = [], child.confine
def confine(*arguments):
    threads.append(len(os.listdir("/proc/self/task")))
    return real(*arguments)
child.confine = confine
child.limit_resources()
with contextlib.ExitStack() as opened:
    frames, numbers = child._prepared(msgspec.convert(request, Request), opened, os.getppid()), []
    for frame in frames():
        numbers.append(frame.images[0].shape[0])
        if len(numbers) == request["frames"]:
            break
print(json.dumps({"frames": len(numbers), "threads": threads}))
"""


def decode(user: int | None, **request: Any) -> dict[str, Any]:
    request = {
        "fit": [64, 32], "patience_s": 10, "port": None, "user": user, "frames": 1000, "live": False, "fps": 25,
        "attempts": 0, "secrets": [],
    } | request  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", DECODE], input=json.dumps(request), capture_output=True, text=True, check=False,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"}, cwd=ROOT, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.fixture
def readable() -> Iterator[Path]:
    """A folder that every user can read."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("user", USERS)
def test_a_video_with_sound(user: int | None, readable: Path) -> None:
    """PyAV imports what a stream needs when it meets it; no file can be opened then."""
    with av.open(str(readable / "v.mkv"), "w") as file:
        video, sound = file.add_stream("libx264", rate=10), file.add_stream("aac", rate=8000)
        assert isinstance(video, av.VideoStream)
        assert isinstance(sound, av.AudioStream)
        video.width, video.height, video.pix_fmt = 160, 120, "yuv420p"
        for number in range(20):
            file.mux(video.encode(av.VideoFrame.from_ndarray(draw_pattern(number, 160, 120))))
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.float32), "fltp", "mono")
            samples.sample_rate = 8000
            file.mux(sound.encode(samples))
        file.mux([*video.encode(None), *sound.encode(None)])
    assert decode(user, kind="file", location=str(readable / "v.mkv")) == {"frames": 20, "threads": [1]}


@pytest.mark.everything
@pytest.mark.skipif(python_with_rtsp() is None, reason="no Python with gi and GstRtspServer")
@pytest.mark.parametrize("user", USERS)
def test_a_stream(user: int | None) -> None:
    python = python_with_rtsp()
    assert python is not None
    with Server(python, free_port()) as server:
        relay = Relay(server.address, 10)
        try:
            found = decode(user, kind="rtsp", location=relay.url, port=relay.port, frames=10)
        finally:
            relay.close()
    assert found == {"frames": 10, "threads": [1]}


def test_the_decoding_process_is_confined(cells: Path, service: Any) -> None:
    run = service(cells, "--source", "test")
    run.record()
    told = run.event(event="decoding")
    assert told == {**told, **write_record(confine.confinement())}
    status = Path(f"/proc/{run.decoder()}/status").read_text()
    found = dict(re.findall(r"^(NoNewPrivs|Seccomp|CapEff):\s+(\w+)$", status, re.MULTILINE))
    assert found == {"NoNewPrivs": "1", "Seccomp": "2", "CapEff": "0" * 16}
    assert run.finish()[0] == 0


def test_a_pipeline_is_told_not_to_be_confined(cells: Path, service: Any) -> None:
    run = service(cells, "--source", "gst:videotestsrc is-live=true")
    assert "not confined" in run.event(event="decoding")["missing"][0]


# What can be checked without a kernel that lacks something, or another processor.


def test_what_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confine, "_landlock_version", lambda: None)
    monkeypatch.setattr(confine, "filter_works", lambda: False)
    monkeypatch.setattr(confine, "_may_change_user", lambda: False)
    found = confine.confinement()
    assert list(msgspec.to_builtins(found)) == ["own_user", "no_new_privs", "landlock", "system_calls", "missing"]
    assert (found.landlock, found.system_calls, found.own_user) == (None, False, False)
    assert [sentence.split(":")[0] for sentence in found.missing] == [
        "No user of its own", "No Landlock", "No filter of system calls",
    ]  # fmt: skip


def test_a_container_that_knows_few_users() -> None:
    assert confine._are_mapped("         0          0 4294967295\n")
    assert not confine._are_mapped("         0       1000          1\n         1     100000      60000\n")


@pytest.mark.parametrize(
    ("headers", "column"), [("/usr/include/x86_64-linux-gnu", 0), ("/usr/include/aarch64-linux-gnu", 1)]
)
def test_numbers_of_system_calls(headers: str, column: int) -> None:
    path = Path(headers, "asm", "unistd_64.h")
    if not path.exists():
        pytest.skip("the kernel's headers for this processor are not installed")
    known = {name: int(number) for name, number in re.findall(r"#define __NR_(\w+)\s+(\d+)", path.read_text())}
    found = {entry.split()[0]: syscalls._number(entry, column) for entry in syscalls._bodies(True, 1)}
    assert found == {name: known.get(name) for name in found}


def run_filter(rows: list[tuple[int, int, int, int]], architecture: int, number: int, *arguments: int) -> int:
    """What the kernel would do with a call."""
    data = {0: number, 4: architecture} | {16 + 8 * place: value for place, value in enumerate(arguments)}
    place, value = 0, 0
    while True:
        code, yes, no, operand = rows[place]
        place += 1
        if code == 0x06:
            return operand
        if code == 0x20:
            value = data.get(operand, 0) & 0xFFFFFFFF
        elif code == 0x54:
            value &= operand
        else:
            place += yes if (value == operand if code == 0x15 else value >= operand) else no


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_of_each_processor(machine: str) -> None:
    architecture, column = syscalls._MACHINES[machine]
    rows = syscalls._rows(True, 77, architecture, column)

    def of(entry: str, *arguments: int) -> int:
        number = syscalls._number(entry, column)
        assert number is not None
        return run_filter(rows, architecture, number, *arguments)

    refuse, unknown, allow = 0x50000 | errno.EACCES, 0x50000 | errno.ENOSYS, 0x7FFF0000
    for entry in syscalls._REFUSED.replace("\n", " ").split(","):
        if syscalls._number(entry, column) is not None:
            assert of(entry) == refuse, entry
    for entry in ("read 0 63", "write 1 64", "mmap 9 222", "futex 202 98", "poll 7 73", "close 3 57", "exit 60 93"):
        assert of(entry) == allow, entry
    assert [of("clone 56 220", flags) for flags in (0x3D0F00, 0x11)] == [allow, refuse]
    assert [of("socket 41 198", *values) for values in ((2, 0x80801, 6), (2, 1, 0))] == [allow, allow]
    assert {of("socket 41 198", *values) for values in ((1, 1, 0), (2, 2, 0), (2, 1, 262), (16, 3, 0))} == {refuse}
    assert [of("tgkill 234 131", pid) for pid in (77, 1)] == [allow, refuse]
    assert [of("prctl 157 167", option) for option in (15, 1, 4)] == [allow, refuse, refuse]
    assert [of("fcntl 72 25", 3, command) for command in (3, 4, 8, 10, 15)] == [allow, allow, refuse, refuse, refuse]
    assert [run_filter(rows, architecture, number) for number in (423, 424, 435, 0x40000001)] == [allow, *[unknown] * 3]
    assert run_filter(rows, 0x40000003, 1) == 0x80000000  # Of another architecture, which numbers otherwise.
    alone = syscalls._rows(False, 77, architecture, column)
    assert run_filter(alone, architecture, syscalls._number("socket 41 198", column) or 0, 2, 1, 0) == refuse


def test_this_machine() -> None:
    assert platform.machine() in syscalls._MACHINES
    assert confine.confinement().missing == ([] if AS_ROOT else [confine.confinement().missing[0]])
