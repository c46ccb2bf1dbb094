from __future__ import annotations

import json

import pytest
import torch

from kbit import Format, KbitConfig
from kbit.config import parse_dtype


def test_defaults():
    config = KbitConfig()
    assert config.weight_format == Format("nf4", 64, True) and config.skip_modules is None
    assert KbitConfig(bits=8).weight_format == Format("int8", 0)
    assert KbitConfig(bits=4, format="fp4", block_size=128, double_quant=False).weight_format == Format("fp4", 128)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"bits": 3}, "bits must be 4 or 8, got 3"),
        ({"bits": True}, "bits must be"),
        ({"bits": 4.0}, "bits must be"),
        ({"bits": "4"}, "bits must be"),
        ({"bits": [4]}, "bits must be"),
        ({"format": "int8"}, "'int8' is no format of 4 bits; with bits=4 use: nf4, fp4"),
        ({"bits": 8, "format": "nf4"}, "with bits=8 use: int8"),
        ({"block_size": 65}, "block_size must be one of 32"),
        ({"block_size": 64.0}, "block_size must be one of 32"),
        ({"double_quant": "false"}, "double_quant must be True or False"),
        ({"quantize_embeddings": 1}, "quantize_embeddings must be True or False"),
        ({"outlier_threshold": -1}, "outlier_threshold must be a finite number"),
        ({"outlier_threshold": float("inf")}, "outlier_threshold must be a finite number"),
        ({"outlier_threshold": float("nan")}, "outlier_threshold must be a finite number"),
        ({"outlier_threshold": "6"}, "outlier_threshold must be a finite number"),
        ({"compute_dtype": "float17"}, "'float17' is not a torch dtype"),
        ({"compute_dtype": "int8"}, "compute_dtype must be a floating point dtype"),
        ({"skip_modules": "lm_head"}, "skip_modules must be a list of names, got 'lm_head'"),
        ({"skip_modules": [1]}, "skip_modules must be a list of names"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        KbitConfig(**options)


@pytest.mark.parametrize("name", ["nf4", "nf4-plain", "fp4", "fp4-plain", "int8"])
def test_from_format(name):
    config = KbitConfig.from_format(name, skip_modules=[])
    assert config.weight_format == Format.parse(name) and config.skip_modules == []


@pytest.mark.parametrize("name", ["bf16", "dynamic8", "nf"])
def test_from_format_refuses(name):
    with pytest.raises(ValueError, match=name):
        KbitConfig.from_format(name)


def test_dict_round_trip_is_json():
    config = KbitConfig(
        bits=8, compute_dtype=torch.bfloat16, skip_modules=["a", "b.*"], outlier_threshold=4, quantize_embeddings=True
    )
    data = json.loads(json.dumps(config.to_dict()))
    assert data["quant_method"] == "kbit" and data["compute_dtype"] == "bfloat16"
    assert KbitConfig.from_dict(data) == config
    assert KbitConfig.from_dict({}) == KbitConfig()


def test_the_callers_list_is_copied():
    names = ["a"]
    config = KbitConfig(skip_modules=names)
    names.append("b")
    assert config.skip_modules == ["a"]


def test_from_dict_refuses():
    with pytest.raises(ValueError, match="quant_method is 'gptq', expected 'kbit'"):
        KbitConfig.from_dict({"quant_method": "gptq"})
    with pytest.raises(ValueError, match="unknown keys in a kbit config: group_size"):
        KbitConfig.from_dict({"group_size": 3})
    with pytest.raises(ValueError, match="a kbit config is a JSON object, got list"):
        KbitConfig.from_dict([])  # type: ignore[arg-type]


def test_parse_dtype():
    assert parse_dtype("torch.float16") == parse_dtype("float16") == parse_dtype(torch.float16) == torch.float16
    assert parse_dtype(None) is None
    with pytest.raises(ValueError):
        parse_dtype("nn")
