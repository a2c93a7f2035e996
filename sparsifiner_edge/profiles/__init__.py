"""Measuring a bundle: isolated worker processes, latency, memory, power, layers, and the comparison of two bundles."""

from sparsifiner_edge.profiles.profile import profile_bundle
from sparsifiner_edge.profiles.rules import RULES
from sparsifiner_edge.profiles.sweep import parse_axes, sweep_bundle

__all__ = ["RULES", "parse_axes", "profile_bundle", "sweep_bundle"]
