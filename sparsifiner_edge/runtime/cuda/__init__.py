"""CUDA as far as running an engine needs it, by cuda-python or pycuda, and buffers that are always given back."""

from sparsifiner_edge.runtime.cuda.driver import CudaDevice, Driver, probe
from sparsifiner_edge.runtime.cuda.stream_buffers import StreamBuffers

__all__ = ["CudaDevice", "Driver", "StreamBuffers", "probe"]
