"""The drop-in's modules and parameters: their state machines, and bugs of bitsandbytes that must not come back."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from kbit.integrations.bitsandbytes import optim
from kbit.integrations.bitsandbytes.blockwise import dequantize_4bit, quantize_4bit
from kbit.integrations.bitsandbytes.embedding import (
    Embedding,
    Embedding4bit,
    Embedding8bit,
    EmbeddingFP4,
    EmbeddingNF4,
    StableEmbedding,
)
from kbit.integrations.bitsandbytes.linear import Linear4bit, Linear8bitLt, LinearFP4, LinearNF4
from kbit.integrations.bitsandbytes.matmul import MatmulLtState, matmul
from kbit.integrations.bitsandbytes.optim_manager import GlobalOptimManager
from kbit.integrations.bitsandbytes.parametrize import replace_parameter_4bit, replace_parameter_4bit_prequantized
from kbit.integrations.bitsandbytes.params import Int8Params, Params4bit
from kbit.integrations.bitsandbytes.utils import OutlierTracer, find_outlier_dims, is_on_gpu, replace_linear


def nf4(k: int = 128, n: int = 32, **kwargs) -> Linear4bit:  # type: ignore[no-untyped-def]
    return Linear4bit(k, n, quant_type="nf4", **kwargs)


def int8(k: int = 128, n: int = 32, **kwargs) -> Linear8bitLt:  # type: ignore[no-untyped-def]
    return Linear8bitLt(k, n, has_fp16_weights=False, **kwargs)


MAKERS = {"4bit": nf4, "8bit": int8}
both = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


# ---- quantizing and moving ----


def test_params4bit_quantizes_on_its_first_move() -> None:
    w = torch.randn(16, 64)
    p = Params4bit(w.clone(), quant_type="nf4")
    assert not p.bnb_quantized and p.shape == (16, 64) and not p.requires_grad
    q = p.to("cpu")
    assert q.bnb_quantized and q.dtype == torch.uint8 and q.shape == (512, 1)
    assert torch.equal(q.data, quantize_4bit(w, quant_type="nf4", compress_statistics=True)[0])
    assert torch.equal(q.to("cpu").data, q.data) and q.to("cpu").quant_state is q.quant_state
    assert Params4bit(w).to("meta").is_meta


def test_the_dictionary_of_a_parameter_builds_another() -> None:
    """transformers and PEFT pass `**parameter.__dict__`, with keys of their own in it."""
    layer = nf4().to("cpu")
    layer.weight._is_hf_initialized = True
    keywords = {**layer.weight.__dict__, "bnb_quantized": False}
    again = Params4bit(dequantize_4bit(layer.weight.data, layer.weight.quant_state), requires_grad=False, **keywords)
    assert torch.equal(again.to("cpu").data, layer.weight.data) and again.module is layer
    w8 = int8().weight
    assert Int8Params(torch.randn(4, 8), requires_grad=False, **w8.__dict__, unknown=1).to("cpu").dtype == torch.int8


@pytest.mark.parametrize("make", [LinearNF4, LinearFP4])
def test_linear_4bit_equals_the_dequantized_product(make) -> None:  # type: ignore[no-untyped-def]
    layer, x = make(128, 32), torch.randn(2, 3, 128)
    w, bias = layer.weight.data.clone(), layer.bias
    layer.to("cpu")
    decoded = dequantize_4bit(layer.weight, layer.weight.quant_state)
    assert torch.allclose(layer(x), x @ decoded.t() + bias, atol=1e-5)
    assert (decoded - w).norm() / w.norm() < 0.15


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_output_has_the_dtype_of_the_input_every_time(make, dtype) -> None:  # type: ignore[no-untyped-def]
    """The first input does not decide for the ones after it, and the bias is not changed."""
    layer = make().to("cpu")
    layer(torch.randn(2, 128))
    assert layer(torch.randn(2, 128).to(dtype)).dtype == dtype
    assert layer.bias.dtype == torch.float32


@both
def test_inference_does_not_touch_the_stored_bytes(make) -> None:  # type: ignore[no-untyped-def]
    """#2078, #1946: evaluation on a CPU re-laid the weight out; moves, merges and saves then were corrupt."""
    layer = make().to("cpu").eval()
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    with torch.no_grad():
        first = layer(torch.ones(1, 128, dtype=torch.bfloat16))
    layer.to("cpu")
    layer = copy.deepcopy(layer)
    with torch.no_grad():
        assert torch.equal(layer(torch.ones(1, 128, dtype=torch.bfloat16)), first)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_merge_after_evaluation_is_exact() -> None:
    """What PEFT does to merge: requantize(dequantize(W) + BA) to the bit, after a forward in eval mode."""
    layer = nf4().to("cpu").eval()
    w = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    layer(torch.randn(1, 128).bfloat16())
    delta = torch.randn(32, 4) @ torch.randn(4, 128) * 0.01
    keywords = {**layer.weight.__dict__, "bnb_quantized": False, "requires_grad": False}
    decoded = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(decoded, w)
    layer.weight = Params4bit((decoded + delta).to("cpu"), **keywords).to(layer.weight.device)
    packed, state = quantize_4bit(w + delta, quant_type="nf4", compress_statistics=True)
    assert torch.equal(layer.weight.data, packed) and layer.weight.quant_state == state
    assert layer.quant_state is layer.weight.quant_state


