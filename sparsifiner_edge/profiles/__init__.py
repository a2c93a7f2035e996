"""Measuring a bundle: isolated worker processes, latency, memory, and the comparison of two bundles."""

from sparsifiner_edge.profiles.latency import RULES, profile_bundle

__all__ = ["RULES", "profile_bundle"]
