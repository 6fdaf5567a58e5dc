"""``fastattn report``: what the owner of a device runs and sends back: every op and whole models, checked."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

from .. import dispatch
from ..settings import settings
from . import info

PROMPT = list(range(40, 57))
NEW_TOKENS = 4


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The arguments of ``fastattn report``."""
    p.description = (
        "Check a device: on an NPU every operator and kernel of ascend_ops (and, under torchrun, sums over "
        "ranks); on any device two small models as a whole, each op against float64. Prints Markdown."
    )
    p.add_argument(
        "--backend", required=True, choices=dispatch.BACKENDS, help="that runs the ops of the models"
    )
    p.add_argument("--device", help="npu, cuda, cpu; default: the backend's")
    p.add_argument("--full", action="store_true", help="also long sequences, up to 32768")


def main(args: argparse.Namespace) -> int:
    """Prints the report; 0 if all is right."""
    emulated = args.backend in settings.emulate
    device = args.device or ("cpu" if emulated else dispatch.load_backend(args.backend).device_types[0])
    first = os.environ.get("RANK", "0") == "0"
    if first:
        print(f"```\n{info.report()}\n```\n")
    status = 0
    if args.backend == "ascend":
        from ascend_ops import report

        try:
            status = report.run(full=args.full, emulate=emulated)
        except Exception as failure:  # noqa: BLE001 (whatever it is, it belongs into the report)
            print(f"\nascend_ops: FAILED {type(failure).__name__}: {failure}")
            status = 1
    if not first:  # the models are one process's
        return status
    print(f"\n## models on {args.backend}, device {device}")
    for form, name in (("fp16", "float16"), ("int4", "4 bits with act-order")):
        try:
            right = check_model(args.backend, device, form)
        except Exception as failure:  # noqa: BLE001 (whatever it is, it belongs into the report)
            print(f"\n{name}: FAILED {type(failure).__name__}: {failure}")
            right = False
        else:
            print(f"\n{name}: {'right' if right else 'WRONG'}", flush=True)
        status |= not right
    return status


def check_model(backend: str, device: str, form: str) -> bool:
    """Prints what each op of a small model did on the backend; whether all of it, and the logits, are right.

    Logits are compared with those of the CPU backend in float16, to what two such computations may differ by.
    """
    from ..check import check
    from ..models import random_llama
    from ..models.load import load
    from ..models.sampling import SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        made = random_llama.RandomLlama(2, 256, form, queries_per_kv=2)
        path = str(random_llama.write(made, Path(folder)))
        with dispatch.use_backend("cpu"):
            expected = load(path, dtype="float16").logits([PROMPT])[0]
        # On a device the backend comes first, and what it has no kernel for runs on torch's.
        with dispatch.use_backend(backend) if device == "cpu" else nullcontext():
            model = load(path, dtype="float16", device=device)
            before = Counter(dispatch.calls)
            report = check(model.generate, [PROMPT], SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True))
            ours = model.logits([PROMPT])[0]
    ran = dispatch.calls - before
    elsewhere = {key for key in ran if key[0] != backend}
    error = float((ours - expected).abs().max())
    allowed = 0.02 * float(expected.abs().max())
    print(f"\n{report}\nlogits: {error:.2e} of {allowed:.2e} allowed")
    if elsewhere:
        print(f"not on {backend}: {', '.join(sorted(f'{op} ({name})' for name, op in elsewhere))}")
    if len(elsewhere) == len(ran):
        print(f"no op ran on {backend}: this checks nothing of it")
        return False
    return report.ok and error <= allowed and bool(ours.isfinite().all())