def test_a_move_leaves_the_parameter_it_came_from_alone() -> None:
    """#1815, #1952: the state was changed in place, so the old parameter decoded with scales of another device."""
    p = Params4bit(torch.randn(16, 64), quant_type="nf4").to("cpu")
    state, absmax = p.quant_state, p.quant_state.absmax
    moved = p.to("meta")
    assert moved.is_meta and moved.quant_state.absmax.is_meta and moved.quant_state.state2.absmax.is_meta
    assert p.quant_state is state and state.absmax is absmax and not absmax.is_meta


@both
def test_moving_a_module_moves_its_statistics(make) -> None:  # type: ignore[no-untyped-def]
    layer = make().to("cpu")
    layer(torch.randn(1, 128))
    layer.to("meta")
    assert layer.weight.is_meta and type(layer.weight) in (Params4bit, Int8Params)
    if isinstance(layer, Linear4bit):
        assert layer.weight.quant_state.absmax.is_meta and layer.quant_state is layer.weight.quant_state
    layer.to_empty(device="cpu")
    assert type(layer.weight) in (Params4bit, Int8Params) and not layer.weight.is_meta


def test_int8_device_0_is_the_cpu_where_there_is_no_other() -> None:
    """accelerate's load_and_quantize_model says `.to(0)`."""
    if not torch.accelerator.is_available():
        assert Int8Params(torch.randn(4, 8), requires_grad=False).to(0).device.type == "cpu"


@both
def test_casts_leave_codes_and_scales_alone(make) -> None:  # type: ignore[no-untyped-def]
    layer = make().to("cpu")
    before = {k: v.clone() for k, v in layer.state_dict().items() if k != "bias"}
    layer.half()
    layer.bfloat16()
    layer.to(torch.float64)
    assert layer.bias.dtype == torch.float64
    after = layer.state_dict()
    assert all(torch.equal(after[k], v) and after[k].dtype == v.dtype for k, v in before.items())


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
def test_bytes_that_look_like_nan_survive_in_float_storage(storage: torch.dtype) -> None:
    """#1945: codes stored as floats were cast, which makes every NaN pattern the same NaN."""
    w = torch.ones(16, 64)  # code 15 everywhere: bytes 0xFF are NaN in each of these dtypes
    w[:, ::2] = torch.linspace(-1, 1, 32)
    layer = nf4(64, 16, quant_storage=storage)
    layer.weight.data = w
    layer.to("cpu")
    raw = layer.weight.data.view(torch.uint8).clone()
    assert layer.weight.data.isnan().any()
    layer.half()
    layer.to(torch.float32)
    layer = copy.deepcopy(layer.to(dtype=torch.bfloat16))
    other = nf4(64, 16, quant_storage=storage)
    other.load_state_dict(layer.state_dict())
    for found in (layer, other):
        assert found.weight.dtype == storage and torch.equal(found.weight.data.view(torch.uint8), raw)
    assert torch.equal(layer.weight.half().view(torch.uint8), raw) and torch.equal(
        layer.weight.float().data.view(torch.uint8), raw
    )


def test_chunks_are_parameters_of_the_same_kind() -> None:
    p = nf4().to("cpu").weight
    for pieces in (torch.chunk(p, 4), torch.split(p, 512), p.chunk(2)):
        assert all(isinstance(piece, Params4bit) and piece.quant_state is p.quant_state for piece in pieces)
        assert torch.equal(torch.cat([piece.data for piece in pieces]), p.data)


