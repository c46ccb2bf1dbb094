"""bitsandbytes.functional of the drop-in against bitsandbytes itself, and against plain arithmetic."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from kbit.checkpoint import bnb
from kbit.integrations.bitsandbytes import blockwise, codes, int8
from kbit.integrations.bitsandbytes.identity import absent_names
from kbit.integrations.bitsandbytes.matmul import matmul_4bit
from kbit.integrations.bitsandbytes.quant_state import QuantState

real = pytest.importorskip("bitsandbytes")
F = real.functional


@pytest.fixture(autouse=True)
def _one_thread():  # type: ignore[no-untyped-def]
    """The mean in double quantization depends on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- codebooks ----


@pytest.mark.parametrize(("signed", "exponent"), [(True, 7), (False, 7), (True, 5), (True, 3)])
def test_dynamic_map(signed: bool, exponent: int) -> None:
    assert torch.equal(codes.create_dynamic_map(signed, exponent), F.create_dynamic_map(signed, exponent))


def test_dynamic_map_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="5 exponent bits do not fit"):
        codes.create_dynamic_map(False, 5)


@pytest.mark.parametrize(
    "arguments", [(True, 8, True), (False, 8, True), (True, 8, False), (True, 4, True), (False, 5)]
)
def test_linear_map(arguments: tuple) -> None:
    assert torch.equal(codes.create_linear_map(*arguments), F.create_linear_map(*arguments))


@pytest.mark.parametrize("arguments", [(True, 5, 2, 8), (True, 4, 3, 8), (False, 4, 4, 8), (True, 2, 1, 4)])
def test_small_float_map(arguments: tuple) -> None:
    assert torch.equal(codes.create_fp8_map(*arguments), F.create_fp8_map(*arguments))


def test_small_float_map_needs_bits_that_add_up() -> None:
    with pytest.raises(ValueError, match="do not make 8 bits"):
        codes.create_fp8_map(True, 5, 5, 8)


def test_normal_map_is_nf4() -> None:
    values = codes.create_normal_map()
    assert values.numel() == 256
    assert torch.allclose(values.unique(), codes.get_4bit_type("nf4", "cpu"), atol=2e-7)
    assert codes.create_normal_map(use_extra_value=False).unique().numel() == 15


@pytest.mark.parametrize("name", ["nf4", "fp4", "af4"])
def test_4bit_types(name: str) -> None:
    assert torch.equal(codes.get_4bit_type(name, "cpu"), F.get_4bit_type(name, "cpu"))


def test_int4_type() -> None:
    """bitsandbytes itself fails here: it divides integers in place."""
    table = codes.get_4bit_type("int4", "cpu")
    assert torch.allclose(table * 7, torch.tensor([7.0, 6, 5, 4, 3, 2, 1, 0, 0, -1, -2, -3, -4, -5, -6, -7]))


def test_unknown_4bit_type_is_named() -> None:
    with pytest.raises(NotImplementedError, match="nf3"):
        codes.get_4bit_type("nf3", "cpu")


# ---- 4-bit ----

SHAPES = [(64,), (5, 123), (7, 64), (1, 3), (2, 3, 130), (33, 100)]


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("blocksize", [64, 256])
def test_4bit_equals_bitsandbytes(quant_type: str, dtype: torch.dtype, shape: tuple, blocksize: int) -> None:
    x = torch.randn(shape).to(dtype)
    packed, state = blockwise.quantize_4bit(x, blocksize=blocksize, quant_type=quant_type)
    expected, expected_state = F.quantize_4bit(x, blocksize=blocksize, quant_type=quant_type)
    assert torch.equal(packed, expected)
    assert torch.equal(state.absmax, expected_state.absmax)
    decoded = blockwise.dequantize_4bit(packed, state)
    assert decoded.shape == x.shape and decoded.dtype == dtype
    # bitsandbytes' own CPU decoder takes wrong scales where a block is longer than a row: compare with the definition.
    nibbles = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], dim=1).view(-1)[: x.numel()].long()
    scales = state.absmax.repeat_interleave(blocksize)[: x.numel()]
    assert torch.equal(decoded, (state.code[nibbles] * scales).to(dtype).view(shape))
    if shape[-1] % blocksize == 0:
        assert torch.equal(decoded, F.dequantize_4bit(expected, expected_state).view(shape))


