"""Triton kernels for compressed weights, each with its plain torch meaning beside it. Needs torch; Triton where it runs."""
