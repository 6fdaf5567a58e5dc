"""One rank of quantized models: act_order_rank.py MODEL... prints {"MODEL layout": facts} as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

import fastattn
from fastattn.collectives.exchange import traffic
from fastattn.memory.paged import PagedKvCache
from fastattn.models.generate import Model
from fastattn.models.sampling import SamplingParams
from fastattn.parallel import group, plan
from fastattn.parallel.act_order import LAYOUTS
from fastattn.spec import PackedWeight

EXACT = (
    "star", "direct", "direct:scheme=two_step", "tiled", "tiled+direct", "fused_norm",
    "token_weave:min_tokens=2+exact", "token_weave:min_tokens=2+fused_norm",
)  # fmt: skip
PROMPTS = [[5, 17, 3, 200, 9], [44, 8]]


@torch.inference_mode()
def collectives(model: Model) -> dict[str, int]:
    """Of one forward of three tokens, without the head."""
    heads, c = model.decoder.blocks[0][0].kv_heads, model.config
    cache = PagedKvCache(c.num_layers, 4, 16, heads, c.head_dim)
    step = cache.reserve([0], [3])
    traffic.clear()
    model.decoder.forward(torch.tensor([1, 2, 3]), step, cache)
    return dict(traffic.calls)


def scattered(weights: list[PackedWeight]) -> int:
    """How many of the weights have act-order left at run time."""
    return sum(w.x_perm is not None or w.g_idx is not None for w in weights)


def facts(model: Model) -> dict[str, Any]:
    done = model.generate(PROMPTS, SamplingParams(max_tokens=12, ignore_eos=True))
    logits = model.logits(PROMPTS)
    return {
        "tokens": [one.token_ids for one in done],
        "logits": [one.tolist() for one in logits] if model.group.rank == 0 else [],
        "collectives": collectives(model),
        "o": scattered([a.o.weight for a, _ in model.decoder.blocks]),
        "down": scattered([m.down.weight for _, m in model.decoder.blocks]),
    }


def under_every_policy(model: Model) -> dict[str, list[list[int]]]:
    """The tokens that each exact policy and schedule gives."""
    decoder, found = model.decoder, {}
    policy, schedule = decoder.policy, decoder.schedule
    for sync in EXACT:
        p = plan.uniform(sync, "", model.config.num_layers, model.group, model.dtype.itemsize)
        decoder.policy, decoder.schedule = p.points.__getitem__, p.schedule
        done = model.generate(PROMPTS, SamplingParams(max_tokens=12, ignore_eos=True))
        found[sync] = [one.token_ids for one in done]
    decoder.policy, decoder.schedule = policy, schedule
    return found


def main() -> None:
    g = group.init(60)
    results = {}
    for path in sys.argv[1:]:
        for layout in LAYOUTS:
            model = fastattn.load(path, dtype="fp32", tp=g, layout=layout)
            results[f"{path} {layout}"] = facts(model)
        results[f"{path} policies"] = under_every_policy(fastattn.load(path, dtype="fp32", tp=g))
    group.shutdown(g)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