@pytest.mark.parametrize("storage", bnb.STORAGE_DTYPES, ids=str)
def test_storage_holds_the_same_bytes(storage: torch.dtype) -> None:
    x = torch.randn(16, 128)
    packed, state = blockwise.quantize_4bit(x, quant_type="nf4", quant_storage=storage)
    expected, _ = F.quantize_4bit(x, quant_type="nf4", quant_storage=storage)
    assert packed.shape == expected.shape and packed.dtype == storage
    assert torch.equal(packed.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(blockwise.dequantize_4bit(packed, state), F.dequantize_nf4(expected, F.quantize_nf4(x)[1]))


def test_storage_that_the_bytes_do_not_fill_is_an_error() -> None:
    with pytest.raises(ValueError, match="use quant_storage=torch.uint8"):
        blockwise.quantize_4bit(torch.randn(3, 2), quant_storage=torch.bfloat16)


def test_double_quantization_decodes_what_bitsandbytes_wrote_to_the_bit() -> None:
    x = torch.randn(96, 640)
    packed, state = F.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
    ours = QuantState.from_dict(state.as_dict(packed=True), device="cpu")
    assert torch.equal(blockwise.dequantize_4bit(packed, ours), F.dequantize_4bit(packed, state))


def test_double_quantization_is_at_least_as_close() -> None:
    x = torch.randn(256, 640)
    _, plain = blockwise.quantize_4bit(x, quant_type="nf4")
    _, ours = blockwise.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
    _, theirs = F.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
    assert torch.equal(ours.offset, theirs.offset) and torch.equal(ours.state2.absmax, theirs.state2.absmax)
    their_scales = F.dequantize_blockwise(theirs.absmax, theirs.state2) + theirs.offset
    our_error = (ours.decoded_absmax() - plain.absmax).abs()
    assert (our_error <= (their_scales - plain.absmax).abs() + 1e-7).all()


def test_non_contiguous_input() -> None:
    """#1859: strides must not matter."""
    x = torch.randn(128, 64).t()
    packed, state = blockwise.quantize_4bit(x, quant_type="nf4")
    expected, expected_state = blockwise.quantize_4bit(x.contiguous(), quant_type="nf4")
    assert torch.equal(packed, expected) and torch.equal(state.absmax, expected_state.absmax)


def test_partial_last_block_is_intact() -> None:
    """#1884."""
    x = torch.full((1, 70), 2.0)
    x[0, 64:] = torch.tensor([8.0, -8.0, 4.0, 0.0, 1.0, -2.0])
    packed, state = blockwise.quantize_4bit(x, quant_type="fp4", blocksize=64)
    assert state.absmax.tolist() == [2.0, 8.0]
    assert torch.allclose(blockwise.dequantize_4bit(packed, state)[0, 64:], x[0, 64:], atol=0.7)


def test_transposed_codes_give_the_transposed_weight() -> None:
    x = torch.randn(8, 64)
    packed, state = blockwise.quantize_4bit(x, quant_type="nf4")
    straight = blockwise.dequantize_4bit(packed, state)
    assert torch.equal(blockwise.dequantize_4bit(packed.t(), state), straight.t())
    single, state = blockwise.quantize_4bit(torch.randn(1, 2), quant_type="nf4")  # codes are [1, 1] either way
    assert blockwise.dequantize_4bit(single, state).shape == (1, 2)


def test_out_and_absmax_arguments() -> None:
    x = torch.randn(4, 64)
    out, absmax = torch.zeros(128, 1, dtype=torch.uint8), torch.zeros(4)
    packed, state = blockwise.quantize_4bit(x, absmax=absmax, out=out, quant_type="nf4")
    assert packed is out and state.absmax is absmax and out.any() and absmax.all()
    decoded = torch.empty(4, 64)
    assert blockwise.dequantize_4bit(out, absmax=absmax, out=decoded, quant_type="nf4") is decoded
    assert torch.equal(decoded, blockwise.dequantize_4bit(packed, state))


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"blocksize": 48}, "blocksize"),
        ({"quant_type": "int4"}, "quant_type"),
        ({"quant_storage": torch.int32}, "uint8"),
    ],
)
def test_wrong_arguments_are_named(keywords: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        blockwise.quantize_4bit(torch.randn(4, 64), **keywords)


def test_codes_of_another_size_are_an_error() -> None:
    packed, state = blockwise.quantize_4bit(torch.randn(4, 64))
    with pytest.raises(ValueError, match="do not belong to a tensor of"):
        blockwise.dequantize_4bit(packed[:-1], state)
    with pytest.raises(ValueError, match="needs a quant_state"):
        blockwise.dequantize_4bit(packed)


# ---- products ----


def test_matmul_4bit_and_gemv() -> None:
    w, x = torch.randn(32, 128), torch.randn(2, 5, 128)
    packed, state = blockwise.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    expected = x @ blockwise.dequantize_4bit(packed, state).t()
    bias = torch.randn(32)
    assert torch.allclose(matmul_4bit(x, packed.t(), state, bias=bias), expected + bias, atol=1e-4)
    assert torch.allclose(blockwise.gemv_4bit(x[0, :1], packed, state=state), expected[0, :1], atol=1e-4)
    out = torch.empty(2, 5, 32)
    assert matmul_4bit(x, packed, state, out=out) is out and torch.allclose(out, expected, atol=1e-4)
    assert matmul_4bit(torch.empty(0, 128), packed, state).shape == (0, 32)


def test_matmul_4bit_of_a_transposed_weight_warns_and_is_right() -> None:
    """#1862: silently wrong before."""
    w, x = torch.randn(32, 128), torch.randn(3, 32)
    packed, state = blockwise.quantize_4bit(w, quant_type="nf4")
    with pytest.warns(DeprecationWarning, match=r"quantized as \[K, N\]"):
        result = matmul_4bit(x, packed, state)
    assert torch.allclose(result, x @ blockwise.dequantize_4bit(packed, state), atol=1e-4)


def test_matmul_4bit_wants_a_matrix() -> None:
    packed, state = blockwise.quantize_4bit(torch.randn(2, 4, 64))
    with pytest.raises(ValueError, match="matrix"):
        matmul_4bit(torch.randn(1, 64), packed, state)
    packed, state = blockwise.quantize_4bit(torch.randn(4, 64))
    with pytest.raises(ValueError, match="has 63 features"):
        matmul_4bit(torch.randn(1, 63), packed, state)


# ---- blockwise 8-bit ----


@pytest.mark.parametrize("blocksize", [64, 256, 4096, 100])
@pytest.mark.parametrize("nested", [True, False])
def test_blockwise_round_trip(blocksize: int, nested: bool) -> None:
    x = torch.randn(77, 65)
    codes8, state = blockwise.quantize_blockwise(x, blocksize=blocksize, nested=nested)
    assert codes8.shape == x.shape and codes8.dtype == torch.uint8
    decoded = blockwise.dequantize_blockwise(codes8, state)
    theirs = F.dequantize_blockwise(*F.quantize_blockwise(x, blocksize=blocksize, nested=nested))
    assert (decoded - x).norm() <= (theirs - x).norm() * 1.001
    assert (decoded - x).abs().max() < 0.2


@pytest.mark.parametrize("make", [codes.create_linear_map, codes.create_fp8_map, codes.create_normal_map])
def test_blockwise_with_any_code(make) -> None:  # type: ignore[no-untyped-def]
    code = make()
    x = torch.randn(500)
    codes8, state = blockwise.quantize_blockwise(x, code=code, blocksize=100)
    scaled = x.view(5, 100) / state.absmax[:, None]
    nearest = (scaled.reshape(-1, 1) - code).abs().min(dim=1).values
    assert torch.allclose((scaled.reshape(-1) - code[codes8.long()]).abs(), nearest, atol=1e-6)
    decoded = blockwise.dequantize_blockwise(codes8, state)
    assert torch.equal(
        decoded,
        F.dequantize_blockwise(codes8, F.QuantState(state.absmax, code=code, blocksize=100, dtype=torch.float32)),
    )


def test_blockwise_decodes_what_bitsandbytes_wrote() -> None:
    x = torch.randn(3000).to(torch.bfloat16)
    codes8, state = F.quantize_blockwise(x, blocksize=256)
    ours = QuantState(state.absmax, code=state.code, blocksize=256, dtype=state.dtype)
    assert torch.equal(blockwise.dequantize_blockwise(codes8, ours), F.dequantize_blockwise(codes8, state))
    assert torch.equal(
        blockwise.dequantize_blockwise(codes8, absmax=state.absmax, blocksize=256),
        F.dequantize_blockwise(codes8, absmax=state.absmax, blocksize=256),
    )


def test_blockwise_errors() -> None:
    with pytest.raises(ValueError, match="positive"):
        blockwise.quantize_blockwise(torch.randn(4), blocksize=0)
    with pytest.raises(ValueError, match="uint8"):
        blockwise.dequantize_blockwise(torch.randn(4), absmax=torch.ones(1))
    with pytest.raises(ValueError, match="needs a quant_state or an absmax"):
        blockwise.dequantize_blockwise(torch.zeros(4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="need 2 scales"):
        blockwise.dequantize_blockwise(torch.zeros(100, dtype=torch.uint8), absmax=torch.ones(1), blocksize=64)


# ---- int8 ----


def test_int8_codes_equal_bitsandbytes() -> None:
    x = torch.randn(40, 96).half()
    ours, theirs = int8.int8_vectorwise_quant(x), F.int8_vectorwise_quant(x.clone())
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1]) and ours[2] is None
    assert torch.equal(int8.int8_vectorwise_dequant(*ours[:2]), F.int8_vectorwise_dequant(*theirs[:2]))


