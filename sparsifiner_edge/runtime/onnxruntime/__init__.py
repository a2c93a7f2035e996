"""ONNX Runtime: its session, and the providers that it runs on. Importing this loads nothing."""
