"""Weights and images from other packages, for the demonstration (`examples/demo.py`), tests and benchmarks."""
