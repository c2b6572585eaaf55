"""The sparse kernel for CUDA, in Triton. It runs on CPU under TRITON_INTERPRET=1, which is how the tests run it."""

from trainer.kernels.triton.visit import triton_kernel

__all__ = ["triton_kernel"]
