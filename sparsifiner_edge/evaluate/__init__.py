"""Fidelity and accuracy of a sparse model or bundle, compared with the dense model."""
