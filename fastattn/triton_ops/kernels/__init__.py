"""Device code. Kernels know tensors by pointers, strides and lengths, and nothing of records."""
