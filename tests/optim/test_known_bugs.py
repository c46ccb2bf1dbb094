"""One test for each bug of other implementations that this one must not have; #1 is a thread of bitsandbytes."""

from __future__ import annotations

import pytest
import torch

import kbit.optim as optim

BACKENDS = ("torch", "native")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["AdamW", "AdEMAMix", "Lion"])
def test_decay_comes_before_the_update_and_bf16_rounds_once(name, backend):
    """#2010. p * (1 - lr * decay) - lr * u: with decay 1 / lr the old value vanishes, the update is not scaled."""
    p = torch.nn.Parameter(torch.randn(300).bfloat16())
    optimizer = getattr(optim, name)([p], lr=0.25, weight_decay=4.0)
    optimizer.backend = backend
    p.grad = torch.randn(300).bfloat16().clamp(min=0.1)
    expected = 1.0 + 5.0 * (1 - 0.9999) if name == "AdEMAMix" else 1.0
    if name == "AdEMAMix":  # the slow average is not bias-corrected: alpha * (1 - b3) * g / |g|
        expected = 1.0 + 5.0 * 1e-4
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((300,), -0.25 * expected, dtype=torch.bfloat16))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["Lion", "Lion8bit"])
def test_decay_of_lion_is_decoupled(form, backend):
    """#1992. Decay must not enter the sign or the momentum."""
    p = torch.nn.Parameter(torch.full((5000,), 100.0))
    optimizer = getattr(optim, form)([p], lr=0.01, weight_decay=1.0)
    optimizer.backend = backend
    p.grad = torch.full_like(p, -1.0)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((5000,), 100.0 * 0.99 + 0.01))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["LAMB", "LAMB8bit", "LARS", "LARS8bit"])
def test_max_unorm_is_obeyed(form, backend):
    """#1998. A step moves the parameter by no more than that share of its norm."""
    moves = []
    for cap in (1.0, 0.1):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(5000))
        before = p.detach().clone()
        extra = {"momentum": 0.9} if "LARS" in form else {}
        optimizer = getattr(optim, form)([p], lr=1.0, max_unorm=cap, **extra)
        optimizer.backend = backend
        p.grad = torch.randn(5000) * 100
        optimizer.step()
        moves.append(((p.detach() - before).norm() / before.norm()).item())
    assert moves[0] == pytest.approx(1.0, rel=1e-4) and moves[1] == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize("form", ["AdEMAMix", "AdEMAMix8bit", "AdEMAMix32bit"])
def test_ademamix_resumes_without_nan(form):
    """#1382, #1861. Loading cast block scales and states to the parameter's dtype; schedules restarted."""
    runs = []
    for resume in (False, True):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(5000).half())
        optimizer = getattr(optim, form)([p], t_alpha=10, t_beta3=10)
        for step in range(6):
            if resume and step == 3:
                saved = optimizer.state_dict()
                optimizer = getattr(optim, form)([p], t_alpha=10, t_beta3=10)
                optimizer.load_state_dict(saved)
            p.grad = torch.randn(5000).half()
            optimizer.step()
        runs.append(p.detach())
    assert torch.isfinite(runs[0]).all() and torch.equal(*runs)


@pytest.mark.parametrize("form", ["AdEMAMix", "AdEMAMix32bit", "AdEMAMix8bit"])
@pytest.mark.parametrize("shape", [(70, 100), (3,), (), (2, 5, 7)])
def test_states_of_ademamix_have_the_parameters_shape(form, shape):
    """#2075. Its two averages are two states, not one of twice the size."""
    p = torch.nn.Parameter(torch.randn(shape))
    optimizer = getattr(optim, form)([p])
    for _ in range(2):
        p.grad = torch.randn(shape)
        optimizer.step()
    for name in ("exp_avg", "exp_avg_slow", "exp_avg_sq"):
        assert optimizer.state[p][name].shape == p.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_partial_last_block_is_its_own(backend):
    """#1884. The last, short block: huge values beyond its end, and in the block before it, must not count."""
    memory = torch.full((1000,), 1e6)
    p = torch.nn.Parameter(memory[:515])
    optimizer = optim.SGD8bit([p], lr=0.0, momentum=0.9, min_8bit_size=1)
    optimizer.backend = backend
    gradient = torch.full((1000,), 1e6)
    gradient[512:515] = torch.tensor([0.5, -0.25, 1.0])
    p.grad = gradient[:515]
    optimizer.step()
    state = optimizer.state[p]
    assert state["momentum_buffer_absmax"].tolist() == [1e6, 1e6, 1.0]
    assert state["momentum_buffer"].shape == (515,)
    assert (memory[515:] == 1e6).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_transposed_gradients_meet_the_right_elements(backend):
    """#1185, #1859, #1996. And the parameter keeps its memory and its views."""
    weight = torch.randn(60, 80)
    p = torch.nn.Parameter(weight.t())
    q = torch.nn.Parameter(weight.t().contiguous())
    g = torch.randn(60, 80)
    for parameter, grad in ((p, g.t()), (q, g.t().contiguous())):
        optimizer = optim.Adam8bit([parameter], lr=0.1, min_8bit_size=1)
        optimizer.backend = backend
        parameter.grad = grad
        optimizer.step()
    assert torch.equal(p, q)
    assert torch.equal(weight.t(), p.detach()), "the parameter was moved away from its storage"


