"""Measuring a bundle: isolated worker processes, latency, memory, power, layers, and the comparison of two bundles."""

from sparsifiner_edge.profiles.profile import profile_bundle

__all__ = ["profile_bundle"]
