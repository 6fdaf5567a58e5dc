"""Kernels for Ascend NPUs, their tile planner, and the routing to torch_npu's own operators.

A library of functions on tensors; it never imports `fastattn`, and importing it loads no toolkit.
"""
