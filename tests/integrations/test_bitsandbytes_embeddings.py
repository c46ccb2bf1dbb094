"""The drop-in's embeddings, and 4-bit parameters of modules that are no layer of its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kbit.integrations.bitsandbytes import optim
from kbit.integrations.bitsandbytes.blockwise import dequantize_4bit
from kbit.integrations.bitsandbytes.embedding import (
    Embedding,
    Embedding4bit,
    Embedding8bit,
    EmbeddingFP4,
    EmbeddingNF4,
    StableEmbedding,
)
from kbit.integrations.bitsandbytes.parametrize import replace_parameter_4bit, replace_parameter_4bit_prequantized

# ---- embeddings ----


@pytest.mark.parametrize("dim", [64, 96])
@pytest.mark.parametrize("make", [EmbeddingNF4, EmbeddingFP4, Embedding8bit], ids=lambda cls: cls.__name__)
def test_quantized_embeddings(make, dim: int) -> None:  # type: ignore[no-untyped-def]
    table = make(40, dim, dtype=torch.bfloat16)
    w = table.weight.data.clone()
    if make is Embedding8bit:
        with pytest.raises(RuntimeError, match="not quantized yet"):
            table(torch.tensor([1]))
    table.to("cpu")
    ids = torch.randint(0, 40, (2, 5))
    rows = table(ids)
    assert rows.dtype == torch.bfloat16 and rows.shape == (2, 5, dim)
    assert (rows - w[ids]).norm() / w[ids].norm() < 0.2
    if issubclass(make, Embedding4bit):
        whole = dequantize_4bit(table.weight, table.weight.quant_state)
        assert torch.equal(rows, whole[ids])
    again = make(40, dim, dtype=torch.bfloat16).to("cpu")
    again.load_state_dict(table.state_dict())
    assert torch.equal(again(ids), rows)


@pytest.mark.parametrize("make", [Embedding, StableEmbedding])
def test_stable_embeddings_keep_32_bit_states(make) -> None:  # type: ignore[no-untyped-def]
    table = make(100, 64, padding_idx=0)
    assert not table.weight[0].any()
    optimizer = optim.Adam8bit([*table.parameters(), other := nn.Parameter(torch.randn(100, 64))], lr=0.1)
    out = table(torch.tensor([[1, 2], [3, 0]]))
    assert out.shape == (2, 2, 64)
    (out.sum() + other.sum() + table.weight.square().sum()).backward()
    optimizer.step()
    kinds = {torch.uint8 in {t.dtype for t in optimizer.state[p].values()} for p in (table.weight,)}
    assert kinds == {False} and torch.uint8 in {t.dtype for t in optimizer.state[other].values()}


# ---- parametrize ----


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(4, 64, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bk,enk->ben", x, self.gate_up) + self.gate_up.sum()


def test_parameters_of_any_module() -> None:
    module = Experts()
    w = module.gate_up.detach().clone()
    replace_parameter_4bit(module, "gate_up", compress_statistics=True)
    assert module.gate_up.shape == w.shape and (module.gate_up - w).norm() / w.norm() < 0.12
    assert sum(p.nbytes for p in module.parameters()) == w.numel() // 2
    x = torch.randn(3, 64, requires_grad=True)
    out = module(x)
    out.sum().backward()
    assert x.grad.isfinite().all() and (nn.utils.parametrize._cache_enabled, nn.utils.parametrize._cache) == (0, {})
    state = module.state_dict()
    assert {"gate_up", "gate_up.absmax", "gate_up.quant_state.bitsandbytes__nf4"} <= set(state)
    other = Experts()
    replace_parameter_4bit(other, "gate_up", compress_statistics=True)
    other.load_state_dict(state)
    assert torch.equal(other.gate_up, module.gate_up)
    third = Experts()
    third.gate_up = nn.Parameter(state["gate_up"], requires_grad=False)
    parts = {key: value for key, value in state.items() if key != "gate_up"}
    replace_parameter_4bit_prequantized(third, "gate_up", parts, device="cpu")
    assert torch.equal(third.gate_up, module.gate_up)


def test_parametrize_errors() -> None:
    with pytest.raises(AttributeError, match="no parameter 'nothing'"):
        replace_parameter_4bit(Experts(), "nothing")
    with pytest.raises(TypeError, match="not a Parameter"):
        replace_parameter_4bit(Experts(), "training")
