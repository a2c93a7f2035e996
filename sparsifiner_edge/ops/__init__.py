"""Operators of the ONNX domain `sparsifiner`: schemas, a NumPy reference and the implementations checked against it."""
