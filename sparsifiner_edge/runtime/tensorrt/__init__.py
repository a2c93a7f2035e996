"""Backends TensorRT (`full`) and TensorRT-RTX (`rtx`), and the code that they share. Importing this loads neither."""
