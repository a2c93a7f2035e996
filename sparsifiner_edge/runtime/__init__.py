"""Runtime that loads and runs bundles through one `Session` interface. Importing this package imports no backend."""

from sparsifiner_edge.execution import COMPUTE_PRECISIONS, KERNEL_CHOICES, PROVIDERS, Execution
from sparsifiner_edge.runtime.open import BACKENDS, open_session
from sparsifiner_edge.runtime.session import Session

__all__ = ["BACKENDS", "KERNEL_CHOICES", "COMPUTE_PRECISIONS", "PROVIDERS", "Execution", "Session", "open_session"]
