"""Running a bundle: one `Session` protocol, one class per backend. Importing this loads no backend."""

from sparsifiner_edge.execution import KERNEL_CHOICES, PRECISIONS, PROVIDERS, Execution
from sparsifiner_edge.runtime.open import BACKENDS, open_session
from sparsifiner_edge.runtime.session import Session

__all__ = ["BACKENDS", "KERNEL_CHOICES", "PRECISIONS", "PROVIDERS", "Execution", "Session", "open_session"]
