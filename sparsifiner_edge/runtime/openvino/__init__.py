"""OpenVINO on the processor, with the operators of the native library."""
