"""TensorRT and TensorRT-RTX: what both share, `full` and `rtx`, each a backend. Importing this loads neither."""
