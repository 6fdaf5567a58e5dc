"""FlashAttention and its companions for Volta (and Turing): kernels, build, launch and a CPU emulator.

A library of functions on tensors; it never imports `fastattn`. Importing it loads no CUDA toolkit.
"""
