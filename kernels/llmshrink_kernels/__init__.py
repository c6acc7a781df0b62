"""Triton kernels for compressed weights, each with its plain torch meaning beside it."""
