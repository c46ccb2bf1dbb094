from __future__ import annotations

import pytest
import torch
from torch import nn

import kbit
from tests.nn.helpers import DTYPES, LABELS, bits_of, codes_of, embedding, fmt, same


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 100, 33])
def test_equals_the_dequantized_table(label, dtype, dim):
    table = embedding(label, 12, dim, dtype)
    weight = table.dequantize()
    assert weight.shape == (12, dim) and weight.dtype == dtype and table.nbytes == fmt(label).nbytes((12, dim))
    for ids in (torch.randint(12, (3, 4)), torch.tensor(11), torch.zeros(0, 2, dtype=torch.int32)):
        assert same(table(ids), nn.functional.embedding(ids, weight))
    assert not table(torch.tensor([1])).requires_grad


@pytest.mark.parametrize("label", LABELS)
def test_casts_reach_the_rows_and_not_the_codes(label):
    table = embedding(label)
    before, ids = codes_of(table), torch.arange(12)
    exact = table(ids)
    for cast, dtype in ((table.half, torch.float16), (table.bfloat16, torch.bfloat16), (table.double, torch.float64)):
        assert cast()(ids).dtype == dtype and same(table(ids), table.dequantize(dtype))
    assert same(table.to(torch.float32)(ids), exact) and codes_of(table) == before
    assert table.dequantize().dtype == torch.float32


@pytest.mark.parametrize("label", LABELS)
def test_bad_ids(label):
    table = embedding(label)
    for bad in (-1, 12):
        with pytest.raises(IndexError):
            table(torch.tensor([bad]))
    with pytest.raises(TypeError, match="integer ids"):
        table(torch.tensor([1.0]))


def test_max_norm_is_refused():
    for cls in (kbit.Embedding4bit, kbit.Embedding8bit):
        with pytest.raises(ValueError, match="max_norm"):
            cls.from_embedding(nn.Embedding(4, 64, max_norm=1.0))
    with pytest.raises(ValueError, match="use Embedding8bit"):
        kbit.Embedding4bit(4, 64, format="int8")


@pytest.mark.parametrize("label", LABELS)
def test_meta_state_dict_and_repr(label):
    source = embedding(label)
    cls = kbit.Embedding8bit if label == "int8" else kbit.Embedding4bit
    options = {} if label == "int8" else {"format": label}
    other = cls(12, 64, 0, device="meta", **options)
    assert other(torch.zeros(2, dtype=torch.long, device="meta")).shape == (2, 64)
    other.to_empty(device="cpu").load_state_dict(source.state_dict())
    assert bits_of(other) == bits_of(source) and other.padding_idx == 0
    assert repr(other).startswith(f"{cls.__name__}(12, 64, padding_idx=0, {label}")


@pytest.mark.parametrize("label", LABELS)
def test_compile_fullgraph(label):
    torch._dynamo.reset()
    table = embedding(label)
    compiled = torch.compile(table, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (3, 7):
        ids = torch.randint(12, (2, count))
        assert torch.equal(compiled(ids), table(ids))
    torch._dynamo.reset()
