"""Export of a sparse or dense model to a bundle: ONNX file, manifest and golden pair, checked against torch."""