@pytest.mark.parametrize("rows", [1, 12])
def test_int8_outliers(rows: int) -> None:
    x = torch.randn(rows, 96).half().clamp(-5, 5)
    x[0, 3], x[-1, 90] = 9.0, -7.0
    before = x.clone()
    ours, theirs = int8.int8_vectorwise_quant(x, 6.0), F.int8_vectorwise_quant(x.clone(), 6.0)
    assert torch.equal(x, before)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
    assert int8.int8_vectorwise_quant(x, 100.0)[2].numel() == 0


def test_int8_zero_row_stays_zero() -> None:
    codes8, absmax, _ = int8.int8_vectorwise_quant(torch.zeros(2, 8))
    assert not codes8.any() and not absmax.any()


def test_int8_product_and_its_scale() -> None:
    a, b = torch.randn(6, 64).half(), torch.randn(10, 64).half()
    (ca, sa, _), (cb, sb, _) = int8.int8_vectorwise_quant(a), int8.int8_vectorwise_quant(b)
    product = int8.int8_linear_matmul(ca.view(2, 3, 64), cb)
    assert torch.equal(product.view(6, 10), ca.int() @ cb.int().t()) and product.dtype == torch.int32
    bias = torch.randn(10)
    result = int8.int8_mm_dequant(product.view(6, 10), sa, sb, bias=bias)
    exact = product.view(6, 10).double() * (sa.double()[:, None] * sb.double() / 127**2) + bias
    assert result.dtype == torch.float16 and torch.equal(result, exact.half())
    with pytest.raises(ValueError, match="int8 codes"):
        int8.int8_linear_matmul(a, b)


