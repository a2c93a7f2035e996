"""What the decoding process may take: it reads what strangers send. What else it may do says `confine`."""

from __future__ import annotations

import resource

from sparsifiner_edge.process import limit_resource

MAX_PIXELS = 40_000_000
"""Of one frame: 8K is 33 million. Told to the decoder, which refuses more before it allocates."""
MAX_ASPECT = 16
MEMORY_BYTES = 6 << 30


def limit(pipeline: bool) -> None:
    """Limit this process: it writes no file (pipes are none) and has bounded memory; see `process` for the rest.

    Not a `pipeline` of GStreamer: it is the user's own, caches a registry, may record, and hardware decoders reserve
    more addresses than any sane limit.
    """
    if not pipeline:
        limit_resource(resource.RLIMIT_FSIZE, 0)
        limit_resource(resource.RLIMIT_AS, MEMORY_BYTES)


def require_sane_size(width: int, height: int) -> None:
    """Refuse a frame that no camera gives.

    Raises:
        ValueError: empty, above `MAX_PIXELS`, or more than `MAX_ASPECT` times longer than wide.
    """
    if width < 1 or height < 1 or width * height > MAX_PIXELS:
        raise ValueError(f"frames of {width} x {height} px; at most {MAX_PIXELS} px are taken")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"frames of {width} x {height} px, longer than {MAX_ASPECT} times their width")
