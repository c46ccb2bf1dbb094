"""What only a GPU can show: one launch, no synchronisation, CUDA graphs, states larger than its memory."""

from __future__ import annotations

import gc

import pytest
import torch

import kbit.optim as optim
from kbit.formats.codebooks import codebook

pytestmark = pytest.mark.gpu


def tensors(sizes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(n, generator=generator).to("cuda", dtype)) for n in sizes]


def give_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * 0.1).to(p)


def results(params, optimizer):
    return [p.detach().cpu() for p in params] + [v.cpu() for p in params for v in optimizer.state[p].values()]


@pytest.mark.parametrize("kind", ["AdamW8bit", "AdamW32bit", "Lion8bit", "AdEMAMix8bit", "RMSprop8bit", "Adagrad8bit"])
def test_one_launch_for_all_tensors_and_no_synchronisation(kind):
    from torch.profiler import ProfilerActivity, profile

    params = tensors([5000 + 3 * n for n in range(60)])
    optimizer = getattr(optim, kind)(params, lr=1e-3)
    optimizer.backend = "cuda"
    give_gradients(params, 1)
    for _ in range(2):
        optimizer.step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        torch.cuda.set_sync_debug_mode("error")
        optimizer.step()
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    launches = {event.key: event.count for event in profiler.key_averages() if event.device_time_total > 0}
    assert sum(launches.values()) == 1, launches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_equal_the_cpus(dtype):
    """AdamW's and Lion's states depend on gradients alone: codes and scales are those of the compiled CPU step."""
    for kind in (optim.AdamW8bit, optim.Lion8bit):
        params = tensors([100_000, 4999], dtype)
        twins = [torch.nn.Parameter(p.detach().cpu()) for p in params]
        there, here = kind(params, lr=1e-3), kind(twins, lr=1e-3)
        for step in range(5):
            give_gradients(params, step)
            give_gradients(twins, step)
            there.step()
            here.step()
        for p, q in zip(params, twins, strict=True):
            for name, value in here.state[q].items():
                mine = there.state[p][name].cpu()
                values = codebook("dynamic8" if "sq" not in name else "dynamic8-unsigned")
                apart_at_most = 2 * values.diff().max().item()
                # Where two codes are equally near, either may be chosen; gradients in bf16 meet such values. A later
                # gradient may bring such a sum close to zero, where the map is dense, or make it its block's largest:
                # the values stay a step or two of the map apart (a step is at most 0.9 / 64 of absmax, unsigned half).
                if value.dtype != torch.uint8:
                    far = (mine - value).abs() > 1e-5 * value.abs()
                    assert far.sum() <= (0 if dtype == torch.float32 else 1 + value.numel() // 100), (kind, name)
                    torch.testing.assert_close(mine, value, rtol=apart_at_most, atol=0)
                    continue
                apart = (mine.int() - value.int()).abs()
                far = (values[mine.long()] - values[value.long()]).abs()
                assert (far[apart > 1] <= apart_at_most).all(), (kind, name, far.max())
                assert (apart > 0).sum() <= 1 + value.numel() // (10_000 if dtype == torch.float32 else 300)
            torch.testing.assert_close(p.detach().cpu(), q.detach(), rtol=1e-2, atol=1e-3)


def test_captured_step_equals_the_eager_one_and_follows_the_learning_rate():
    runs = []
    for captured in (False, True):
        params = tensors([70_000, 300, 4097], torch.bfloat16)
        for p in params:
            p.grad = torch.zeros_like(p)
        lr = torch.tensor(0.0, device="cuda")
        optimizer = optim.AdamW8bit(params, lr=lr, weight_decay=0.1)
        optimizer.step()
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                optimizer.step()
        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            for p in params:
                p.grad.copy_(torch.randn(p.shape, generator=generator))
            lr.fill_(0.01 / (step + 1))
            if captured:
                graph.replay()
            else:
                optimizer.step()
        runs.append(results(params, optimizer))
        assert all(int(optimizer.state[p]["step"]) == 5 for p in params)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("bits", [8, 32])
def test_states_larger_than_the_memory_left_page_and_change_nothing(bits):
    """The same steps unpaged, unpaged without room (which fails), and paged in that little room."""
    count, size = 6, 2**24
    params = tensors([size] * count, torch.bfloat16)
    start = [p.detach().clone() for p in params]
    give_gradients(params, 1)

    def run(kind):
        with torch.no_grad():
            for p, before in zip(params, start, strict=True):
                p.copy_(before)
        optimizer = kind(params, lr=1e-3, optim_bits=bits, min_8bit_size=1)
        for _ in range(3):
            optimizer.step()
        torch.cuda.synchronize()
        out = results(params, optimizer)
        del optimizer
        gc.collect()
        torch.cuda.empty_cache()
        return out

    unpaged = run(optim.AdamW)
    states = count * size * 2 * bits // 8
    total = torch.cuda.get_device_properties(0).total_memory
    room = torch.cuda.memory_reserved() + 160 * 2**20  # the two staging buffers, and little more
    assert states > 160 * 2**20
    torch.cuda.set_per_process_memory_fraction(room / total)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            run(optim.AdamW)
        gc.collect()
        torch.cuda.empty_cache()
        paged = run(optim.PagedAdamW)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    for a, b in zip(unpaged, paged, strict=True):
        assert torch.equal(a, b)


def test_1782_1785_2067_more_than_two_to_the_31_elements():
    if torch.cuda.get_device_properties(0).total_memory < 30 * 2**30:
        pytest.skip("needs a GPU with 30 GB")
    count = 2**31 + 1000
    p = torch.nn.Parameter(torch.zeros(count, dtype=torch.bfloat16, device="cuda"))
    p.grad = torch.zeros_like(p)
    ends = [0, 2**30 + 5, 2**31 - 1, 2**31, count - 1]
    for index, at in enumerate(ends):
        p.grad[at] = index + 1.0
    optimizer = optim.Lion8bit([p], lr=0.5)
    optimizer.step()
    moved = p.detach().nonzero().view(-1)
    assert moved.tolist() == ends and (p.detach()[moved] == -0.5).all()
    state = optimizer.state[p]
    assert (state["exp_avg"] != 127).nonzero().view(-1).tolist() == ends
    assert state["exp_avg_absmax"].nonzero().numel() == len({at // 256 for at in ends})


def test_2052_the_step_runs_on_the_current_stream():
    """Gradients that a side stream writes late are waited for, and so is the step by what follows on that stream."""
    runs = []
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        params = tensors([50_000, 3000])
        optimizer = optim.AdamW8bit(params, lr=0.01)
        give_gradients(params, 1)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for step in range(3):
                torch.cuda._sleep(20_000_000)
                for p in params:
                    p.grad.fill_(0.5 + step).mul_(p.detach())
                optimizer.step()
                for p in params:
                    p.grad.zero_()
        stream.synchronize()
        runs.append(results(params, optimizer))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_unusual_settings_take_the_cuda_step_too():
    """Weight decay of both kinds, rates as fp64 and bf16 tensors, groups, odd sizes: as the plain rules."""
    for kind, settings in (
        (optim.Adam, {"weight_decay": 0.1, "lr": torch.tensor(0.01, device="cuda", dtype=torch.float64)}),
        (optim.AdamW, {"weight_decay": 0.1, "lr": torch.tensor(2.0**-6, device="cuda", dtype=torch.bfloat16)}),
        (optim.AdamW, {"eps": 0.0, "lr": 0.01}),
        (optim.SGD, {"lr": 0.1}),
    ):
        runs = []
        for backend in ("cuda", "torch"):
            params = tensors([10_001, 1, 255, 256, 257])
            optimizer = kind(params, optim_bits=8, min_8bit_size=1, **settings)
            optimizer.backend = backend
            for step in range(2):
                give_gradients(params, step)
                optimizer.step()
            runs.append([p.detach() for p in params])
        for a, b in zip(*runs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_paging_survives_resume():
    """A loaded paged optimizer pages on (pinned host memory), and continues as the one that was saved, to the bit."""
    params = tensors([300_000, 5000])
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    first = optim.PagedAdamW8bit(params, lr=0.01)
    give_gradients(params, 1)
    first.step()
    second = optim.PagedAdamW8bit(twins, lr=0.01)
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        for p, q in zip(params, twins, strict=True):
            q.copy_(p)
    state = second.state[twins[0]]["exp_avg"]
    assert state.device.type == "cpu" and state.is_pinned()
    assert second.state[twins[1]]["exp_avg"].is_cuda  # too small to page
    for optimizer, own in ((first, params), (second, twins)):
        give_gradients(own, 2)
        optimizer.step()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results(params, first), results(twins, second), strict=True))
