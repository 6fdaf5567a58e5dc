"""Quantization configs as published, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastattn.models.fields import Fields
from fastattn.models.hf_quant import parse_format, read_format
from fastattn.quant.awq import Awq
from fastattn.quant.compressed import Compressed
from fastattn.quant.gptq import Gptq
from fastattn.quant.grouped import Format
from fastattn.spec import CheckpointError
from tests.models.quantized import config
from tests.quant.stored import SPECS, Spec, store

GPTQ = config(Spec("gptq"))
AWQ = config(Spec("awq", symmetric=False))
COMPRESSED = config(Spec("compressed-tensors"))


def changed(base: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy in which the value at a dotted path is another."""
    copy: dict[str, Any] = json.loads(json.dumps(base))
    *folders, last = path.split(".")
    inner = copy
    for folder in folders:
        inner = inner[folder]
    inner[last] = value
    return copy


def parse(values: dict[str, Any]) -> Format:
    return parse_format(Fields("config.json", values))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_formats(spec: Spec) -> None:
    expected = store(spec, 8, 16, 0).format
    if spec.group_size == -1 and isinstance(expected, Gptq):  # one group a row has no act-order
        expected = Gptq(spec.bits, -1, False, spec.zeros)
    assert parse(config(spec)) == expected


WEIGHTS = "config_groups.group_0.weights"
ACCEPTED: list[tuple[dict[str, Any], Format]] = [
    (changed(GPTQ, "meta", {"quantizer": ["gptqmodel:1.7.4"]}), Gptq(4, 32, False, "words")),
    (changed(GPTQ, "meta", {"quantizer": "autogptq:0.7"}), Gptq(4, 32, False, "v1")),
    (changed(GPTQ, "dynamic", {"-:.*down.*": {}}), Gptq(4, 32, False, "v1")),
    (changed(GPTQ, "format", "gptq"), Gptq(4, 32, False, "v1")),
    ({"quant_method": "gptq", "bits": 2, "group_size": 128}, Gptq(2, 128, False, "v1")),
    (changed(AWQ, "version", "GEMM"), Awq(32)),
    ({"quant_method": "awq", "w_bit": 4, "q_group_size": 128}, Awq(128)),
    (changed(COMPRESSED, WEIGHTS + ".actorder", "weight"), Compressed(4, 32, False, True)),
    (changed(COMPRESSED, "config_groups.group_1", COMPRESSED["config_groups"]["group_0"]),
     Compressed(4, 32, False, True)),
]  # fmt: skip


@pytest.mark.parametrize(("values", "expected"), ACCEPTED, ids=range(len(ACCEPTED)))
def test_accepted(values: dict[str, Any], expected: Format) -> None:
    assert parse(values) == expected


REFUSED: list[tuple[dict[str, Any], str, Any, str]] = [
    (GPTQ, "quant_method", "bitsandbytes", "'bitsandbytes', supported are gptq, awq, compressed-tensors"),
    (GPTQ, "bits", 5, "is 5, supported are 2, 3, 4, 8"),
    (GPTQ, "bits", "4", "expected an integer"),
    (GPTQ, "group_size", 100, "is 100, supported are multiples of 16"),
    (GPTQ, "group_size", 0, "is 0"),
    (GPTQ, "group_size", None, "is missing"),
    (GPTQ, "desc_act", "yes", "expected true or false"),
    (GPTQ, "checkpoint_format", "marlin", "is 'marlin', supported are gptq, gptq_v2"),
    (GPTQ, "checkpoint_format", "gptq_p", "is 'gptq_p'"),
    (GPTQ, "format", "gptq_v2", "checkpoint_format: differs from format"),
    (GPTQ, "pack_dtype", "int16", "is 'int16', supported is int32"),
    (GPTQ, "is_marlin_format", True, "Marlin"),
    (GPTQ, "rotation", "hadamard", "is not supported"),
    (GPTQ, "adapter", {"rank": 8}, "is not supported"),
    (GPTQ, "dynamic", {"+:.*down.*": {"bits": 8}}, "in another way"),
    (AWQ, "bits", 3, "is 3, supported is 4"),
    (AWQ, "version", "gemv", "is 'gemv', supported is gemm"),
    (AWQ, "zero_point", False, "is false"),
    (AWQ, "group_size", -2, "expected -1 to"),
    (COMPRESSED, "format", "int-quantized", "is 'int-quantized', supported is pack-quantized"),
    (COMPRESSED, "quantization_status", "frozen", "is 'frozen'"),
    (COMPRESSED, "kv_cache_scheme", {"num_bits": 8}, "is not supported"),
    (COMPRESSED, "sparsity_config", {"format": "sparse-24"}, "sparse weights"),
    (COMPRESSED, "config_groups", {}, "has 0 kinds"),
    (COMPRESSED, "config_groups.group_0.input_activations", {"num_bits": 8}, "is not supported"),
    (COMPRESSED, WEIGHTS + ".num_bits", 3, "is 3, supported are 2, 4, 8"),
    (COMPRESSED, WEIGHTS + ".type", "float", "is 'float'"),
    (COMPRESSED, WEIGHTS + ".strategy", "tensor", "is 'tensor', supported are group and channel"),
    (COMPRESSED, WEIGHTS + ".actorder", "random", "is 'random'"),
    (COMPRESSED, WEIGHTS + ".dynamic", True, "is true"),
]


@pytest.mark.parametrize(
    ("base", "path", "value", "reason"), REFUSED, ids=[f"{c[1]}={c[2]}" for c in REFUSED]
)
def test_refused(base: dict[str, Any], path: str, value: Any, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason) as caught:
        parse(changed(base, path, value))
    assert caught.value.tensor.split(".")[-1] in (path.rsplit(".", maxsplit=1)[-1], "checkpoint_format")


def test_places(tmp_path: Path) -> None:
    """config.json before quantize_config.json before quant_config.json; none: the weights are dense."""

    def put(name: str, values: dict[str, Any]) -> None:
        (tmp_path / name).write_text(json.dumps(values))

    put("config.json", {})
    assert read_format(tmp_path) is None
    put("quant_config.json", {"w_bit": 4, "q_group_size": 64, "version": "GEMM", "zero_point": True})
    assert read_format(tmp_path) == Awq(64)
    put("quantize_config.json", {"bits": 3, "group_size": 128, "desc_act": True, "sym": True})
    assert read_format(tmp_path) == Gptq(3, 128, True, "v1")
    put("config.json", {"compression_config": COMPRESSED})
    assert read_format(tmp_path) == Compressed(4, 32, False, True)
    put("config.json", {"quantization_config": GPTQ, "compression_config": COMPRESSED})
    assert read_format(tmp_path) == Gptq(4, 32, False, "v1")
