"""The vendor's compiler on a machine without NPU and without CANN: what it makes of a Triton kernel.

    lower.py     Triton -> linalg, by triton-ascend's own stages plan.py      linalg -> cores, buffers and
    synchronisation, by bishengir-compile; its verdict and its figures execute.py   the same linalg,
    compiled for this CPU and called worker.py    the three behind JSON lines, for the environment that has
    triton-ascend client.py    starts a worker from any environment

triton-ascend installs as ``triton`` and so lives in an environment of its own (``make .venv-ascend``).
"""
