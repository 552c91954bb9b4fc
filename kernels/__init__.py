"""Operators of trainc, one file each, on PyTorch's CPU kernels and on Triton's for CUDA."""
