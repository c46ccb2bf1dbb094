"""What the Hopper product hands to the driver, on a machine without one: every argument, grid and stream."""

from __future__ import annotations

import ctypes
import json

import pytest
import torch

from kbit.kernels.cuda import compile as compiler
from kbit.kernels.cuda import linear_4bit as hopper
from kbit.kernels.cuda import linear_4bit_wide, linear_8bit_wide, linear_wide, operands
from kbit.kernels.cuda import linear_group as group
from kbit.kernels.cuda.stream_k import Schedule


class Driver:
    """Stands in for libcuda: writes the address that a map describes into it, records launches."""

    def __init__(self):
        self.launches = []

        def launch(config, function, pointers, extra):
            fields = hopper._Arguments._fields_
            values = {name: kind.from_address(pointer) for (name, kind), pointer in zip(fields, pointers, strict=True)}
            maps = {name: value.words[0] for name, value in values.items() if name.startswith("map")}
            plain = {name: value.value for name, value in values.items() if not name.startswith("map")}
            self.launches.append((tuple(config._obj.grid), config._obj.stream, {**maps, **plain}))
            return 0

        self.cuLaunchKernelEx = type("Launch", (), {"__call__": staticmethod(launch)})()

    def cuTensorMapEncodeTiled(self, tensor_map, kind, rank, address, *rest):
        tensor_map._obj.words[0] = address.value
        return 0


@pytest.fixture
def driver(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(compiler, "driver", lambda: driver)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)  # where CPU tensors say they are
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 77, raising=False)
    monkeypatch.setattr(
        hopper, "choose_config", lambda device, m, n, k, *rest, **few: hopper.Config(8, 2, 2, 256, 4, 2)
    )

    def load(device, config, *kind):
        function = ctypes.c_void_p(1)
        return compiler.Launcher(function, hopper._Arguments, config.threads, config.shared_bytes)

    monkeypatch.setattr(hopper, "_load", load)
    for cached in (hopper._plan, operands.encode_cached):
        cached.cache_clear()
    yield driver
    for cached in (hopper._plan, operands.encode_cached):
        cached.cache_clear()


