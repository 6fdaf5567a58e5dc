"""Runs under the Python that has llama-cpp-python: model, threads and context as arguments, then one JSON
request a line on stdin, one JSON reply a line on stdout. Imports nothing else of this repository.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from itertools import islice
from time import perf_counter

from llama_cpp import Llama


def main() -> None:
    path, threads, context = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    model = Llama(
        path, n_ctx=context, n_batch=context, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    print(json.dumps({"version": version("llama-cpp-python")}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        model.reset()
        begin = perf_counter()
        tokens, times = [], []
        # Greedy, and without a look at the end token: generate() itself never stops.
        for token in islice(model.generate(request["prompt"], temp=0.0, top_k=1), request["output"]):
            tokens.append(token)
            times.append(perf_counter())
        reply = {"latency_s": times[-1] - begin, "ttft_s": times[0] - begin, "tokens": tokens}
        print(json.dumps(reply), flush=True)


main()
