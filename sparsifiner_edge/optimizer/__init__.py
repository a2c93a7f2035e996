"""The fastest sparse model at a fidelity that the user names, on the device at hand (`optimize`)."""
