"""From a student, or a dense model, to a bundle: ONNX file, manifest and golden pair, checked against torch."""
