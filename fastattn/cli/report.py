"""``fastattn report``: what the owner of a device runs and sends back: every op and whole models, checked."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from .. import dispatch
from ..settings import settings
from ..spec import UnsupportedError
from . import info

PROMPT = list(range(40, 57))
NEW_TOKENS = 4


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The arguments of ``fastattn report``."""
    p.description = (
        "Check a backend on its device: small calls with every feature of every op, and two small models as "
        "a whole, each against float64; on an NPU also every operator and kernel of ascend_ops with its time "
        "(and, under torchrun, sums over ranks). Prints Markdown."
    )
    p.add_argument("--backend", required=True, choices=dispatch.BACKENDS, help="the one to check")
    p.add_argument("--device", help="npu, cuda, cpu; default: the backend's")
    p.add_argument("--full", action="store_true", help="on an NPU also long sequences, up to 32768")


def main(args: argparse.Namespace) -> int:
    """Prints the report; 0 if all is right."""
    emulated = args.backend in settings.emulate
    device = args.device or ("cpu" if emulated else dispatch.load_backend(args.backend).device_types[0])
    first = os.environ.get("RANK", "0") == "0"
    if first:
        print(f"```\n{info.report()}\n```\n")
    right = True
    if args.backend == "ascend":
        from ascend_ops import report

        matrix = partial(report.run, full=args.full, emulate=emulated)
        right &= _tried("ascend_ops", lambda: matrix() == 0, says_so=first)
    if not first:  # the rest is one process's
        return 0 if right else 1
    print(f"\n## ops of {args.backend}, device {device}\n")
    right &= _tried("ops", lambda: check_every_op(args.backend, device))
    print(f"\n## models on {args.backend}, device {device}")
    for form, name in (("fp16", "float16"), ("int4", "4 bits with act-order")):
        right &= _tried(name, partial(check_model, args.backend, device, form))
    return 0 if right else 1


def _tried(name: str, part: Callable[[], bool], *, says_so: bool = True) -> bool:
    """Prints what came of a part of the report; whatever it raises belongs there as well, of every rank."""
    try:
        right = part()
    except Exception as failure:  # noqa: BLE001
        print(f"\n{name}: FAILED {type(failure).__name__}: {failure}", flush=True)
        return False
    if says_so:
        print(f"\n{name}: {'right' if right else 'WRONG'}", flush=True)
    return right


def check_every_op(backend: str, device: str) -> bool:
    """Prints a table of `check_calls.calls`; whether the backend took some of them, and all those are right.

    A call that the backend refuses has its reasons in the table: there another backend runs.
    """
    import torch

    from ..check import check
    from ..check_calls import calls

    taken, wrong = 0, 0
    print("| call | dtype | result |\n|---|---|---|")
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for name, op, args in calls(torch.device(device), dtype):
            against = dispatch.reasons_against(backend, op, args.signature())
            if not against:
                try:
                    report = check(dispatch.run, op, args, backend)
                    found, right = str(report), report.ok
                except UnsupportedError as refusal:  # of shapes or lengths, which a signature does not have
                    against = [str(refusal).replace(":\n", ": ")]
                except Exception as failure:  # noqa: BLE001 (whatever it is, it belongs into the report)
                    line = str(failure).partition("\n")[0]
                    found, right = f"FAILED {type(failure).__name__}: {line}", False
            if against:
                found = f"refused: {'; '.join(against)}"
            else:
                taken += 1
                wrong += not right
            cell = found.replace("\n", "; ").replace("|", "\\|")
            print(f"| {name} | {str(dtype).removeprefix('torch.')} | {cell} |", flush=True)
    print(f"\n{taken} calls taken, {wrong} wrong")
    return taken > 0 and not wrong


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
        # What the backend has no kernel for is left to the others, as without a report.
        with dispatch.use_backend(",".join(dict.fromkeys((backend, *dispatch.AUTOMATIC)))):
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
