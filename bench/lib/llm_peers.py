"""Who else generates from the same weights: transformers, llama.cpp in another process, our CPU backend."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import torch

import fastattn
from fastattn.models.generate import Model
from fastattn.models.sampling import SamplingParams

NAMES = ("transformers", "llama.cpp", "cpu")
SERVER = Path(__file__).with_name("llama_cpp_server.py")


class Sample(NamedTuple):
    """One batch generated: seconds to the last and to the first token, and the tokens where known."""

    latency_s: float
    ttft_s: float
    tokens: list[list[int]]


class Peer(Protocol):
    """A rival on the same prompts."""

    name: str  # with its version

    def reason_against(self, batch: int) -> str:
        """Why it cannot run a batch of this size; "" when it can."""
        ...

    def generate(self, prompts: Sequence[Sequence[int]], output: int) -> Sample: ...
    def close(self) -> None: ...


class Transformers:
    """Hugging Face generate(): same file, dequantized by transformers itself to ``dtype``."""

    def __init__(self, path: Path, dtype: torch.dtype, threads: int) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        import transformers
        from transformers.utils import logging

        logging.set_verbosity_error()
        folder, gguf = (path, None) if path.is_dir() else (path.parent, path.name)
        self.name = f"transformers {transformers.__version__}"
        self._ours, self._threads = torch.get_num_threads(), threads
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=gguf, dtype=dtype
        )
        self._model.eval()
        self._model.generation_config.eos_token_id = None  # fixed output length

    def reason_against(self, batch: int) -> str:
        return ""

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], output: int) -> Sample:
        ids = torch.tensor(prompts)
        clock = _Clock()
        torch.set_num_threads(self._threads)
        begin = perf_counter()
        out = self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=output,
            do_sample=False,
            streamer=clock,
        )
        end = perf_counter()
        torch.set_num_threads(self._ours)
        return Sample(end - begin, clock.times[1] - begin, out[:, ids.shape[1] :].tolist())

    def close(self) -> None:
        del self._model


class Cpu:
    """fastattn's CPU backend: what another backend, or its emulator, has to generate."""

    name = "fastattn's cpu"

    def __init__(self, path: Path, dtype: torch.dtype, act: str, threads: int) -> None:
        self._ours, self._threads = torch.get_num_threads(), threads
        self._model = fastattn.load(path, dtype=dtype, act=act)

    def reason_against(self, batch: int) -> str:
        return ""

    def generate(self, prompts: Sequence[Sequence[int]], output: int) -> Sample:
        torch.set_num_threads(self._threads)
        with fastattn.use_backend("cpu"):
            sample = completed(self._model, prompts, output)
        torch.set_num_threads(self._ours)
        return sample

    def close(self) -> None:
        del self._model


def completed(model: Model, prompts: Sequence[Sequence[int]], output: int) -> Sample:
    """One batch by a model of ours. Each token is timed when the host has it, so when a device has ended."""
    done = model.generate(prompts, SamplingParams(max_tokens=output, ignore_eos=True))
    return Sample(max(c.latency_s for c in done), max(c.ttft_s for c in done), [c.token_ids for c in done])


class _Clock:
    """A streamer: generate() calls put() with the prompt, then with the tokens of each step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(perf_counter())

    def end(self) -> None:
        pass


class LlamaCpp:
    """llama.cpp through llama-cpp-python, in the Python that has it, kept alive between samples."""

    def __init__(self, python: str, path: Path, threads: int, context: int) -> None:
        if path.is_dir():
            raise ValueError(f"--peer llama.cpp: {path} is a directory, llama.cpp reads GGUF files")
        command = [python, str(SERVER), str(path), str(threads), str(context)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.name = "llama.cpp (llama-cpp-python {})".format(self._receive()["version"])

    def reason_against(self, batch: int) -> str:
        return "" if batch == 1 else "llama-cpp-python generates one sequence at a time"

    def generate(self, prompts: Sequence[Sequence[int]], output: int) -> Sample:
        assert self._process.stdin is not None
        print(
            json.dumps({"prompt": list(prompts[0]), "output": output}), file=self._process.stdin, flush=True
        )
        reply = self._receive()
        return Sample(reply["latency_s"], reply["ttft_s"], [reply["tokens"]])

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)

    def _receive(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"llama.cpp's process ended with status {self._process.wait()}")
        return json.loads(line)