def test_fsdp_finds_every_state_dict_key_as_an_attribute() -> None:
    layer = nf4(512, 64).to("cpu")
    for key, value in layer.state_dict().items():
        found = layer
        for name in key.split("."):
            found = getattr(found, name)
        assert torch.equal(found, value) if key != "weight" else True
    with pytest.raises(AttributeError):
        Params4bit(torch.randn(2, 64)).absmax  # noqa: B018
    with pytest.raises(AttributeError):
        nf4(compress_statistics=False).to("cpu").weight.nested_absmax  # noqa: B018


def test_a_replaced_weight_finds_its_state_again() -> None:
    """FSDP replaces the parameter by a plain one; the layer still knows the state."""
    layer = nf4().to("cpu")
    x = torch.randn(3, 128)
    expected = layer(x)
    layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
    assert torch.equal(layer(x), expected) and isinstance(layer.weight, Params4bit)


def test_a_layer_that_was_never_moved_says_so() -> None:
    with pytest.raises(RuntimeError, match="not quantized yet"):
        nf4()(torch.randn(1, 128))


@both
def test_nan_weights_are_refused(make) -> None:  # type: ignore[no-untyped-def]
    layer = make()
    layer.weight.data[3, 5] = float("nan")
    with pytest.raises(ValueError, match=r"not finite \(first: NaN at \[3, 5\]\)"):
        layer.to("cpu")


@both
def test_no_reference_outlives_the_layer(make) -> None:  # type: ignore[no-untyped-def]
    layer = make().to("cpu")
    layer(torch.randn(2, 128))
    dead = weakref.ref(layer.weight)
    del layer
    gc.collect()
    assert dead() is None


@both
def test_copies_are_independent_and_whole(make) -> None:  # type: ignore[no-untyped-def]
    layer = make().to("cpu")
    twin = copy.deepcopy(nn.Sequential(layer, nn.Linear(32, 8)))[0]
    assert type(twin.weight) is type(layer.weight) and twin.weight.data_ptr() != layer.weight.data_ptr()
    x = torch.randn(2, 128)
    expected = layer(x)
    if isinstance(twin, Linear4bit):
        assert twin.weight.module is twin and twin.quant_state is twin.weight.quant_state
        assert copy.copy(layer.weight).quant_state is layer.weight.quant_state
    layer.weight.data.zero_()
    assert torch.equal(twin(x), expected)


def test_compiles_without_a_break() -> None:
    layer = nf4().to("cpu")
    x = torch.randn(4, 128)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))


def test_slow_compute_dtype_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    layer = nf4(compute_dtype=torch.float32).to("cpu")
    for _ in range(2):
        layer(torch.randn(1, 128, dtype=torch.bfloat16))
    assert sum("bnb_4bit_compute_dtype=torch.bfloat16" in record.message for record in caplog.records) <= 1


# ---- gradients ----


@both
def test_input_gradient_is_that_of_the_dequantized_weight(make) -> None:  # type: ignore[no-untyped-def]
    layer = make().to("cpu")
    x = torch.randn(3, 5, 128, requires_grad=True)
    grad = torch.randn(3, 5, 32).transpose(0, 1).contiguous().transpose(0, 1)  # not contiguous
    layer(x).backward(grad)
    if isinstance(layer, Linear4bit):
        w = dequantize_4bit(layer.weight, layer.weight.quant_state)
    else:
        w = layer.state.CB.double() * layer.state.SCB.double()[:, None] / 127
    expected = grad.double() @ w.double()
    assert (x.grad - expected).norm() / expected.norm() < 1e-5
    assert torch.allclose(layer.bias.grad, grad.sum((0, 1)), atol=1e-4)
    assert layer.weight.grad is None


def test_codes_travel_through_saved_tensors() -> None:
    """#2034: packed weights kept on ctx give wrong gradients under checkpointing and offloading of saved tensors."""
    layer = nf4().to("cpu")
    seen = []
    x = torch.randn(4, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.dtype) or t, lambda t: t):
        out = layer(x)
    assert torch.uint8 in seen
    layer.weight.data.zero_()  # an in-place change between forward and backward is noticed or harmless, never silent
    try:
        out.sum().backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)


