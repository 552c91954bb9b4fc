"""What Triton kernels compile to, told with no GPU at hand."""
