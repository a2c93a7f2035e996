"""Running a bundle: one `Session` protocol, one class per backend. Importing this loads no backend."""

from sparsifiner_edge.runtime.open import BACKENDS, KERNELS, open_session
from sparsifiner_edge.runtime.session import Session

__all__ = ["BACKENDS", "KERNELS", "Session", "open_session"]
