"""Loads a model under any launcher and has rank 0 save the logits of some token ids.

dump_logits.py MODEL OUT SPLIT IDS...
"""

import sys

import torch

import fastattn
from fastattn.parallel import group

path, out, split, *ids = sys.argv[1:]
g = group.init(60, [float(s) for s in split.split(",")] if split else None)
group.set_threads(g)
logits = fastattn.load(path, dtype="fp32", group=g).logits([[int(i) for i in ids]])
if g.rank == 0:
    torch.save(logits[0], out)
group.shutdown(g)
