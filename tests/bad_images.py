"""Images that cannot be read."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nearly nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def noise(path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)


BAD_IMAGES: dict[str, Callable[[Path], object]] = {
    "truncated.png": lambda p: (noise(p), os.truncate(p, 2000)),
    "truncated.jpg": lambda p: (noise(p), os.truncate(p, 1500)),
    "text.png": lambda p: p.write_text("not an image"),
    "empty.jpg": lambda p: p.write_bytes(b""),
    "bomb.png": lambda p: p.write_bytes(png_of_size(30_000, 30_000)),
    "sizeless.png": lambda p: p.write_bytes(png_of_size(0, 0)),
    "page.html": lambda p: p.write_text("<html>"),
}
