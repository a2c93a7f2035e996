"""Inference on images, videos and cameras.

`sources` parses a URI, `child` decodes it in a separate process, and `capture` keeps that process alive and holds its
newest frame. `service` passes frames through the model and hands the answers to `json_lines`, `overlay` and `health`.
"""