def beside_a_large_gradient(name: str, bits: int, backend: str, factor: float) -> list[torch.Tensor]:
    """Moves, step by step, of 255 elements that share a block with one whose gradients are `factor` times theirs."""
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.ones(256, 16))
    optimizer = getattr(optim, name)([p], lr=0.01, weight_decay=0.0, optim_bits=bits, min_8bit_size=1)
    optimizer.backend = backend
    moves = []
    for _ in range(20):
        before = p.detach().clone()
        p.grad = torch.randn(256, 16, generator=generator)
        p.grad[0, 0] *= factor
        optimizer.step()
        moves.append((p.detach() - before).view(-1)[1:256])
    return moves


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("factor", [1e4, 1e7])
@pytest.mark.parametrize("name", ["AdamW", "AdEMAMix", "LAMB", "RMSprop", "Adagrad"])
def test_a_large_gradient_does_not_throw_its_neighbours(name, factor, backend):
    """Their second moments are too small for a code, but no steps are larger for it: not 2000 times, not 1.1 times."""
    few, many = (beside_a_large_gradient(name, bits, backend, factor) for bits in (8, 32))
    largest = max(move.abs().max() for move in many)
    assert max(move.abs().max() for move in few) < 1.1 * largest
    assert torch.stack(few).sum(0).abs().max() < 1.1 * torch.stack(many).sum(0).abs().max()
    for move, wanted in zip(few, many, strict=True):  # smaller steps, but steps, in the same directions
        assert (move * wanted).sum() > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["AdamW8bit", "AdEMAMix8bit", "RMSprop8bit", "Adagrad8bit"])
def test_rows_without_a_gradient_keep_the_code_of_zero(name, backend):
    """Rows of an embedding share blocks with others; those that were never seen do not move."""
    p = torch.nn.Parameter(torch.randn(100, 64))
    before = p.detach().clone()
    optimizer = getattr(optim, name)([p], lr=0.01, weight_decay=0.0)
    optimizer.backend = backend
    seen = torch.arange(100) % 3 == 0
    for _ in range(5):
        p.grad = torch.randn(100, 64) * 10.0 ** torch.randint(-6, 6, (100, 64)) * seen[:, None]
        optimizer.step()
    squares = next(v for k, v in optimizer.state[p].items() if k in ("exp_avg_sq", "square_avg", "sum"))
    assert (squares[~seen] == 0).all() and (squares[seen] > 0).all()
    assert torch.equal(p.detach()[~seen], before[~seen]) and (p.detach() != before)[seen].any()


def test_paging_survives_resume():
    """#962, #782, #2069. is_paged is the optimizer's, not the checkpoint's: a resumed paged optimizer pages on."""
    p = torch.nn.Parameter(torch.randn(5000))
    plain, paged = optim.AdamW8bit([p]), optim.PagedAdamW8bit([p])
    p.grad = torch.randn(5000)
    plain.step()
    paged.load_state_dict(plain.state_dict())
    assert paged.param_groups[0]["is_paged"]
    plain.load_state_dict(paged.state_dict())
    assert not plain.param_groups[0]["is_paged"]


def test_bits_follow_the_full_size():
    """#2080. Two halves of a parameter, as views, are two parameters; their sum of sizes decides nothing."""
    from kbit.optim.state import wants_8bit

    config = {"optim_bits": 8, "min_8bit_size": 4096}
    assert wants_8bit(4096, config) and not wants_8bit(4095, config)