def test_int8_double_quant() -> None:
    x = torch.randn(6, 10)
    rows, columns, row_stats, column_stats, outliers = int8.int8_double_quant(x)
    assert outliers is None and torch.equal(row_stats, x.abs().amax(1)) and torch.equal(column_stats, x.abs().amax(0))
    assert torch.equal(rows, (x * (127 / row_stats[:, None])).round().to(torch.int8))
    assert torch.allclose(columns * column_stats / 127, x, atol=0.05)
    with pytest.raises(ValueError, match="out_col must be None"):
        int8.int8_double_quant(x, out_col=columns)


# ---- QuantState ----


@pytest.mark.parametrize("nested", [True, False])
def test_quant_state_round_trips(nested: bool) -> None:
    _, state = blockwise.quantize_4bit(torch.randn(8, 640).bfloat16(), quant_type="fp4", compress_statistics=nested)
    for packed in (True, False):
        assert QuantState.from_dict(state.as_dict(packed=packed), device="cpu") == state
    assert copy.deepcopy(state) == state and pickle_round_trip(state) == state
    assert state[0] is state.absmax and state[-1] == "fp4" and state[1] == torch.Size([8, 640])
    assert (state[4] is None) != nested
    assert state != blockwise.quantize_4bit(torch.randn(8, 640), quant_type="fp4")[1]


