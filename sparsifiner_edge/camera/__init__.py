"""Running bundles on images, videos and cameras.

`sources` reads a URI, `child` (a process of its own) decodes it, `capture` keeps that process alive and its newest
frame, `service` takes frames through the model and on to `json_lines`, `overlay` and `health`.
"""
