"""Triton kernels for sm_75 and newer NVIDIA GPUs: functions on the records of `fastattn.spec`.

Device code is in `kernels/`, one subject a file; beside it, the functions that launch it. Importing this
package imports no Triton, its modules do.
"""