@both
def test_gradient_checkpointing(make) -> None:  # type: ignore[no-untyped-def]
    """#1927: int8 with checkpointing gave NaN."""
    torch.manual_seed(1)
    layer = make(threshold=6.0).to("cpu") if make is int8 else make().to("cpu")
    x = torch.randn(40, 128)
    x[3, 7] = 20.0
    grads = []
    for checkpointed in (False, True):
        leaf = x.clone().requires_grad_()
        if checkpointed:
            out = torch.utils.checkpoint.checkpoint(layer, leaf, use_reentrant=False)
        else:
            out = layer(leaf)
        out.square().sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads) and grads[0].isfinite().all()


def test_int8_with_a_trained_weight() -> None:
    layer = Linear8bitLt(64, 16, has_fp16_weights=True, threshold=6.0)
    assert layer.weight.requires_grad
    layer.to("cpu")
    assert layer.weight.dtype == torch.float32
    target, x = torch.randn(20, 16), torch.randn(20, 64)
    optimizer = torch.optim.SGD(layer.parameters(), lr=2.0)
    losses = []
    for _ in range(30):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    grad = torch.randn(20, 16)
    layer.zero_grad()
    layer(x).backward(grad)
    assert torch.allclose(layer.weight.grad, grad.t() @ x, atol=1e-4)
    layer.eval()
    assert torch.allclose(layer(x), x @ layer.weight.t() + layer.bias, atol=0.3)


# ---- LLM.int8() ----


def test_outlier_columns_are_kept_in_full() -> None:
    layer = int8(threshold=6.0).to("cpu")
    x = torch.randn(64, 128)
    x[:, 5] *= 60
    w = layer.weight.CB.float() * layer.weight.SCB[:, None] / 127
    exact = x @ w.t() + layer.bias
    plain = int8(threshold=0.0)
    plain.load_state_dict(layer.state_dict())
    error, without = (layer(x) - exact).norm(), (plain(x) - exact).norm()
    assert error < 0.2 * without and error / exact.norm() < 0.02


def test_matmul_quantizes_into_its_state() -> None:
    x, w = torch.randn(20, 64), torch.randn(8, 64)
    state = MatmulLtState()
    state.has_fp16_weights = False
    result = matmul(x, w, state=state, bias=torch.ones(8))
    assert state.CB.dtype == torch.int8 and state.SCB.shape == (8,)
    assert (result - 1 - x @ w.t()).norm() / (x @ w.t()).norm() < 0.03
    assert torch.equal(matmul(x, torch.zeros(8, 64), state=state, bias=torch.ones(8)), result)  # the state decides
    assert matmul(torch.empty(0, 64), w).shape == (0, 8)
    state.reset_grads()
    assert state.CB is None and state.SCB is None and state.CxB is None
    with pytest.raises(AttributeError):
        state.nonsense  # noqa: B018


def test_int8_codes_without_scales_are_an_error() -> None:
    layer = int8().to("cpu")
    layer.weight = Int8Params(layer.weight.data, requires_grad=False)
    with pytest.raises(RuntimeError, match="row scales"):
        layer(torch.randn(1, 128))


def test_scales_assigned_by_an_offload_hook_are_used() -> None:
    layer = int8().to("cpu")
    x = torch.randn(2, 128)
    expected = layer(x)
    codes, scales = layer.state.CB, layer.state.SCB
    layer.state.CB = layer.state.SCB = None
    layer.weight = Int8Params(codes, requires_grad=False)
    layer.weight.SCB = scales
    assert torch.equal(layer(x), expected)


def test_weights_beyond_fp16_do_not_become_infinite() -> None:
    layer = int8(8, 2)
    layer.weight.data = torch.full((2, 8), 1e6)
    layer.to("cpu")
    assert torch.allclose(layer.weight.SCB, torch.tensor([1e6, 1e6]))


# ---- state dicts ----


