"""`optimize`: the fastest sparse model that keeps a fidelity, on the device at hand."""