def pickle_round_trip(state: QuantState) -> QuantState:
    import sys
    import types

    # The class says that it is bitsandbytes.functional.QuantState, which here is the real package's.
    module = types.ModuleType("bitsandbytes.functional")
    module.QuantState = QuantState  # type: ignore[attr-defined]
    real_module = sys.modules["bitsandbytes.functional"]
    sys.modules["bitsandbytes.functional"] = module
    try:
        return pickle.loads(pickle.dumps(state))
    finally:
        sys.modules["bitsandbytes.functional"] = real_module


@pytest.mark.parametrize("nested", [True, False])
def test_quant_state_dictionaries_are_those_of_bitsandbytes(nested: bool) -> None:
    x = torch.randn(8, 640)
    ours = blockwise.quantize_4bit(x, quant_type="nf4", compress_statistics=nested)[1].as_dict(packed=True)
    theirs = F.quantize_4bit(x, quant_type="nf4", compress_statistics=nested)[1].as_dict(packed=True)
    assert list(ours) == list(theirs)
    for key in theirs:
        if not (nested and key == "absmax"):
            assert torch.equal(ours[key], theirs[key]), key


def test_offset_is_fp32_whatever_the_default_dtype_is() -> None:
    """#1971: a bf16 offset shifts every scale."""
    _, state = blockwise.quantize_4bit(torch.randn(64, 64), quant_type="nf4", compress_statistics=True)
    values = state.as_dict(packed=True)
    torch.set_default_dtype(torch.bfloat16)
    try:
        loaded = QuantState.from_dict(values, device="cpu")
    finally:
        torch.set_default_dtype(torch.float32)
    assert loaded.offset.dtype == torch.float32 and torch.equal(loaded.offset, state.offset)


def test_offset_stored_as_a_bf16_tensor_is_read_as_it_is() -> None:
    _, state = blockwise.quantize_4bit(torch.randn(64, 64), quant_type="nf4", compress_statistics=True)
    values = state.as_dict()
    values["nested_offset"] = torch.tensor(values["nested_offset"], dtype=torch.bfloat16)
    loaded = QuantState.from_dict(values, device="cpu")
    assert loaded.offset == values["nested_offset"].float() and loaded.offset.dtype == torch.float32


def test_from_dict_leaves_its_argument_alone() -> None:
    _, state = blockwise.quantize_4bit(torch.randn(64, 64), quant_type="nf4", compress_statistics=True)
    values = {f"model.q_proj.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    keys = list(values)
    assert QuantState.from_dict(values, device="cpu") == state and list(values) == keys


def test_nested_scales_with_a_map_of_their_own() -> None:
    """A file may bring a map whose last bits differ from ours: it decodes with its own."""
    _, state = blockwise.quantize_4bit(torch.randn(64, 64), quant_type="nf4", compress_statistics=True)
    state.state2.code = state.state2.code * (1 + 2**-22)
    expected = state.state2.code[state.absmax.long()] * state.state2.absmax + state.offset
    loaded = QuantState.from_dict(state.as_dict(packed=True), device="cpu")
    assert torch.equal(loaded.scales()[0], expected) and loaded.scales()[1] is None


# ---- names that are not there ----


def test_absent_names_say_what_to_use() -> None:
    getattr_ = absent_names("bitsandbytes.functional", {"igemmlt": "use int8_linear_matmul"})
    with pytest.raises(
        AttributeError, match=r"bitsandbytes\.functional\.igemmlt does not exist .* use int8_linear_matmul"
    ):
        getattr_("igemmlt")
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        getattr_("nonsense")
