"""The block kernels of the GPU, in Triton: the same operators on the same tensors as the CPU's compiled ones.

Triton is imported in `microglia.runtime.gpu.triton.kernel` alone, when a kernel is about to run.
"""

from microglia.runtime.gpu.triton.launch import block_conv2d, block_linear

__all__ = ["block_conv2d", "block_linear"]
