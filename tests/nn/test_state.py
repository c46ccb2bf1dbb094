"""Nothing that users do to modules may change a bit of codes or scales: saves, loads, moves, casts, copies."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import kbit
from kbit.checkpoint.bnb import to_tensors
from tests.nn.helpers import LABELS, bits_of, codes_of, config, embedding, empty_linear, linear, same


def model(label: str) -> nn.Module:
    tree = nn.Sequential(nn.Embedding(12, 64), nn.Linear(64, 100), nn.LayerNorm(100), nn.Linear(100, 8, bias=False))
    return kbit.quantize_model(tree, config(label, quantize_embeddings=True))


@pytest.mark.parametrize("label", LABELS)
def test_strict_state_dict_round_trip(label):
    source = model(label)
    target = model(label)
    assert bits_of(source) != bits_of(target)
    assert not any(target.load_state_dict(source.state_dict(), strict=True))
    assert bits_of(source) == bits_of(target)


@pytest.mark.parametrize("label", LABELS)
def test_file_round_trips(label, tmp_path):
    source = model(label)
    torch.save(source.state_dict(), tmp_path / "m.pt")
    save_file(source.state_dict(), tmp_path / "m.safetensors")
    for state in (torch.load(tmp_path / "m.pt", weights_only=True), load_file(tmp_path / "m.safetensors")):
        target = model(label)
        target.load_state_dict(state, strict=True)
        assert bits_of(target) == bits_of(source)


@pytest.mark.parametrize("label", LABELS)
def test_copies(label):
    source = model(label)
    ids = torch.randint(12, (4,))
    buffer = io.BytesIO()
    torch.save(source, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(source), pickle.loads(pickle.dumps(source)), torch.load(buffer, weights_only=False)]
    for other in copies:
        assert bits_of(other) == bits_of(source) and torch.equal(other(ids), source(ids))
        assert other[1].weight_format == source[1].weight_format and other[1].weight is not source[1].weight
        assert same(other[1].dequantize(), source[1].dequantize())
        assert isinstance(kbit.dequantize_model(other)[1], nn.Linear)


@pytest.mark.parametrize("label", LABELS)
def test_casts_never_touch_codes_or_scales(label):
    """bitsandbytes-style float scales lose 1.7e-3 of every weight to `.half()`."""
    for module in (linear(label), embedding(label)):
        before, exact = codes_of(module), module.dequantize()
        module.half().bfloat16().float().double().to(torch.bfloat16).to("cpu", torch.float16).type(torch.float32)
        module.to(torch.randn(1).double()).cpu().float()
        assert codes_of(module) == before and same(module.dequantize(), exact)
        if isinstance(module, nn.Linear):
            assert module.bias.dtype == torch.float32


@pytest.mark.parametrize("label", LABELS)
def test_a_trip_over_the_meta_device_keeps_shapes_and_dtypes(label):
    module = linear(label)
    shapes = {name: (t.shape, t.dtype) for name, t in module.state_dict().items()}
    module.to("meta")
    assert {name: (t.shape, t.dtype) for name, t in module.state_dict().items()} == shapes


@pytest.mark.parametrize("written", LABELS)
@pytest.mark.parametrize("read", LABELS)
def test_a_state_loads_only_into_what_wrote_it(written, read, tmp_path):
    state, target = linear(written).state_dict(), linear(read)
    if written == read:
        target.load_state_dict(state)
        return
    before = codes_of(target)
    with pytest.raises(RuntimeError, match=f"saved as {written}, this layer is {read}"):
        target.load_state_dict(state)
    with pytest.raises(RuntimeError, match="saved as"):
        target.load_state_dict(state, strict=False)
    assert codes_of(target) == before
    # A safetensors file does not say the format: whatever can be told from keys, dtypes and shapes is refused.
    save_file(state, tmp_path / "m.safetensors")
    if {written[:3], read[:3]} != {"nf4", "fp4"} or written[3:] != read[3:]:
        with pytest.raises(RuntimeError):
            target.load_state_dict(load_file(tmp_path / "m.safetensors"))


@pytest.mark.parametrize("written", ["nf4", "fp4-plain", "int8"])
@pytest.mark.parametrize("read", ["nf4", "fp4", "int8"])
def test_the_layout_of_bitsandbytes_is_named_before_sizes_are(written, read):
    """Its keys say the format; torch would only say that sizes differ, or with strict=False not even that."""
    source, target = linear(written), linear(read)
    tensors = to_tensors(source.quantized_weight(), "0")
    state = {key.removeprefix("0."): tensor for key, tensor in tensors.items()} | {"bias": source.bias}
    before = codes_of(target)
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=rf"bitsandbytes' layout \({written[:3]}.*this layer is {read} in"):
            target.load_state_dict(state, strict=strict)
    assert codes_of(target) == before


@pytest.mark.parametrize("label", LABELS)
def test_damaged_states(label):
    good = dict(linear(label).state_dict())

    def load(**changes: torch.Tensor | None) -> None:
        state = {**good, **changes}
        empty_linear(label).load_state_dict({k: v for k, v in state.items() if v is not None})

    load()
    for key in good:
        with pytest.raises(RuntimeError, match=f'Missing key.*"{key}"'):
            load(**{key: None})
        with pytest.raises(RuntimeError, match=f"size mismatch for {key}"):
            load(**{key: good[key].repeat(*[2] * good[key].dim())})
    with pytest.raises(RuntimeError, match="Unexpected key.*scales"):
        load(scales=torch.ones(1))
    for key in good:
        if key != "bias":
            with pytest.raises(RuntimeError, match=f"{key} has dtype torch.float32.*quantize the model that wrote it"):
                load(**{key: good[key].float()})
    with pytest.raises(RuntimeError, match="weight has dtype torch.float32"):
        empty_linear(label).load_state_dict(nn.Linear(64, 8).state_dict())


def test_another_block_size_is_refused():
    layer = kbit.Linear4bit(64, 8, format=kbit.Format("nf4", 32))
    with pytest.raises(RuntimeError, match="size mismatch for absmax"):
        layer.load_state_dict(linear("nf4-plain").state_dict())


@pytest.mark.parametrize("label", LABELS)
def test_share_memory(label):
    module = linear(label)
    before = bits_of(module)
    module.share_memory()
    assert bits_of(module) == before and module.weight.is_shared()


@pytest.mark.parametrize("label", LABELS)
def test_casts_like_those_of_mixed_precision_wrappers(label):
    """FSDP and DeepSpeed cast what is floating point, tensor by tensor."""
    module = model(label)
    before = codes_of(module)
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.bfloat16)
    assert codes_of(module) == before
    out = module[1](torch.randn(3, 64).bfloat16())
    assert out.dtype == torch.bfloat16 and out.isfinite().all()
