"""Which kernel serves: rules that need no GPU to be tested."""

from __future__ import annotations

import ctypes
import json

import pytest
import torch

from kbit.ops import backends, choose


def test_without_hopper_triton_then_dequantize():
    for capability in (None, (7, 5), (8, 0), (10, 0)):
        assert choose.linear_4bit_path(1, 4096, 4096, 64, 2, capability) == "triton"
        assert choose.linear_4bit_path(choose.TRITON_TOKENS + 1, 4096, 4096, 64, 2, capability) == "dequantize"


def test_hopper_takes_what_it_can_read():
    assert choose.linear_4bit_path(1, 4096, 4096, 64, 2, (9, 0)) == "hopper"
    assert choose.linear_4bit_path(1, 4096, 4096, 64, 4, (9, 0)) == "triton"  # fp32 input
    assert choose.linear_4bit_path(1, 4096, 4096, 32, 2, (9, 0)) == "triton"  # blocks of 32
    assert choose.linear_4bit_path(1, 4096, 100, 64, 2, (9, 0)) == "triton"  # flat layout
    assert choose.linear_4bit_path(1, 4096, 4096, 64, 2, (9, 0), aligned=False) == "triton"
    assert choose.linear_4bit_path(512, 4096, 4096, 64, 2, (9, 0)) == "hopper"
    assert choose.linear_4bit_path(512, 1024, 4096, 64, 2, (9, 0)) == "dequantize"  # too few tiles
    assert choose.linear_4bit_path(1024, 4096, 4096, 64, 2, (9, 0)) == "hopper_wide"  # 64 tiles
    assert choose.linear_4bit_path(256, 14336, 4096, 64, 2, (9, 0)) == "hopper_wide"  # 56
    assert choose.linear_4bit_path(256, 4096, 14336, 64, 2, (9, 0)) == "hopper_wide"  # 16, of a long sum
    assert choose.linear_4bit_path(256, 1024, 14336, 64, 2, (9, 0)) == "dequantize"
    assert choose.linear_4bit_path(128, 28672, 8192, 64, 2, (9, 0)) == "hopper"
    assert choose.linear_4bit_path(4096, 14336, 4096, 64, 4, (9, 0)) == "dequantize"  # fp32 input
    assert choose.linear_4bit_path(320, 4096, 4096, 64, 2, (9, 0)) == "hopper_wide"  # 32, which would be 512 tokens
    assert choose.linear_4bit_path(10**6, 4096, 4096, 64, 2, (9, 0)) == "dequantize"


def test_gradient_product():
    for capability in (None, (8, 0)):
        assert choose.linear_4bit_grad_path(1, 4096, 4096, 64, 2, capability) == "triton"
    assert choose.linear_4bit_grad_path(1, 4096, 4096, 64, 2, (9, 0)) == "dequantize"
    assert choose.linear_4bit_grad_path(512, 4096, 4096, 64, 2, None) == "dequantize"
    assert choose.linear_4bit_grad_path(128, 4096, 4096, 64, 2, (9, 0)) == "hopper"
    assert choose.linear_4bit_grad_path(200, 4096, 4096, 64, 2, (9, 0)) == "dequantize"  # too small a weight for that
    assert choose.linear_4bit_grad_path(200, 14336, 4096, 64, 2, (9, 0)) == "hopper"
    assert choose.linear_4bit_grad_path(128, 4092, 4096, 64, 2, (9, 0)) == "dequantize"  # rows of 8184 bytes
    assert choose.linear_4bit_grad_path(128, 4096, 4096, 64, 4, (9, 0)) == "dequantize"
    assert choose.linear_4bit_grad_path(10**6, 4096, 4096, 64, 2, (9, 0)) == "dequantize"


