"""Damaging files, and using a model file that may be damaged."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from fastattn.models.checkpoint import open_checkpoint
from fastattn.models.config import tensor_shapes
from fastattn.spec import CheckpointError, Cut, Shard

SECONDS = 10.0  # for one file of some hundred kilobytes; sound ones take a hundredth of it
_rendered: set[str] = set()  # settings whose template works; each time would be a process of its own


def use(path: Path) -> bool:
    """Opens the model, reads everything and runs its tokenizer. False: a CheckpointError said why not."""
    start = time.monotonic()
    try:
        checkpoint = open_checkpoint(path)
        for name in tensor_shapes(checkpoint.config):
            shape = checkpoint.shape(name)
            if len(shape) == 2:
                checkpoint.load(name, Shard(0, 1, Cut(shape[0]), Cut(shape[1], ((0, shape[1] // 2),))))
            else:
                checkpoint.tensor(name, torch.float32)
        checkpoint.fingerprint()
        tokenizer = checkpoint.tokenizer()
        tokenizer.decode(tokenizer.encode("The dog, 123 naïve 😀<|im_end|>"))
        settings = tokenizer.files()["tokenizer_config.json"]
        if settings not in _rendered:
            tokenizer.chat([{"role": "user", "content": "hi"}])
            _rendered.add(settings)
    except CheckpointError:
        return False
    finally:
        assert time.monotonic() - start < SECONDS
    return True


def flips(data: bytes, upto: int, count: int, seed: int) -> Iterator[bytes]:
    """Copies with one to three bits turned, or a run of bytes replaced, in the first ``upto`` bytes."""
    rng = random.Random(seed)  # noqa: S311 - the same damage on every run
    for i in range(count):
        damaged = bytearray(data)
        for _ in range(rng.choice((1, 1, 3))):
            damaged[rng.randrange(upto)] ^= 1 << rng.randrange(8)
        if i % 5 == 0:
            at = rng.randrange(upto)
            run = rng.choice((b"\xff" * 8, b"\x00" * 8, rng.randbytes(12)))
            damaged[at : at + len(run)] = run[: len(data) - at]
        yield bytes(damaged)


def cuts(data: bytes, upto: int, count: int, seed: int) -> Iterator[bytes]:
    """The file's beginnings: every short one, some within the header, some within the data."""
    rng = random.Random(seed)  # noqa: S311 - the same damage on every run
    lengths = {
        *range(0, 64, 3),
        *(rng.randrange(upto) for _ in range(count)),
        *(rng.randrange(len(data)) for _ in range(count)),
    }
    for length in sorted({*lengths, len(data) - 1}):
        yield data[:length]