@both
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("moved", [False, True])
def test_a_state_dict_loads_into_what_wrote_it(make, assign: bool, moved: bool) -> None:  # type: ignore[no-untyped-def]
    """#1946: keys were written that were never loaded."""
    source = nn.Sequential(make().to("cpu"), nn.ReLU())
    target = nn.Sequential(make(), nn.ReLU())
    target = target.to("cpu") if moved else target
    result = target.load_state_dict(source.state_dict(), assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    x = torch.randn(4, 128)
    assert torch.equal(target(x), source(x)) and type(target[0].weight) is type(source[0].weight)
    saved = target.state_dict()
    assert all(torch.equal(value, saved[key]) for key, value in source.state_dict().items())


@both
def test_a_state_dict_loads_on_the_meta_device(make) -> None:  # type: ignore[no-untyped-def]
    source = make().to("cpu")
    with torch.device("meta"):
        target = make()
    target.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(4, 128)
    assert torch.equal(target(x), source(x))


def test_float_weights_load_before_the_move_and_not_after() -> None:
    for make in MAKERS.values():
        plain = nn.Linear(128, 32)
        layer = make()
        layer.load_state_dict(plain.state_dict())
        layer.to("cpu")
        with pytest.raises(RuntimeError, match="quantized already: load the state dict before"):
            layer.load_state_dict(plain.state_dict())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("weight.absmax"), "lacks weight.absmax"),
        (lambda s: s.pop("weight"), "weight is missing, but its quantization state is there"),
        (lambda s: s.update({"weight.nested_absmax": s["weight.nested_absmax"][:0]}), "nested_absmax is"),
        (lambda s: s.update({"weight.extra": torch.ones(1)}), "extra weight.extra"),
        (lambda s: s.update({"weight": s["weight"][:-1]}), "take 2048 bytes"),
        (lambda s: [s.pop(k) for k in list(s) if k.startswith("weight.")], "packed 4-bit codes without their state"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_a_damaged_4bit_state_dict_is_an_error_even_unstrictly(change, words: str, strict: bool) -> None:  # type: ignore[no-untyped-def]
    state = dict(nf4().to("cpu").state_dict())
    change(state)
    with pytest.raises(RuntimeError, match=words):
        nf4().load_state_dict(state, strict=strict)


def test_a_4bit_state_dict_of_another_layer_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"quantized \[32, 128\], but this layer needs \[16, 256\]"):
        nf4(256, 16).load_state_dict(nf4(128, 32).to("cpu").state_dict())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("SCB"), "SCB, the row scales of the int8 weight, is missing"),
        (lambda s: s.pop("weight"), "SCB is there without weight"),
        (lambda s: s.update(weight_format=torch.tensor(2, dtype=torch.uint8)), "col_turing"),
        (lambda s: s.update(SCB=s["SCB"][:-1]), "expected 32"),
        (lambda s: s.update(weight=s["weight"][:, :-1]), "needs"),
        (lambda s: s.update(weight=s["weight"].float()), "SCB is there, but weight is torch.float32"),
    ],
)
def test_a_damaged_8bit_state_dict_is_an_error(change, words: str) -> None:  # type: ignore[no-untyped-def]
    state = dict(int8().to("cpu").state_dict())
    change(state)
    with pytest.raises(RuntimeError, match=words):
        int8().load_state_dict(state, strict=False)


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


# ---- optimizers ----


def test_every_optimizer_has_its_path_and_steps() -> None:
    names = [name for _, family in optim._FAMILIES.values() for name in family]
    assert len(names) == 39
    for name in names:
        cls = getattr(optim, name)
        assert str(cls).startswith("<class 'bitsandbytes.optim.") and issubclass(cls, optim.Optimizer8bit)
        p = nn.Parameter(torch.randn(64, 64))
        before = p.detach().clone()
        p.grad = torch.randn(64, 64)
        optimizer = cls([p], lr=0.01)
        optimizer.step()
        assert not torch.equal(p, before), name
        bits8 = torch.uint8 in {t.dtype for t in optimizer.state[p].values()}
        # Without momentum, SGD and LARS have no state at all.
        assert bits8 == ("8bit" in name and not name.startswith(("SGD", "LARS"))), name


@pytest.mark.parametrize("early", [True, False])
def test_overrides_apply_whenever_they_are_registered(early: bool) -> None:
    """#1269, #1869: override_config was ignored unless everything was called in one order."""
    manager = GlobalOptimManager.get_instance()
    a, b = nn.Parameter(torch.randn(64, 64)), nn.Parameter(torch.randn(64, 64))
    if early:
        manager.override_config(a, "optim_bits", 32)
    optimizer = optim.AdamW8bit([a, b], lr=0.1)
    manager.register_parameters([a, b])
    if not early:
        manager.override_config([a], key_value_dict={"optim_bits": 32, "lr": 0.0})
    for p in (a, b):
        p.grad = torch.ones_like(p)
    before = a.detach().clone()
    optimizer.step()
    dtypes = [{t.dtype for t in optimizer.state[p].values()} for p in (a, b)]
    assert torch.uint8 not in dtypes[0] and torch.uint8 in dtypes[1]
    assert torch.equal(a, before) != early
    with pytest.raises(ValueError, match="either a key and a value"):
        manager.override_config(a)