def test_every_argument_reaches_the_kernel(driver):
    n, k = 512, 1024
    weight = torch.zeros(n, k // 2, dtype=torch.uint8)
    absmax, nested, offset = torch.zeros(n, k // 64, dtype=torch.uint8), torch.zeros(32), torch.zeros(1)
    bias = torch.zeros(n, dtype=torch.bfloat16)
    for m, parts, b in [(1, (absmax, nested, offset), bias), (9, (absmax.float(), None, None), None)]:
        x = torch.zeros(m, k, dtype=torch.bfloat16)
        for _ in range(2):  # the second call finds everything prepared
            out = hopper.linear_4bit(x, weight, *parts, b, "nf4", 64, n)
        assert out.shape == (m, n) and out.dtype == x.dtype
        grid, stream, values = driver.launches[-1]
        assert grid == (n // 128, -(-m // 8), 2) and stream == 77
        address = [None if t is None else t.data_ptr() for t in (*parts, b, out)]
        assert [values[name] for name in ("absmax", "nested_absmax", "offset", "bias", "out")] == address
        assert (values["m"], values["n"], values["k"], values["block_shift"]) == (m, n, k, 6)
        assert (values["map_w"], values["map_x"]) == (weight.data_ptr(), x.data_ptr())
        assert (values["offsets"], values["experts"]) == (None, 0)


@pytest.mark.parametrize(
    "m, n, k, rows, cluster",
    [
        (1, (14336,), 4096, 112, 1),  # 128 tiles, where 64 rows a warpgroup make 112
        (8, (14336, 14336), 4096, 224, 1),
        (1, (4096, 1024, 1024), 4096, 64, 1),
        (32, (14336,), 4096, 128, 1),
        (64, (14336,), 4096, 112, 1),
        (64, (8192,), 8192, 64, 1),
        (1, (4096,), 14336, 64, 2),
        (1000, (14336,), 4096, 128, 1),
    ],
)
def test_tiles_share_a_gpu_out_evenly(monkeypatch, m, n, k, rows, cluster):
    rules = json.loads((hopper.FOLDER / "hopper.json").read_text())["linear_4bit"]
    monkeypatch.setattr(hopper, "_rules", lambda device: (rules, 132))
    hopper.choose_config.cache_clear()
    config = hopper.choose_config(0, m, sum(n), k, n)
    hopper.choose_config.cache_clear()
    assert config.valid() and (config.rows, config.cluster) == (rows, cluster)
    if m <= 64:
        assert sum(-(-count // rows) for count in n) * cluster <= 132


def test_a_thread_without_a_context_takes_torchs(driver, monkeypatch):
    """The driver answers 201 in a thread in which torch has not used the GPU yet."""
    start, answers, calls = driver.cuLaunchKernelEx, [201], []

    def launch(*arguments):
        return answers.pop() if answers else start(*arguments)

    def retain(context, device):
        context._obj.value = 5
        return 0

    driver.cuLaunchKernelEx = type("Launch", (), {"__call__": staticmethod(launch)})()
    driver.cuDeviceGet = lambda device, index: calls.append(("device", index)) or 0
    driver.cuDevicePrimaryCtxRetain = retain
    driver.cuCtxSetCurrent = lambda context: calls.append(("current", context.value)) or 0
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    x, weight = torch.zeros(1, 128, dtype=torch.bfloat16), torch.zeros(128, 64, dtype=torch.uint8)
    hopper.linear_4bit(x, weight, torch.zeros(128, 2), None, None, None, "nf4", 64, 128)
    assert calls == [("device", 3), ("current", 5)] and len(driver.launches) == 1


def test_a_change_of_tensors_between_calls_is_seen(driver):
    n, k = 128, 256
    weights = [torch.zeros(n, k // 2, dtype=torch.uint8) for _ in range(2)]
    inputs = [torch.zeros(2, 3, k, dtype=torch.float16), torch.zeros(6, 2 * k, dtype=torch.float16)[:, :k]]
    absmax = torch.zeros(n, k // 128)
    for x in inputs:
        for weight in weights:
            out = hopper.linear_4bit(x, weight, absmax, None, None, None, "fp4", 128, n)
            values = driver.launches[-1][2]
            assert (values["map_w"], values["map_x"]) == (weight.data_ptr(), x.data_ptr())
            assert values["out"] == out.data_ptr() and out.shape == (*x.shape[:-1], n) and values["block_shift"] == 7


def test_rows_of_experts(driver):
    e, n, k = 4, 256, 512
    weight = torch.zeros(e, n, k // 2, dtype=torch.uint8)
    offsets = torch.tensor([3, 3, 10, 20], dtype=torch.int32)
    x = torch.zeros(20, k, dtype=torch.bfloat16)
    hopper.linear_4bit(x, weight, torch.zeros(e, n, 8), None, None, None, "nf4", 64, n, offsets=offsets)
    grid, _, values = driver.launches[-1]
    assert (values["offsets"], values["experts"], values["m"], values["n"]) == (offsets.data_ptr(), e, 20, n)
    tiles = sum(-(-rows // 8) for rows in (3, 0, 7, 10, 0))
    assert grid[0] == n // 128 and tiles <= grid[1] <= 20


@pytest.mark.parametrize("shared_tiles", [0, 3])
@pytest.mark.parametrize("bits", [8, 4])
def test_products_of_many_tokens(driver, monkeypatch, bits, shared_tiles):
    """Weights of 4 and of 8 bits start one kernel. It finds its flags behind the sums of tiles that are cut."""
    launches = []

    def launch(config, function, pointers, extra):
        fields = linear_wide._Arguments._fields_
        found = {name: kind.from_address(pointer) for (name, kind), pointer in zip(fields, pointers, strict=True)}
        maps = {name: value.words[0] for name, value in found.items() if name.startswith("map")}
        plain = {name: value.value for name, value in found.items() if not name.startswith("map")}
        launches.append((tuple(config._obj.grid), config._obj.stream, {**maps, **plain}))
        return 0

    driver.cuLaunchKernelEx = type("Launch", (), {"__call__": staticmethod(launch)})()
    wide = linear_8bit_wide if bits == 8 else linear_4bit_wide
    monkeypatch.setattr(compiler, "cubin", lambda *settings: b"")
    monkeypatch.setattr(compiler, "load", lambda *code: ctypes.c_void_p(1))
    monkeypatch.setattr(wide, "schedule", lambda *sizes: Schedule(5, shared_tiles))
    properties = type("Properties", (), {"multi_processor_count": 132})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(wide, "_load", wide._load.__wrapped__)
    wide._plan.cache_clear()
    m, n, k = 200, 512, 1024
    x, bias = torch.zeros(2, m // 2, k, dtype=torch.bfloat16), torch.zeros(n, dtype=torch.bfloat16)
    if bits == 8:
        weight, scales = torch.zeros(n, k, dtype=torch.int8), (torch.zeros(n), None, None)
    else:
        weight = torch.zeros(n, k // 2, dtype=torch.uint8)
        scales = torch.zeros(n, k // 128, dtype=torch.uint8), torch.zeros(16), torch.zeros(1)
    for b in (bias, None, None):  # the later calls find everything prepared
        if bits == 8:
            out = wide.linear_8bit(x, weight, scales[0], b)
        else:
            out = wide.linear_4bit(x, weight, *scales, b, "nf4", 128, n)
        assert out.shape == (2, m // 2, n) and out.dtype == x.dtype
        grid, stream, values = launches[-1]
        assert grid == (10, 1, 1) and stream == 77
        address = [None if t is None else t.data_ptr() for t in (*scales, b, out)]
        assert [values[name] for name in ("absmax", "nested_absmax", "offset", "bias", "out")] == address
        sizes = [values[name] for name in ("m", "n", "k", "block_shift", "shared_tiles")]
        assert sizes == [m, n, k, 0 if bits == 8 else 7, shared_tiles]
        assert (values["map_w"], values["map_x"]) == (weight.data_ptr(), x.data_ptr())
        if shared_tiles:  # 224 tokens a tile
            assert values["workspace"] and values["flags"] - values["workspace"] == 5 * 256 * 224 * 4
        else:
            assert (values["workspace"], values["flags"]) == (None, None)
    wide._plan.cache_clear()
    assert len({values["launch"] for _, _, values in launches}) == 3  # no two launches share a mark


def test_weights_that_share_an_input(driver, monkeypatch):
    launches = []

    def launch(config, function, pointers, extra):
        fields = group._structures(3)[1]._fields_
        found = {name: kind.from_address(pointer) for (name, kind), pointer in zip(fields, pointers, strict=True)}
        weights = [{name: getattr(w, name) for name, _ in group._Weight._fields_} for w in found["weights"].weight]
        for weight in weights:
            weight["map_w"] = weight["map_w"].words[0]
        sizes = [found[name].value for name in ("m", "k", "block_shift")]
        launches.append((tuple(config._obj.grid), config._obj.stream, weights, found["map_x"].words[0], sizes))
        launches[-1] += (list(found["outs"]),)
        return 0

    def load(device, config, name, dtype, nested, count):
        arguments = group._structures(count)[1]
        return compiler.Launcher(ctypes.c_void_p(1), arguments, config.threads, config.shared_bytes)

    driver.cuLaunchKernelEx = type("Launch", (), {"__call__": staticmethod(launch)})()
    monkeypatch.setattr(group, "_load_4bit", load)
    group._plan_4bit.cache_clear(), group._describe.cache_clear()
    assert ctypes.sizeof(group._Weight) % 64 == 0  # as the compiler lays out an array of them
    k, n = 256, [300, 128, 64]
    x = torch.zeros(2, 5, k, dtype=torch.bfloat16)
    weights = [torch.zeros(rows, k // 2, dtype=torch.uint8) for rows in n]
    absmax = [torch.zeros(rows, k // 64, dtype=torch.uint8) for rows in n]
    nested, offset = [torch.zeros(5) for _ in n], [torch.zeros(1) for _ in n]
    bias = [torch.zeros(300, dtype=torch.bfloat16), None, None]
    for _ in range(2):  # the second call finds everything prepared
        outs = group.linear_4bit_group(x, weights, absmax, nested, offset, bias, "nf4", 64, n)
    group._plan_4bit.cache_clear(), group._describe.cache_clear()
    grid, stream, described, map_x, sizes, addresses = launches[-1]
    assert grid == (3 + 1 + 1, 2, 2) and stream == 77  # 128 rows and 8 tokens a tile, K split in 2
    assert [out.shape for out in outs] == [(2, 5, rows) for rows in n]
    assert addresses == [out.data_ptr() for out in outs]
    assert sizes == [10, k, 6] and map_x == x.data_ptr()
    assert [w["first_tile"] for w in described] == [0, 3, 4] and [w["n"] for w in described] == n
    for name, tensors in {"map_w": weights, "absmax": absmax, "nested_absmax": nested, "offset": offset}.items():
        assert [w[name] for w in described] == [t.data_ptr() for t in tensors]
    assert [w["bias"] for w in described] == [bias[0].data_ptr(), None, None]
