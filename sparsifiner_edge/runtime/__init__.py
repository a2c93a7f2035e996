"""Running a bundle: one `Session` protocol, one class per backend. Importing this loads no backend."""

from sparsifiner_edge.runtime.open import BACKENDS, KERNEL_CHOICES, open_session
from sparsifiner_edge.runtime.session import Session

__all__ = ["BACKENDS", "KERNEL_CHOICES", "Session", "open_session"]
