"""The roofline of `gpu_roofline.py` held against published speeds: FlashAttention's own machine code goes in.

    python benchmarks/gpu_published.py [--flash2 FILE.whl] [--flash3 FILE.whl] [-o FOLDER]

The wheels (vllm-flash-attn 2.6.2, xformers 0.0.29.post3) carry FlashAttention-2 and -3 as compiled for sm_80 and
sm_90; without the options the counts of the recorded result are taken. Exit code 1 where the model is
more than 20 % from a published speed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import struct
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import msgspec
from gpu_roofline import Gpu, LaunchWork, Work, gpu, seconds
from sass import Instruction, counts, read
from summary import RESULTS, write_summary

from sparsifiner_edge.artifacts import sha256
from sparsifiner_edge.cli.common import print_table
from sparsifiner_edge.results import Result, Subject

RESULT = RESULTS / "gpu_published.json"
WITHIN = 0.2
FLASH2 = (
    "_Z16flash_fwd_kernelI23Flash_fwd_kernel_traitsILi64ELi128ELi128ELi4ELb0ELb0EN7cutlass6half_tE19Flash_kernel_traits"
    "ILi64ELi128ELi128ELi4ES2_EELb0ELb0ELb0ELb0ELb1ELb1ELb0ELb0EEv16Flash_fwd_params"
)
"""FlashAttention-2, float16, head dimension 64, blocks of 128 x 128, not causal, whole blocks."""
FLASH3 = (
    r"compute_attn_wsI23Flash_fwd_kernel_traitsILi64ELi192ELi128ELi16E\w+half_tELb0ELi1EELb0ELb0E\w*StaticPersistent"
)
"""FlashAttention-3, the same with blocks of 192 x 128 and one query head to a head of keys."""
A5000 = msgspec.structs.replace(
    gpu("rtx-3060").board, name="rtx-a5000", title="RTX A5000", cuda_cores=8192, clock_ghz=1.695, fp16_tflops=111.1,
    bandwidth_gb_s=768.0,
)  # fmt: skip
"""NVIDIA RTX A5000 data sheet; 64 multiprocessors."""


class Published(NamedTuple):
    """TFLOPS of non-causal attention forward, head dimension 64, 32 heads, 16,384 tokens in all, in images of 512 and
    on, each twice as long as the one before.
    """

    code: str
    on: Gpu
    tflops: tuple[float, ...]
    source: str


PUBLISHED = (
    Published("flash2 sm_90", gpu("h100"), (282, 306, 318, 321, 322, 324), "arXiv 2407.08608, figure 5"),
    Published("flash3 sm_90", gpu("h100"), (333, 392, 460, 476, 496, 497), "arXiv 2407.08608, figure 5"),
    Published("flash2 sm_80", Gpu(A5000), (84, 81, 81, 82, 82), "github.com/gpu-mode/ring-attention/issues/10"),
)


@dataclasses.dataclass(frozen=True)
class DenseCode:
    """Of a warp: what it does once, and for each further block of keys.

    Attributes:
        rows, keys: of a block. resident: programs that a multiprocessor holds.
    """

    once: Work
    block: Work
    rows: int
    keys: int
    resident: int

    def launch(self, tokens: int, images: int, heads: int, width: int) -> LaunchWork:
        """Attention over whole blocks."""
        programs = math.ceil(tokens / self.rows) * images * heads
        more = tokens / self.keys - 1
        both = zip(dataclasses.astuple(self.once)[2:], dataclasses.astuple(self.block)[2:], strict=True)
        work = Work(programs, self.once.warps, *(a + more * b for a, b in both))
        return LaunchWork((work,), self.resident, programs * tokens * 4 * width, 8 * tokens * images * heads * width)


def of_warp(part: list[Instruction] | tuple[Instruction, ...], warps: int) -> Work:
    """What instructions do, each once."""
    together = sum(x.products for x in part if x.name == "HGMMA")
    return Work(
        1, warps, len(part), counts(part)["special"], sum(x.shared_bytes for x in part), together,
        sum(x.products for x in part) - together,
    )  # fmt: skip


def cubins(wheel: Path) -> Iterator[tuple[int, bytes]]:
    """Compute capability and content of all that a wheel's libraries carry uncompressed."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(".so"):
                yield from _fat(archive.read(name))


