"""Loads models under any launcher and has rank 0 save the logits of some token ids.

dump_logits.py SPLIT IDS MODEL OUT [MODEL OUT]...
"""

import sys

import torch

import fastattn
from fastattn.parallel import group

split, ids, *paths = sys.argv[1:]
g = group.init(60, [float(s) for s in split.split(",")] if split else None)
group.set_threads(g)
for path, out in zip(paths[::2], paths[1::2], strict=True):
    logits = fastattn.load(path, dtype="fp32", tp=g).logits([[int(i) for i in ids.split(",")]])
    if g.rank == 0:
        torch.save(logits[0], out)
group.shutdown(g)
