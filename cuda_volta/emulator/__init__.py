"""Runs the kernel sources on a CPU, every access checked."""
