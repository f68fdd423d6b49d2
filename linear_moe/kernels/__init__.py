"""Triton kernels: one file a family of recurrences. Tensors in, tensors out. Importing this package needs triton."""
