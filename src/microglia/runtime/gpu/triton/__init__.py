"""The block kernels of the GPU, in Triton: the same operators on the same tensors as the CPU's compiled ones.

Only `microglia.runtime.gpu.triton.kernel` imports Triton, just before a kernel runs.
"""

from microglia.runtime.gpu.triton.launch import block_conv2d, block_linear

__all__ = ["block_conv2d", "block_linear"]
