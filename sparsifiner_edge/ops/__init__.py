"""Operators of the ONNX domain `sparsifiner`: one schema, one NumPy reference, and implementations checked against it."""