def _fat(data: bytes) -> Iterator[tuple[int, bytes]]:
    start = data.find(b"\x50\xed\x55\xba")
    while start >= 0:
        _, _, header, size = struct.unpack_from("<IHHQ", data, start)
        at, end = start + header, start + header + size
        while at < end:
            kind, _, own, length = struct.unpack_from("<HHIQ", data, at)
            if kind == 2 and data[at + own : at + own + 4] == b"\x7fELF":
                yield struct.unpack_from("<I", data, at + 28)[0], data[at + own : at + own + length]
            at += own + length
        start = data.find(b"\x50\xed\x55\xba", end)


def _found(wheel: Path, pattern: str, capability: int) -> tuple[bytes, str]:
    for sm, cubin in cubins(wheel):
        symbol = re.search(rb"\.text\.(_Z\w*" + pattern.removeprefix("_Z").encode() + rb"\w*)", cubin)
        if sm == capability and symbol:
            return cubin, symbol[1].decode()
    raise click.ClickException(f"{wheel.name} has no such kernel for sm_{capability}; take the version named above.")


def flash2(wheel: Path, capability: int) -> DenseCode:
    """FlashAttention-2: four warps; 255 registers leave room for two programs."""
    code = read(*_found(wheel, FLASH2, capability))
    main = max(code.loops, key=lambda loop: counts(loop.own)["matrix"])
    return DenseCode(of_warp(code.straight, 4), of_warp(main.own, 4), 128, 128, 2)


def flash3(wheel: Path) -> DenseCode:
    """FlashAttention-3: twelve warps compute; the loop over tiles is what they do once."""
    code = read(*_found(wheel, FLASH3, 90))
    multiplying = [loop for loop in code.loops if counts(loop.own)["matrix"]]
    outer, inner = sorted(multiplying, key=lambda loop: loop.depth)
    return DenseCode(of_warp(outer.own, 12), of_warp(inner.own, 12), 192, 128, 1)


def compare(codes: dict[str, DenseCode]) -> list[dict[str, Any]]:
    """The model's TFLOPS beside the published ones."""
    rows = []
    for published in PUBLISHED:
        for power, tflops in enumerate(published.tflops):
            tokens = 512 << power
            images = 16384 // tokens
            took = seconds(codes[published.code].launch(tokens, images, 32, 64), published.on)
            modelled = 4 * images * 32 * tokens**2 * 64 / took / 1e12
            rows.append({
                "code": published.code, "on": published.on.board.title, "tokens": tokens, "published": tflops,
                "modelled": round(modelled, 1), "ratio": round(modelled / tflops, 3), "source": published.source,
            })  # fmt: skip
    return rows


def recorded() -> dict[str, DenseCode]:
    """Counts of the committed result."""
    found = json.loads(RESULT.read_text(encoding="utf-8"))["statistics"]["codes"]
    return {name: msgspec.convert(code, DenseCode) for name, code in found.items()}


@click.command()
@click.option("--flash2", "wheel2", type=click.Path(exists=True, path_type=Path), help="vllm-flash-attn 2.6.2.")
@click.option("--flash3", "wheel3", type=click.Path(exists=True, path_type=Path), help="xformers 0.0.29.post3.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for gpu_published.json.")
def main(wheel2: Path | None, wheel3: Path | None, output: Path | None) -> None:
    codes = recorded() if RESULT.exists() else {}
    if wheel2:
        codes |= {f"flash2 sm_{sm}": flash2(wheel2, sm) for sm in (80, 90)}
    if wheel3:
        codes["flash3 sm_90"] = flash3(wheel3)
    rows = compare(codes)
    names = ("code", "on", "tokens", "published", "modelled", "ratio")
    print_table("TFLOPS, head dimension 64, float16", names, [[str(r[n]) for n in names] for r in rows])
    if output:
        subjects = [Subject(path=x.name, sha256=sha256(x)) for x in (wheel2, wheel3) if x]
        method = {"what": "a roofline fed with FlashAttention's machine code, beside published measurements"}
        statistics = {"rows": rows, "codes": {name: dataclasses.asdict(code) for name, code in codes.items()}}
        write_summary(output / RESULT.name, Result("evaluation", subjects, method, {}, statistics))
    sys.exit(any(abs(r["ratio"] - 1) > WITHIN for r in rows))


if __name__ == "__main__":
    main()
