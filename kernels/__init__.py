"""Triton device code. It runs on the GPU, starts nothing and allocates nothing: see genfast.launch.

Installed as `genfast.kernels`. Activations are dense NHWC; a weight is dense
[C_small, kh, kw, C_big], where small is a convolution's low-resolution side and big the other.
"""
