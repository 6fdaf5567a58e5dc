"""Latency and throughput of a real model, in the manner of FasterTransformer's benchmark scripts.

Sweeps the product of batch sizes, input lengths, output lengths, tensor-parallel sizes, data types and
precision policies of activations. Input and output lengths are fixed: end tokens are ignored. One row a case:

  latency   from the call to the last token of the batch
  TTFT      from the call to the moment when every sequence has its first token
  TPOT      (latency - TTFT) / (output - 1), time per further token of the batch
  limit     of TTFT: the linear layers at the rate of torch's GEMM, measured here; of TPOT: a step that
            reads the weights and the KV cache once, at the bandwidth measured here
  tokens/s  batch * output / latency
  peak MB   resident memory of each rank's process while it loads and generates, torch included; with
            --device what torch allocates on the device

With --link, the ranks run in network namespaces that such an emulated link joins (bench/links.py), and the
limit is the link's if that is larger: at each sync point one hop, and the bytes that the busiest rank sends.
With several --sync, one model follows them in turn, each has a row, and ratio is the first's time over its.

With --device or --backend, another than the CPU's kernels compute; with FASTATTN_EMULATE=volta (or ascend,
triton) and --backend volta, those kernels in an emulator, whose times are "emulated". The lines "ops served
by" count what ran where, and --peer cpu compares the tokens with the CPU backend's. Decoding launches every
op from Python; bench/decode_step.py measures a step as a CUDA graph.

With --peer, the rival generates from the same file with the same prompts and as many threads as all
ranks together; the runs alternate. It has a row below ours, and ratio is its time over ours (above 1:
ours is faster).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from fastattn.dispatch import BACKENDS
from fastattn.models import random_llama
from lib import env
from lib.args import ACTS, DTYPES, link, model, names, positive, sweep, sync
from lib.launch import as_ranks
from lib.llm_peers import NAMES
from lib.llm_rows import TABLE, notes
from lib.llm_worker import run
from lib.records import Record, ratio, write

QUESTION = "Why is the sky blue? Answer in one sentence."


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--model", type=model, default="smollm2",
        help="a directory, a GGUF file, smollm2 (default), or random weights: random:LAYERSxHIDDEN[:int4]",
    )  # fmt: skip
    p.add_argument("--device", choices=env.DEVICES, default="cpu", help="that computes; default: cpu")
    p.add_argument("--backend", choices=BACKENDS, help="for every op, or refuse (see fastattn info)")
    p.add_argument("--batch_size", type=sweep, default=(1, 4), metavar="N,N", help="default: 1,4")
    p.add_argument("--input_len", type=sweep, default=(128,), metavar="N,N", help="tokens; default: 128")
    p.add_argument("--output_len", type=sweep, default=(32,), metavar="N,N", help="tokens; default: 32")
    p.add_argument(
        "--tensor_para_size", type=sweep, metavar="N,N", help="default: 1,2; only 1 where --device is not cpu"
    )
    p.add_argument(
        "--inference_data_type", type=names(tuple(DTYPES)), default=("fp32",), metavar="T,T",
        help=f"of activations and KV cache: {', '.join(DTYPES)}; default: fp32",
    )  # fmt: skip
    p.add_argument(
        "--act", type=names(tuple(ACTS)), default=("none",), metavar="A,A",
        help="none: activations are never quantized (default); int8: they may be",
    )  # fmt: skip
    p.add_argument(
        "--sync", nargs="+", type=sync, default=("exact",), metavar="S",
        help="how ranks sum their partial results, as for fastattn generate; default: exact",
    )  # fmt: skip
    p.add_argument("--link", type=link, metavar="RATE/LATENCY", help="between the ranks, as 100mbit/1ms")
    p.add_argument("--iterations", type=positive, default=3, help="samples of each case; default: 3")
    p.add_argument("--warmup", type=positive, default=1, help="runs before them; default: 1")
    p.add_argument("--threads", type=positive, help="of each rank; default: cores / tensor_para_size")
    p.add_argument("--peer", type=names(NAMES), default=(), metavar="P,P", help=f"out of {', '.join(NAMES)}")
    p.add_argument("--llama_python", default=sys.executable, help="a Python that has llama-cpp-python")
    p.add_argument("--chat", default=QUESTION, metavar="TEXT", help='asked at the end; "" for nothing')
    p.add_argument("--json", metavar="FILE", help="write the records of docs/benchmarks.md")
    p.add_argument("--plot", metavar="FILE.png", help="draw throughput and TTFT")
    p.add_argument("--result", help=argparse.SUPPRESS)  # a rank, started by this program
    return p


def main() -> None:
    """Runs each (tensor_para_size, data type, act) in processes of its own, then reports."""
    args = arguments()
    if args.result:
        run(args)
        return
    configurations = list(product(args.tensor_para_size, args.inference_data_type, args.act))
    answer = ""
    records: list[Record] = []
    with tempfile.TemporaryDirectory() as folder:
        made = random_llama.parse(args.model)
        common = [] if made is None else ["--model", str(random_llama.write(made, Path(folder) / "model"))]
        if made is not None:
            args.chat = ""  # it has nothing to say
        for i, (world, dtype, act) in enumerate(configurations):
            threads = args.threads or max(1, env.cores() // world)
            if i == 0:
                with env.device(args.device):
                    print(f"{args.model}: {env.headline(env.capture(threads))}")
                print(TABLE.header(), flush=True)
            chosen = [*common, "--inference_data_type", dtype, "--act", act]
            chosen += ["--chat", args.chat if i == 0 else ""]
            if world == 1:
                chosen += ["--sync", "exact"]  # one rank has nothing to sum
            own = ("--tensor_para_size", str(world), "--threads", str(threads), *chosen)
            environment = {"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}
            where = f"tensor_para_size {world} {' '.join(chosen)}"
            result = as_ranks(__file__, own, world, args.link, where, environment)
            answer = answer or result["answer"]
            records += to_records(args.model, result)
            print(*(f"  {line}" for line in notes(result, env.cores())), sep="\n", flush=True)
    if args.json:
        write(args.json, records)
    if args.plot:
        from lib.plot import llm

        llm(records, args.plot)
    if args.chat:
        print(f"\n> {args.chat}\n{answer.strip()}")


def arguments() -> argparse.Namespace:
    """The command line, checked."""
    p = parser()
    args = p.parse_args()
    on_cpu = args.device == "cpu"
    args.tensor_para_size = args.tensor_para_size or ((1, 2) if on_cpu else (1,))
    if not on_cpu and args.tensor_para_size != (1,):
        p.error(f"--tensor_para_size {args.tensor_para_size}, expected 1 with --device {args.device}")
    if not on_cpu and set(args.peer) - {"cpu"}:
        p.error(f"--peer {','.join(args.peer)}, expected cpu with --device {args.device}")
    return args


METRICS = (
    # metric, unit, field of Times, whether more is better
    ("latency", "ms", "latency_ms", False),
    ("TTFT", "ms", "ttft_ms", False),
    ("TPOT", "ms", "tpot_ms", False),
    ("throughput", "tokens/s", "tokens_per_s", True),
)


def to_records(model: str, result: dict[str, Any]) -> list[Record]:
    """One record a metric of a row and peer, and two a rank for its peak memory."""
    records = []
    emulated, cores = result["emulated"], result["env"]["cores"]
    for row in result["rows"]:
        shape = f"batch={row['batch']} input={row['input']} output={row['output']} tp={row['world']}"
        if row["link"]:
            shape += f" link={row['link']}"
        if row["sync"] != "exact":
            shape += f" sync={row['sync']}"
        threads = row["world"] * row["threads"]
        shared = {
            "bench": "llm",
            "case": f"{Path(model).name} {row['dtype']} act={row['act']} {shape}",
            "spread": row["spread"],
            "claim": "emulated" if emulated or row["link"] or threads > cores else "measured",
            "env": result["env"],
        }
        limits = {
            "TPOT": (row["limits"]["TPOT"], row["tpot_limit_ms"]),
            "TTFT": (row["limits"]["TTFT"], row["ttft_limit_ms"]),
        }
        rivals = [(result["peers"].get(key, ""), rival["times"]) for key, rival in row["peers"].items()]
        if row["base"]:
            rivals.append((f"fastattn sync={result['rows'][0]['sync']}", row["base"]))
        for metric, unit, field, more in METRICS:
            ours = row["times"][field]
            bound = limits.get(metric, ("", None))
            for peer, times in rivals or [("", None)]:
                theirs = times[field] if times else None
                against = (peer, theirs, ratio(ours, theirs, more))
                records.append(Record.of(shared, metric, unit, ours, against, bound))
        for rank, peak in enumerate(row["peak_mb"]):
            records.append(Record.of(shared, f"peak memory of rank {rank}", "MB", peak))
            above, share = peak - result["torch_mb"], result["file_mb"] / row["world"]
            records.append(
                Record.of(
                    shared, f"memory above torch of rank {rank}", "MB", above,
                    bound=("share of the model file", share),
                )
            )  # fmt: skip
    return records


if __name__ == "__main__":
    main()
