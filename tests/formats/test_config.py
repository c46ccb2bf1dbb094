from __future__ import annotations

import copy
import dataclasses
import json
import pickle

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
        ({"format": "int8"}, r"'int8' is a format of 8 bits, but bits is 4: use KbitConfig\(bits=8, format='int8'\)"),
        ({"bits": 8, "format": "nf4"}, r"use KbitConfig\(bits=4, format='nf4'\)"),
        ({"format": "int4"}, "format must be one of nf4, fp4, int8, got 'int4'"),
        ({"format": 4}, "format must be one of nf4, fp4, int8, got 4"),
        ({"bits": 8, "block_size": 128}, "block_size=128 is a setting of 4 bits"),
        ({"int8_activations": True}, "int8_activations=True is a setting of 8 bits"),
        ({"int8_activations": False}, "int8_activations=False is a setting of 8 bits"),
        ({"int8_activations": "no"}, "int8_activations must be True, False or None, got 'no'"),
        ({"outlier_threshold": 5.5}, "outlier_threshold=5.5 is a setting of 8 bits"),
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


def test_settings_under_other_names():
    with pytest.raises(TypeError, match="KbitConfig has no setting 'load_in_4bit'; use bits=4"):
        KbitConfig(load_in_4bit=True)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="no setting 'group_size'; known: bits, format, block_size"):
        KbitConfig(bits=4, group_size=128)  # type: ignore[call-arg]


def test_what_was_asked():
    assert KbitConfig().asked == KbitConfig(format=None).asked == frozenset()
    config = KbitConfig(8, "int8", outlier_threshold=6.0)
    assert config.asked == copy.copy(config).asked == {"bits", "format", "outlier_threshold"}
    config.int8_activations = False
    assert config.asked == {"bits", "format", "outlier_threshold", "int8_activations"}
    assert pickle.loads(pickle.dumps(config)) == config


def test_a_copy_asks_for_what_is_not_the_default():
    assert dataclasses.replace(KbitConfig(), compute_dtype=torch.float32).asked == {"compute_dtype"}
    assert KbitConfig.from_dict(KbitConfig(format="fp4").to_dict()).asked == {"format"}


def test_a_subclass_may_have_settings_of_its_own():
    @dataclasses.dataclass
    class Mine(KbitConfig):
        note: str = ""

    assert Mine(note="x").note == "x"
    assert Mine(bits=8, note="x").asked == {"bits"}


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
