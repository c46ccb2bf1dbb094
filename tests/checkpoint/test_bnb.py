"""The bitsandbytes layout: read and written by both, to the same weights."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

import kbit
from kbit import KbitConfig
from kbit.checkpoint import CheckpointReader, bnb, quantize_checkpoint
from tests.integrations import tiny_models

FORMATS = ["nf4", "nf4-plain", "fp4", "fp4-plain", "int8"]
SHAPES = [(64, 128), (7, 65), (3, 5), (1, 1), (320, 200), (300, 256)]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    q = kbit.quantize(torch.randn(shape, dtype=dtype), name)
    tensors = bnb.to_tensors(q, "m.q")
    back = bnb.from_tensors(tensors, "m.q", dtype)
    assert (back.format, back.shape, back.dtype) == (q.format, q.shape, q.dtype)
    for part, tensor in q.tensors().items():
        assert torch.equal(back.tensors()[part], tensor), part
    storages = [t.untyped_storage().data_ptr() for t in tensors.values()]
    assert len(set(storages)) == len(storages)  # safetensors refuses tensors that share storage


@pytest.mark.parametrize("name", FORMATS)
def test_keys_and_blobs_are_those_of_bitsandbytes(name: str) -> None:
    """Live: the state dict of a bitsandbytes layer made from the same weight, key for key, shape for shape."""
    oracle = pytest.importorskip("bitsandbytes")
    weight = torch.randn(96, 128, dtype=torch.float16)
    if name == "int8":
        layer = oracle.nn.Linear8bitLt(128, 96, bias=False, has_fp16_weights=False)
        layer.weight = oracle.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        fmt = kbit.Format.parse(name)
        layer = oracle.nn.Linear4bit(128, 96, bias=False, quant_type=fmt.name, compress_statistics=fmt.double_quant)
        layer.weight = oracle.nn.Params4bit(
            weight, requires_grad=False, quant_type=fmt.name, compress_statistics=fmt.double_quant
        )
    theirs = {f"m.{key}": value for key, value in layer.to("cpu").state_dict().items()}
    ours = bnb.to_tensors(kbit.quantize(weight, name), "m")
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        other = theirs[key]
        if key.endswith(("__nf4", "__fp4")):
            mine, their = (json.loads(bytes(t.numpy())) for t in (tensor, other))
            assert list(mine) == list(their)
            if "nested_offset" in mine:
                assert mine.pop("nested_offset") == pytest.approx(their.pop("nested_offset"), rel=1e-6)
            assert mine == their
            continue
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), key
        if not key.endswith(("weight.absmax", "nested_absmax")):  # nested codes are nearest here, and not there
            assert torch.equal(tensor, other), key
    # What it wrote, we read, to the values that it decodes to.
    read = bnb.from_tensors(theirs, "m").dequantize(torch.float32)
    if name == "int8":
        expected = theirs["m.weight"].float() * theirs["m.SCB"][:, None] * torch.tensor(1 / 127)
        torch.testing.assert_close(read, expected, rtol=3e-7, atol=0)
    else:
        state = oracle.functional.QuantState.from_dict(
            {key.removeprefix("m.weight."): value for key, value in theirs.items() if key != "m.weight"}, device="cpu"
        )
        state.dtype = torch.float32
        assert torch.equal(read, oracle.functional.dequantize_4bit(theirs["m.weight"], state))


def decoded(layer: torch.nn.Module) -> torch.Tensor:
    """The weight of a layer that transformers and bitsandbytes loaded, in fp32."""
    import bitsandbytes.functional as F

    weight = layer.weight
    if weight.dtype == torch.int8:
        scales = weight.SCB if weight.SCB is not None else layer.state.SCB
        return weight.data.float() * scales[:, None] * torch.tensor(1 / 127)
    state = copy.deepcopy(weight.quant_state)
    # Its CPU kernel misreads rows that are no multiple of the block; the flat view of the same bytes is right.
    shape, state.shape, state.dtype = state.shape, torch.Size([1, state.shape.numel()]), torch.float32
    return F.dequantize_4bit(weight.data, state).view(shape)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("name", ["nf4", "fp4-plain", "int8"])
def test_transformers_with_bitsandbytes_loads_what_we_write(tmp_path: Path, architecture: str, name: str) -> None:
    pytest.importorskip("bitsandbytes")
    config = KbitConfig.from_format(name)
    source = tiny_models.save(tiny_models.MODELS[architecture](), tmp_path / "source", torch.bfloat16)
    quantize_checkpoint(source, tmp_path / "out", config, layout="bitsandbytes")
    theirs, ours = tiny_models.load(tmp_path / "out"), tiny_models.load(source, config)
    modules = tiny_models.quantized(ours)
    converted = {n for n, m in theirs.named_modules() if type(m).__module__.startswith("bitsandbytes")}
    assert converted == set(modules)
    for module_name, module in modules.items():
        layer = theirs.get_submodule(module_name)
        torch.testing.assert_close(decoded(layer), module.dequantize(torch.float32), rtol=3e-7, atol=0)
    for key, tensor in theirs.state_dict().items():
        if tensor.is_floating_point() and key in ours.state_dict() and "weight." not in key:
            assert torch.equal(tensor, ours.state_dict()[key]), key


def test_a_checkpoint_reads_back(tmp_path: Path) -> None:
    source = tiny_models.save(tiny_models.llama(), tmp_path / "source", torch.bfloat16)
    quantize_checkpoint(source, tmp_path / "out", KbitConfig(), layout="bitsandbytes")
    ours = tiny_models.quantized(tiny_models.load(source, KbitConfig()))
    with CheckpointReader(tmp_path / "out") as reader:
        tensors = dict(reader)
        for name, module in ours.items():
            assert torch.equal(bnb.from_tensors(tensors, name).dequantize(), module.dequantize())


def test_other_storage_dtypes_and_tensor_offsets() -> None:
    q = kbit.quantize(torch.randn(64, 128), "nf4")
    tensors = bnb.to_tensors(q, "m")
    tensors["m.weight"] = tensors["m.weight"].view(-1).view(torch.bfloat16).view(-1, 1)
    assert torch.equal(bnb.from_tensors(tensors, "m").codes, q.codes)
    state = json.loads(bytes(tensors["m.weight.quant_state.bitsandbytes__nf4"].numpy()))
    offset = torch.tensor(state.pop("nested_offset"), dtype=torch.bfloat16)
    tensors["m.weight.quant_state.bitsandbytes__nf4"] = torch.tensor(
        list(json.dumps(state).encode()), dtype=torch.uint8
    )
    with pytest.raises(ValueError, match="lacks nested_offset"):
        bnb.from_tensors(tensors, "m")
    tensors["m.weight.nested_offset"] = offset
    assert bnb.from_tensors(tensors, "m").nested_offset.item() == float(offset)


def test_damage_is_named() -> None:
    good = bnb.to_tensors(kbit.quantize(torch.randn(64, 128), "nf4"), "m")
    for change, message in [
        ({"m.weight.absmax": None}, "lacks m.weight.absmax"),
        ({"m.weight": torch.zeros(5, 1, dtype=torch.uint8)}, r"m.weight is .*\(5 bytes\)"),
        ({"m.weight.quant_map": torch.zeros(16)}, "m.weight.quant_map is not the nf4 codebook"),
        ({"m.weight.quant_state.bitsandbytes__nf4": torch.zeros(3, dtype=torch.uint8)}, "is not JSON"),
    ]:
        tensors = {key: value for key, value in {**good, **change}.items() if value is not None}
        with pytest.raises(ValueError, match=message):
            bnb.from_tensors(tensors, "m")
    old = bnb.to_tensors(kbit.quantize(torch.randn(4, 8), "int8"), "m")
    old["m.weight_format"] = torch.tensor(2, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"m.weight_format is 2 \(col_turing\)"):
        bnb.from_tensors(old, "m")


def test_what_the_layout_cannot_hold_is_refused(tmp_path: Path) -> None:
    source = tiny_models.save(tiny_models.llama(), tmp_path / "source", torch.bfloat16)
    with pytest.raises(ValueError, match="bitsandbytes layout has no quantized embeddings"):
        quantize_checkpoint(source, tmp_path / "out", KbitConfig(quantize_embeddings=True), layout="bitsandbytes")
    assert not (tmp_path / "out").exists()