def test_the_manager_holds_no_model_alive() -> None:
    manager = GlobalOptimManager.get_instance()
    table = StableEmbedding(10, 8)
    manager.override_config(table.norm.weight, "lr", 1.0)
    dead = weakref.ref(table), weakref.ref(table.norm.weight)
    del table
    gc.collect()
    assert [ref() for ref in dead] == [None, None]
    manager.overrides()


def test_old_keywords_of_optimizers() -> None:
    p = [nn.Parameter(torch.randn(8))]
    with pytest.warns(FutureWarning, match="block_wise has no effect"):
        optim.AdamW8bit(p, block_wise=True)
    with pytest.raises(ValueError, match="percentile_clipping=5 was removed"):
        optim.Adam(p, percentile_clipping=5)


def test_classes_that_reach_into_bitsandbytes_updates_are_refused() -> None:
    class Foreign(optim.Optimizer2State):
        pass

    with pytest.raises(NotImplementedError, match="galore_adamw instead"):
        Foreign("adam", [nn.Parameter(torch.randn(8))])


# ---- utilities ----


def test_replace_linear() -> None:
    model = nn.Sequential(
        nn.Linear(64, 8), nn.Sequential(nn.Linear(8, 8, bias=False)), nn.ModuleDict({"lm_head": nn.Linear(8, 4)})
    )
    old = model[0].weight
    replace_linear(model, lambda k, n, bias: LinearNF4(k, n, bias), copy_weights=True)
    assert type(model[0]) is LinearNF4 and type(model[1][0]) is LinearNF4 and model[1][0].bias is None
    assert type(model[2]["lm_head"]) is nn.Linear and model[0].weight is old


def test_outlier_tracer() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8))
    model[1].weight.data[:, 3] *= 100
    tracer = OutlierTracer.get_instance()
    tracer.initialize(model)
    x = torch.randn(10, 64)
    x[0, 9] = 50.0
    model(x)
    assert 9 in tracer.get_outliers(model[0].weight) and tracer.get_outliers(model[1].weight).tolist() == [3]
    assert find_outlier_dims(model[1].weight, topk=1).tolist() == [3]


def test_is_on_gpu_checks_for_one_device() -> None:
    assert is_on_gpu([torch.ones(1), None, torch.ones(2)])
    with pytest.raises(RuntimeError, match="one device"):
        is_on_gpu([torch.ones(1), torch.ones(2, device="meta")])


# ---- on a GPU ----


@pytest.mark.gpu
@both
def test_a_layer_moves_to_the_gpu_and_back(make) -> None:  # type: ignore[no-untyped-def]
    """Quantized there or here, the bytes are the same, and everything that belongs to a layer travels with it."""
    layer = make()
    here, there = copy.deepcopy(layer).to("cpu"), layer.to("cuda")
    saved = there.state_dict()
    assert all(torch.equal(value.cpu(), saved[key].cpu()) for key, value in here.state_dict().items())
    x = torch.randn(40, 128)
    on_gpu = there(x.cuda())
    assert on_gpu.is_cuda and torch.allclose(on_gpu.cpu(), here(x), atol=0.05, rtol=0.05)
    back = there.to("cpu")
    assert torch.equal(back(x), here(x))
    again = back.to("cuda")
    assert torch.equal(again(x.cuda()), on_gpu)
    leaf = x.cuda().requires_grad_()
    again(leaf).sum().backward()
    assert leaf.grad.isfinite().all()


@pytest.mark.gpu
def test_an_override_survives_the_move_to_the_gpu() -> None:
    model = nn.Linear(64, 64)
    GlobalOptimManager.get_instance().override_config(model.weight, "optim_bits", 32)
    optimizer = optim.PagedAdamW8bit(model.cuda().parameters(), lr=0.1)
    model(torch.randn(2, 64, device="cuda")).sum().backward()
    optimizer.step()
    assert torch.uint8 not in {t.dtype for t in optimizer.state[model.weight].values()}