def test_tiles_of_a_gpu_never_seen(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from kbit.kernels.triton import tiles

    default = tiles.rules("Some GPU of 2031")
    assert {"linear_4bit", "linear_4bit_grad_input", "linear_8bit", "linear_8bit_grad_input", "llm_int8"} <= set(
        default
    )
    for rules in default.values():
        for rule in rules:
            tile = tiles.resolve(rule, 1, 4096, 4096, 100)
            assert tile.bm >= 1 and tile.split >= 1 and all(v & (v - 1) == 0 for v in (tile.bm, tile.bn, tile.bk))
    own = {"linear_4bit": [{"max_m": 8, "bm": 32, "bn": 32, "bk": 64}]}
    (tmp_path / "my-gpu-x.json").write_text(json.dumps(own))
    (tmp_path / "default.json").write_text(json.dumps(default))
    monkeypatch.setattr(tiles, "FOLDER", tmp_path)
    tiles.rules.cache_clear()
    assert tiles.rules("My GPU (X)")["linear_4bit"] == own["linear_4bit"]
    assert tiles.rules("My GPU (X)")["linear_4bit_grad_input"] == default["linear_4bit_grad_input"]
    tiles.rules.cache_clear()


def test_splits_fill_the_device_but_keep_whole_steps():
    pytest.importorskip("triton")
    from kbit.kernels.triton.tiles import resolve

    rule = {"max_m": 16, "bm": 16, "bn": 64, "bk": 64, "split": 0}
    assert resolve(rule, 1, 4096, 4096, 132).split == 4
    assert resolve(rule, 1, 64 * 1024, 4096, 132).split == 1
    assert resolve(rule, 1, 64, 256, 132).split == 1


def test_hopper_settings_are_valid():
    from kbit.kernels.cuda.linear_4bit import FOLDER, Config, with_scales

    rules = json.loads((FOLDER / "hopper.json").read_text())["linear_4bit"]
    assert [r["max_m"] for r in rules] == sorted(r["max_m"] for r in rules)
    for rule in rules:
        fields = {key: value for key, value in rule.items() if key not in ("max_m", "max_n")}
        config = Config(**fields)
        assert (with_scales(config, 8192) if config.r else config).valid(), rule


def test_the_kernel_of_few_tokens_serves_where_it_can(monkeypatch):
    from kbit.kernels.cuda import linear_4bit as hopper

    rules = json.loads((hopper.FOLDER / "hopper.json").read_text())["linear_4bit"]
    monkeypatch.setattr(hopper, "_rules", lambda device: (rules, 132))
    hopper.choose_config.cache_clear()
    for m, n, k, few, served in [
        (1, 28672, 8192, True, True),
        (1, 28672, 8192, False, False),  # scales that are no rows of bytes, or experts
        (8, 14336, 4096, True, True),
        (16, 28672, 4096, True, True),
        (1, 28672, 65536, True, False),  # scales that shared memory has no room for
        (17, 28672, 8192, True, False),
        (5000, 4096, 4096, True, False),
    ]:
        config = hopper.choose_config(0, m, n, k, few=few)
        assert config.valid() and (config.r > 0) == served, (m, n, k, config)
        if served:  # a thread block's part of K, wherever in 16 bytes of scales it begins
            stages = -(-k // config.ks // config.cluster)
            assert 4 * config.scales >= stages and config.scales % 2
    hopper.choose_config.cache_clear()
    assert hopper.rows_of_scales(True, 64, 4096, 512)
    assert not hopper.rows_of_scales(False, 64, 4096, 512) and not hopper.rows_of_scales(True, 128, 4096, 512)
    assert not hopper.rows_of_scales(True, 64, 4160, 512) and not hopper.rows_of_scales(True, 64, 4096, 520)


def test_what_the_hopper_kernel_quantizes():
    pytest.importorskip("triton")
    from kbit.kernels.cuda.quantize_4bit import fits, settings

    x = torch.ones(4, 256, dtype=torch.bfloat16)
    assert fits(x, 64) and fits(x.float(), 256) and fits(x.half(), 32)
    assert not fits(x, 512)  # more than a warp holds
    assert not fits(x.double(), 64) and not fits(x[:, :100], 32) and not fits(x[:0], 64)
    assert not fits(x.view(-1)[:100], 64) and not fits(x.view(-1)[1:129], 64)  # a remainder; 2 bytes off a boundary
    macros = settings("fp4", torch.float16, 64)
    assert macros["LANES"] == 8 and len(str(macros["CODES"]).split(",")) == 33


def test_settings_of_the_gradients_kernel():
    from kbit.kernels.cuda import linear_4bit_grad_input as gradient

    for m in (1, 65, 128, 129, 200, 256, 257, 700, 1024, 5000):
        config = gradient.choose_config(m)
        assert 64 <= config.nt <= 256 and config.nt % 32 == 0 and config.shared_bytes <= 232448
        assert -(-m // config.nt) == -(-m // 256)  # no more tiles than the widest would make
        consumer, decoder = config.registers
        assert 256 * consumer + 128 * decoder <= 65536 // 384 // 8 * 8 * 384  # they only change hands
    macros, headers = gradient.settings(gradient.choose_config(256), "nf4", torch.bfloat16, True)
    assert macros["NT"] == 256 and "1, 1, 1, 1, 0;" in headers["wgmma.h"]


def test_settings_of_the_wide_kernel():
    from kbit.kernels.cuda import linear_4bit_wide as wide
    from kbit.kernels.cuda import linear_wide

    for m in (1, 65, 129, 200, 256, 257, 700, 1024, 5000):
        config = wide.choose_config(m)
        assert 64 <= config.nt <= 256 and config.nt % 32 == 0 and config.shared_bytes <= 232448
        assert config.nt * 128 % 1024 == 0  # codes start where their swizzle does
        assert -(-m // config.nt) == -(-m // 256)  # no more tiles than the widest would make
    macros, headers = wide.settings(wide.choose_config(256), "fp4", torch.float16, False)
    assert macros["NT"] == 256 and macros["FP16"] == 1 and "DYNAMIC_MAP" not in macros
    assert "m64n256k16.f32.f16.f16" in headers["wgmma.h"]
    arguments = linear_wide._Arguments()  # packed in one call: every field where the structure has it
    memory = (ctypes.c_char * ctypes.sizeof(arguments)).from_buffer(arguments)
    linear_wide._POINTERS_AND_SIZES.pack_into(memory, linear_wide._FIRST_POINTER, *range(1, 14))
    assert [getattr(arguments, name) for name, _ in arguments._fields_[2:]] == list(range(1, 14))


def test_tiles_are_cut_where_whole_ones_would_leave_processors_idle():
    from kbit.kernels.cuda.stream_k import Schedule, schedule

    assert schedule(132, 1024, 4096, 4096, 256) == Schedule(64, 0)  # 64 tiles on 66 clusters
    assert schedule(132, 256, 14336, 4096, 256) == Schedule(56, 0)  # ten idle clusters cost less than cutting
    assert schedule(132, 256, 28672, 8192, 256) == Schedule(66, 112)  # of a longer sum not
    assert schedule(132, 256, 4096, 14336, 256) == Schedule(64, 16)  # four whole parts a tile
    some = schedule(132, 1024, 14336, 4096, 256)  # 224 tiles: two whole waves, and 92 tiles in equal shares
    assert some == Schedule(66, 92) and (224 - some.shared_tiles) % 66 == 0
    assert schedule(132, 2048, 4096, 14336, 256) == Schedule(66, 0)  # 1.94 waves
    tiny = schedule(132, 100, 256, 64, 128)  # one step has no shares
    assert tiny.clusters == 1


def test_settings_that_would_hang_are_refused():
    from kbit.kernels.cuda.linear_4bit import Config

    assert Config(8, 2, 2, 256, 4).valid()
    assert not Config(8, 1, 4, 256, 4).valid()  # a warpgroup would wait for the only stage it has, and holds
    assert not Config(8, 1, 2, 256, 5).valid()  # a stage would change hands
    assert not Config(256, 2, 1, 64, 4, 1, 1, False, 240).valid()  # more registers than the producer leaves
    assert not Config(64, 2, 1, 256, 6).valid()  # more shared memory than there is


def test_the_settings_that_the_gpu_test_runs_are_valid():
    """The list in test_gpu.py, read here so that a machine without a GPU notices."""
    import ast
    from pathlib import Path

    from kbit.kernels.cuda.linear_4bit import Config, with_scales

    source = Path(__file__).with_name("test_gpu.py").read_text()
    calls = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Config"
    ]
    assert len(calls) >= 7
    for call in calls:
        config = eval(ast.unparse(call), {"Config": Config})
        assert (with_scales(config, 8192) if config.r else config).valid(), ast.unparse(call)


def test_every_backend_says_why():
    listed = {b.name: b for b in backends()}
    assert {"triton", "cuda", "reference"} <= set(listed) and listed["reference"].active
    assert all(b.reason for b in listed.values())


def test_int8_settings_for_hopper_are_valid():
    pytest.importorskip("triton")
    from kbit.kernels.cuda import linear_8bit, llm_int8

    for n in (8, 1024, 4096, 8192, 14336, 128256):
        for k in (16, 4096, 14336, 32768):
            for m in (1, 8, 16, 17, 32, 64, 128):
                config = linear_8bit.choose_config(m, n, k, 132)
                assert config.valid() and config.nt >= min(m, 64), (m, n, k)
            for m in (1, 65, 128, 129, 256, 1024, 4096, 100_000):
                for processors in (60, 114, 132):
                    assert llm_int8.choose_config(m, n, k, processors).valid(), (m, n, k)
    assert llm_int8.choose_config(256, 4096, 14336, 132).split > 1  # 32 tiles would leave the device empty
    assert llm_int8.choose_config(4096, 14336, 4096, 132).split == 1
    assert not llm_int8.Config(256, 5).valid()  # more shared memory than there is
    assert not llm_int8.Config(256, 4, 2, 2).valid()  # a cluster has one purpose


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_least_outlier_in_16_bits(dtype):
    import torch

    from kbit.kernels.cuda.llm_int8 import outlier_limit

    dtype = getattr(torch, dtype)
    every = torch.arange(0x7FFF + 1, dtype=torch.int32).to(torch.int16).view(dtype).float()
    numbers = ~every.isnan()
    for threshold in (6.0, 6.01, 2.5, 1e-30, 1e6, 1e39):
        limit = outlier_limit(threshold, dtype)
        outliers = (torch.arange(0x7FFF + 1) >= limit) & numbers
        assert torch.equal(outliers, every >= torch.tensor(threshold)), threshold
    assert outlier_limit(0.0, dtype) == 0xFFFF


def test_products_over_experts():
    def path(rows, **other):
        options = {"experts": 8, "n": 512, "k": 256, "block_size": 64, "dtype_bytes": 2, "capability": None}
        return choose.experts_4bit_path(rows, **{**options, "grouped": False, **other})

    assert path(2) == path(10**6) == "triton"
    assert path(8 * choose.EXPERT_ROWS, grouped=True) == "triton"
    assert path(8 * choose.EXPERT_ROWS + 1, grouped=True) == "grouped_mm"
    assert (
        path(2, capability=(9, 0)) == path(8 * choose.HOPPER_EXPERT_ROWS, capability=(9, 0), grouped=True) == "hopper"
    )
    assert path(10**6, capability=(9, 0), grouped=True) == "grouped_mm"
    for other in ({"dtype_bytes": 4}, {"block_size": 32}, {"k": 100}, {"aligned": False}):
        assert path(2, capability=(9, 0), **other) == "triton"
    assert choose.experts_path(8 * 16, 8, True, 16) == choose.experts_path(10**6, 8, False, 16) == "triton"
    assert choose.experts_path(8 * 16 + 1, 8, True, 16) == "grouped_mm"


def test_tiles_shrink_to_the_shared_memory_there_is():
    pytest.importorskip("triton")
    from kbit.kernels.triton.tiles import Tile, fit

    tile = Tile(bm=64, bn=128, bk=128, stages=4)
    assert fit(tile, 2, 10**6) == tile
    assert fit(tile, 2, 100_000).stages == 2 and fit(tile, 2, 100_000).bn == 128
    small = fit(tile, 4, 40_000)
    assert small.stages == 1 and small.bn == 16 and small.bm == 64


@pytest.mark.parametrize("text", ["[]", "{", '{"linear_4bit": []}', '{"linear_4bit": [{"max_m": 1, "bm": "x"}]}'])
def test_a_broken_file_of_tiles_is_named(tmp_path, monkeypatch, text):
    pytest.importorskip("triton")
    from kbit.kernels.triton import tiles

    monkeypatch.setenv("KBIT_TUNED", str(tmp_path))
    (tmp_path / "my-gpu.json").write_text(text)
    tiles.forget()
    with pytest.raises(ValueError, match=r"my-gpu\.json is no file of tiles"):
        tiles.rules("My GPU")
    tiles.forget()
