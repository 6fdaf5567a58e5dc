"""A rank that parallelizes small models of transformers and compares them with themselves, unsharded."""

from __future__ import annotations

import copy

import torch

import fastattn
from fastattn.collectives.exchange import traffic
from fastattn.parallel import group
from fastattn.spec import TPGroup
from tests.models.builders import FAMILIES, hf_model
from tests.parallel.cases import same_bits

IDS = torch.arange(2 * 37).view(2, 37) % 300


@torch.no_grad()
def compare(g: TPGroup, family: str, sync: str, **overrides: object) -> None:
    model = hf_model(family, seed=4, **overrides)
    whole = copy.deepcopy(model)
    found = fastattn.parallelize(model, tp=g, sync=sync)
    assert found is model
    wanted, ours = whole(IDS).logits, found(IDS).logits
    tolerance = 2e-5 if not sync.startswith("compressed") else 0.05
    assert (ours - wanted).abs().max() <= tolerance * wanted.abs().max(), (family, sync)
    assert same_bits(g, ours)
    traffic.clear()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}
    tokens = found.generate(IDS, **options)
    calls = sum(traffic.calls[kind] for kind in ("all_reduce", "send"))
    layers, senders = model.config.num_hidden_layers, 1 if sync == "exact" else g.world - 1
    assert calls == (0 if g.world == 1 else 6 * 2 * layers * senders)
    if tolerance < 1e-3:
        assert torch.equal(tokens, whole.generate(IDS, **options))
    parameters = sum(p.numel() for p in found.model.layers.parameters())
    norms = sum(p.numel() for n, p in found.model.layers.named_parameters() if "norm" in n)
    assert parameters == norms  # nothing of the whole matrices is left


def main() -> None:
    g = group.init(60)
    torch.set_num_threads(1)
    for family in FAMILIES:
        compare(g, family, "exact")
    compare(g, "llama", "direct", attention_bias=True, mlp_bias=True)
    compare(g, "llama", "compressed:element=int8,scale=fp16")
    assert group.shutdown(g)
    print("equal")


main()
