"""Weights and images that other packages ship, for the demonstration (`examples/demo.py`), tests and benchmarks."""
