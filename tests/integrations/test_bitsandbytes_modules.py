"""The drop-in's linear layers and parameters: their state machines, and bugs of bitsandbytes not to bring back."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from kbit.integrations.bitsandbytes.blockwise import dequantize_4bit, quantize_4bit
from kbit.integrations.bitsandbytes.linear import Linear4bit, Linear8bitLt, LinearFP4, LinearNF4
from kbit.integrations.bitsandbytes.matmul import MatmulLtState, matmul
from kbit.integrations.bitsandbytes.params import Int8Params, Params4bit
from tests.integrations.dropin.layers import both, int8, nf4

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


def test_a_type_that_does_not_exist_is_refused_when_the_layer_is_made() -> None:
    with pytest.raises(ValueError, match="quant_type must be 'nf4' or 'fp4', got 'int4'"):
        Linear4bit(64, 16, quant_type="int4")


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
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
