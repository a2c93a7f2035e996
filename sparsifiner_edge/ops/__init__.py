"""Operators of the ONNX domain `sparsifiner`: a schema, a NumPy reference, implementations checked against it."""
