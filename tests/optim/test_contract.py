"""torch.optim.Optimizer's contract: groups, closures, state dicts, schedulers, GradScaler, compile."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import weakref

import numpy as np
import pytest
import torch

import kbit.optim as optim
from kbit.formats.blocks import dequantize_dynamic

from .models import model, train

ALL = [name for name in optim.__all__ if name != "KbitOptimizer" and not name.startswith("Muon")]
NEEDED = {"SGD": {"lr": 0.01, "momentum": 0.9}, "LARS": {"lr": 0.01, "momentum": 0.9}}


def settings_of(name: str) -> dict:
    return next((s for key, s in NEEDED.items() if name.startswith(key)), {})


@pytest.mark.parametrize("name", ALL)
def test_resume_is_exact(name, tmp_path):
    """Six steps equal three steps, a save, a load in a new optimizer, and three more, to the bit."""
    straight = model()
    train(straight, opt := getattr(optim, name)(straight.parameters(), **settings_of(name)), 3)
    net = copy.deepcopy(straight)
    torch.save(opt.state_dict(), tmp_path / "optimizer.pt")
    train(straight, opt, 3, seed=1)
    other = getattr(optim, name)(net.parameters(), **settings_of(name))
    other.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    train(net, other, 3, seed=1)
    for a, b in zip(straight.parameters(), net.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(opt.state.values(), other.state.values(), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), key


@pytest.mark.parametrize("name", ALL)
def test_arguments_are_those_of_bitsandbytes(name):
    theirs = pytest.importorskip("bitsandbytes").optim
    reference = inspect.signature(getattr(theirs, name).__init__).parameters
    own = inspect.signature(getattr(optim, name).__init__).parameters
    for key, parameter in reference.items():
        assert key in own, key
        if key not in ("self", "optim_bits"):
            assert own[key].default == parameter.default, key


def test_every_class_of_bitsandbytes_is_here():
    theirs = pytest.importorskip("bitsandbytes").optim
    names = {n for n, c in vars(theirs).items() if inspect.isclass(c)} - {"GlobalOptimManager", "PytorchLARS"}
    assert names <= set(optim.__all__)


def test_bits_follow_the_name_and_the_size():
    for name, bits8 in (("AdamW8bit", True), ("AdamW32bit", False), ("AdamW", False), ("PagedAdamW8bit", True)):
        net = model()
        opt = getattr(optim, name)(net.parameters())
        train(net, opt, 1)
        for p in net.parameters():
            assert (opt.state[p]["exp_avg"].dtype == torch.uint8) == (bits8 and p.numel() >= 4096), name
    assert optim.AdamW(model().parameters(), optim_bits=8).param_groups[0]["optim_bits"] == 8


def test_args_object_of_bitsandbytes():
    class Args:
        optim_bits, min_8bit_size, max_unorm, skip_zeros = 8, 100, 0.5, True

    group = optim.AdamW(model().parameters(), args=Args()).param_groups[0]
    assert (group["optim_bits"], group["min_8bit_size"], group["max_unorm"], group["skip_zeros"]) == (8, 100, 0.5, True)


def test_groups_differ_and_can_be_added():
    net = model()
    first, second = net[0].parameters(), list(net[2].parameters())
    opt = optim.AdamW8bit([{"params": first, "lr": 0.0, "weight_decay": 0.0}], lr=0.1)
    before = [p.detach().clone() for p in net.parameters()]
    train(net, opt, 2)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    opt.add_param_group({"params": second, "min_8bit_size": 1})
    train(net, opt, 2)
    after = list(net.parameters())
    assert torch.equal(before[0], after[0]) and not torch.equal(before[2], after[2])
    assert opt.state[after[3]]["exp_avg"].dtype == torch.uint8


def test_closure_gets_gradients_and_its_loss_is_returned():
    net = model()
    opt = optim.SGD(net.parameters(), lr=0.1)
    x = torch.randn(4, 64)

    def closure():
        opt.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        return loss

    losses = [opt.step(closure).item() for _ in range(3)]
    assert losses[2] < losses[0]
    assert opt.step() is None


def test_parameters_without_gradients_are_left_alone():
    net = model()
    opt = optim.AdamW8bit(net.parameters())
    train(net, opt, 1)
    net[0].weight.grad = None
    before = net[0].weight.detach().clone()
    opt.step()
    assert torch.equal(net[0].weight, before)
    assert [int(opt.state[p]["step"]) for p in net.parameters()] == [1, 2, 2, 2]
    train(net, opt, 1)
    assert [int(opt.state[p]["step"]) for p in net.parameters()] == [2, 3, 3, 3]


def test_scheduler_and_tensor_learning_rate():
    net, other = model(), model()
    opt = optim.AdamW8bit(net.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
    held = optim.AdamW8bit(other.parameters(), lr=torch.tensor(0.1))
    for step in range(3):
        train(net, opt, 1, seed=step)
        schedule.step()
        held.param_groups[0]["lr"].fill_(0.1 * 0.5**step)
        train(other, held, 1, seed=step)
    assert opt.param_groups[0]["lr"] == pytest.approx(0.0125)
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_grad_scaler_skips_a_step_with_infinite_gradients():
    net = model()
    opt = optim.AdamW8bit(net.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = net[0].weight.detach().clone()
    scaler.scale(net(torch.full((2, 64), float("inf"))).sum()).backward()
    scaler.step(opt)
    scaler.update()
    assert torch.equal(net[0].weight, before) and not opt.state
    opt.zero_grad()
    scaler.scale(net(torch.randn(2, 64)).sum()).backward()
    scaler.step(opt)
    assert not torch.equal(net[0].weight, before)


def test_sparse_gradients_are_refused():
    embedding = torch.nn.Embedding(10, 4, sparse=True)
    opt = optim.AdamW8bit(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradients.*sparse=False"):
        opt.step()


def test_step_inside_a_compiled_function():
    net, plain = model(), model()
    compiled_opt, opt = optim.AdamW8bit(net.parameters()), optim.AdamW8bit(plain.parameters())

    @torch.compile(backend="eager")
    def update():
        compiled_opt.step()

    x = torch.randn(4, 64)
    for _ in range(3):
        for m in (net, plain):
            m.zero_grad()
            m(x).square().sum().backward()
        update()
        opt.step()
    for a, b in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


def test_deepcopy_and_pickle_keep_the_state():
    net = model()
    opt = optim.AdamW8bit(net.parameters())
    train(net, opt, 2)
    for twin in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        for p, q in zip(opt.param_groups[0]["params"], twin.param_groups[0]["params"], strict=True):
            assert torch.equal(opt.state[p]["exp_avg"], twin.state[q]["exp_avg"])
            q.grad = torch.ones_like(q)
        twin.step()


def test_optimizer_frees_its_memory():
    net = model()
    opt = optim.AdamW8bit(net.parameters())
    train(net, opt, 1)
    state = weakref.ref(opt.state[net[0].weight]["exp_avg"])
    parameter = weakref.ref(net[0].weight)
    del opt, net
    gc.collect()
    assert state() is None and parameter() is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: optim.AdamW(p, lr=-1.0), "learning rate"),
        (lambda p: optim.AdamW(p, betas=(1.0, 0.9)), "beta parameter at index 0"),
        (lambda p: optim.AdamW(p, betas=(0.9,)), "must have 2 values"),
        (lambda p: optim.AdamW(p, eps=-1.0), "eps"),
        (lambda p: optim.AdamW(p, weight_decay=-1.0), "weight_decay"),
        (lambda p: optim.AdamW(p, optim_bits=4), "optim_bits"),
        (lambda p: optim.AdamW(p, amsgrad=True), "amsgrad"),
        (lambda p: optim.AdamW(p, kahan=True, stochastic_rounding=True), "exclude"),
        (lambda p: optim.SGD(p, lr=0.1, nesterov=True), "nesterov"),
        (lambda p: optim.AdamW([{"params": p, "betas": (0.9, 2.0)}]), "beta parameter at index 1"),
        (lambda p: optim.AdamW(p, lr="a"), "lr='a'"),
        (lambda p: optim.AdamW(p, lr=float("nan")), "lr=nan"),
        (lambda p: optim.AdamW(p, lr=torch.ones(2)), r"shape \(2,\)"),
        (lambda p: optim.AdamW(p, betas="x"), "betas: 'x'"),
        (lambda p: optim.AdamW(p, betas=0.9), "betas: 0.9"),
        (lambda p: optim.AdEMAMix(p, betas=(0.9, 0.999)), "must have 3 values"),
        (lambda p: optim.AdEMAMix(p, t_alpha=-1), "t_alpha"),
        (lambda p: optim.RMSprop(p, alpha=1.0), "alpha"),
        (lambda p: optim.Adagrad(p, lr_decay=-1.0), "lr_decay"),
        (lambda p: optim.AdamW(p, eps=None), "eps: None"),
        (lambda p: optim.AdamW(p, weight_decay="0.1"), "weight_decay: '0.1'"),
        (lambda p: optim.AdamW(p, min_8bit_size=-5), "min_8bit_size"),
        (lambda p: optim.AdamW(p, kahan="yes"), "kahan: 'yes'"),
        (lambda p: optim.SGD([{"params": p, "nesterov": True}], lr=0.1), "nesterov"),
        (lambda p: optim.Muon(p, ns_steps=100), "ns_steps"),
        (lambda p: optim.Muon(p, ns_coefficients=(1.0, 2.0)), "ns_coefficients"),
        (lambda p: optim.Muon(p, adjust_lr_fn="x"), "adjust_lr_fn"),
    ],
)
def test_settings_out_of_range(call, message):
    with pytest.raises(ValueError, match=message):
        call(list(model().parameters()))


@pytest.mark.parametrize(
    ("keyword", "message"),
    [
        ({"percentile_clipping": 5}, "clip_grad_norm_"),
        ({"block_wise": False}, "blocks? of 256"),
        ({"blocksize": 2048}, "blocks? of 256"),
        ({"maximize": True}, "negate"),
        ({"learning_rate": 0.1}, "no argument 'learning_rate'.*lr"),
    ],
)
@pytest.mark.parametrize("form", ["AdamW", "AdamW8bit", "Muon8bit"])
def test_arguments_that_are_not_there(form, keyword, message):
    with pytest.raises(TypeError, match=message):
        getattr(optim, form)([torch.nn.Parameter(torch.ones(2, 2))], **keyword)


def test_betas_as_a_string():
    assert optim.AdamW(model().parameters(), betas="(0.8, 0.95)").param_groups[0]["betas"] == (0.8, 0.95)


def test_load_rejects_what_does_not_fit():
    net = model()
    opt = optim.AdamW8bit(net.parameters())
    train(net, opt, 1)
    good = opt.state_dict()
    with pytest.raises(ValueError, match="parameter groups"):
        optim.AdamW8bit([{"params": [p]} for p in net.parameters()]).load_state_dict(good)
    with pytest.raises(ValueError, match="4 parameters, this optimizer 2"):
        optim.AdamW8bit(net[0].parameters()).load_state_dict(good)
    with pytest.raises(ValueError, match="shape"):
        optim.AdamW8bit([torch.nn.Parameter(torch.ones(7)) for _ in range(4)]).load_state_dict(good)
    with pytest.raises(ValueError, match="not an optimizer state dict"):
        opt.load_state_dict({"model": {}})
    assert torch.equal(opt.state[net[0].weight]["exp_avg"], good["state"][0]["exp_avg"])


FAMILIES = ["Adam", "AdamW", "AdEMAMix", "Lion", "SGD", "LARS", "RMSprop", "Adagrad", "LAMB", "Muon"]


def matrices() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 100, bias=False), torch.nn.Linear(100, 8, bias=False))


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("name", FAMILIES)
def test_states_of_another_algorithm_are_refused(name, steps):
    """Whether they have the same names (Adam and LAMB, SGD and LARS), fewer or more, or none yet."""
    net = matrices()
    source = getattr(optim, f"{name}8bit")(net.parameters(), **(settings_of(name) or {"lr": 0.01}), weight_decay=0.1)
    train(net, source, steps)
    saved = source.state_dict()
    for other in FAMILIES:
        opt = getattr(optim, f"{other}32bit")(matrices().parameters(), **(settings_of(other) or {"lr": 0.02}))
        if other == name:
            opt.load_state_dict(saved)
            assert opt.param_groups[0]["lr"] == 0.01 and len(opt.state) == 2 * steps
            continue
        with pytest.raises(ValueError, match=f"of {name.lower()}, but {other}32bit is {other.lower()}"):
            opt.load_state_dict(saved)
        assert not opt.state and opt.param_groups[0]["lr"] == settings_of(other).get("lr", 0.02)


TORCH = ["Adam", "AdamW", "SGD", "RMSprop", "Adagrad", "NAdam", "RAdam", "Adamax", "Adadelta", "Muon"]


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("name", [name for name in TORCH if hasattr(torch.optim, name)])
def test_checkpoints_of_torch_load_into_the_same_algorithm_alone(name, steps):
    settings = {"lr": 0.01, "weight_decay": 0.1, **({"momentum": 0.9} if name in ("SGD", "RMSprop") else {})}
    net = matrices()
    source = getattr(torch.optim, name)(net.parameters(), **settings)
    train(net, source, steps)
    for other in FAMILIES:
        opt = getattr(optim, f"{other}32bit")(net.parameters(), **(settings_of(other) or {"lr": 0.02}))
        if other != name:
            with pytest.raises(ValueError, match="parameter group 0|state of parameter"):
                opt.load_state_dict(source.state_dict())
            continue
        twin = copy.deepcopy(net)
        theirs = getattr(torch.optim, name)(twin.parameters(), **settings)
        theirs.load_state_dict(source.state_dict())
        opt.load_state_dict(source.state_dict())
        start = copy.deepcopy(net.state_dict())
        train(net, opt, 2, seed=1)
        train(twin, theirs, 2, seed=1)
        for key, value in net.state_dict().items():
            torch.testing.assert_close(value, twin.state_dict()[key], rtol=1e-4, atol=1e-4 if name == "Muon" else 1e-6)
        net.load_state_dict(start)


def test_adam_and_adamw_share_checkpoints_where_nothing_decays():
    net = model()
    source = optim.Adam8bit(net.parameters())
    train(net, source, 2)
    other = optim.AdamW8bit(net.parameters(), weight_decay=0.1)
    other.load_state_dict(source.state_dict())
    assert other.param_groups[0]["weight_decay"] == 0


def test_loads_between_8_and_32_bits_and_from_torch():
    net = model()
    torch_opt = torch.optim.AdamW(net.parameters())
    train(net, torch_opt, 3)
    narrow = optim.AdamW8bit(net.parameters())
    narrow.load_state_dict(torch_opt.state_dict())
    wide = optim.AdamW32bit(net.parameters())
    wide.load_state_dict(narrow.state_dict())
    weight = net[0].weight
    assert torch.equal(wide.state[weight]["exp_avg"], torch_opt.state[weight]["exp_avg"])  # no step, nothing lost
    train(net, narrow, 1)
    assert narrow.state[weight]["exp_avg"].dtype == torch.uint8
    wide.load_state_dict(narrow.state_dict())
    assert wide.state[weight]["exp_avg"].dtype == torch.float32
    assert int(wide.state[weight]["step"]) == 4
    codes = narrow.state[weight]
    decoded = dequantize_dynamic(codes["exp_avg"], codes["exp_avg_absmax"], True, 256, torch.float32)
    assert torch.equal(wide.state[weight]["exp_avg"], decoded)
    train(net, wide, 1)


def test_fp32_states_stay_fp32_for_bf16_parameters_on_load():
    """torch's own load casts states to the parameter's dtype, which damages them."""
    p = torch.nn.Parameter(torch.randn(100).bfloat16())
    opt = optim.AdamW([p])
    p.grad = torch.randn(100).bfloat16()
    opt.step()
    other = optim.AdamW([p])
    other.load_state_dict(opt.state_dict())
    assert other.state[p]["exp_avg"].dtype == torch.float32
    assert torch.equal(other.state[p]["exp_avg_sq"], opt.state[p]["exp_avg_sq"])


def test_what_groups_hold_beside_settings_does_not_make_another_algorithm():
    """A name, and what a scheduler adds, are in the live groups but not in a checkpoint of torch.optim."""
    there = [torch.nn.Parameter(torch.randn(4, 4))]
    saved = torch.optim.AdamW(there, lr=1e-3)
    there[0].grad = torch.ones(4, 4)
    saved.step()
    mine = optim.AdamW([{"params": [torch.nn.Parameter(torch.randn(4, 4))], "name": "decay"}], lr=1e-3)
    torch.optim.lr_scheduler.OneCycleLR(mine, max_lr=0.1, total_steps=10)
    mine.load_state_dict(saved.state_dict())
    assert mine.param_groups[0]["name"] == "decay"


@pytest.mark.parametrize(
    "wrong",
    [{"lr": -1.0}, {"betas": (2.0, 0.9)}, {"eps": float("nan")}, {"weight_decay": "x"}, {"algorithm": ["adamw"]}],
)
def test_settings_of_a_checkpoint_are_checked(wrong):
    optimizer = optim.AdamW8bit([torch.nn.Parameter(torch.randn(4, 4))], lr=1e-3)
    state = optimizer.state_dict()
    state["param_groups"][0].update(wrong)
    with pytest.raises(ValueError, match="parameter group 0"):
        optimizer.load_state_dict(state)
    del state["param_groups"][0]["params"]
    with pytest.raises(ValueError, match="'params'"):
        optimizer.load_state_dict(state)


def test_betas_may_come_from_an_iterator():
    optimizer = optim.AdamW([torch.nn.Parameter(torch.randn(4, 4))], lr=1e-3, betas=iter((0.8, 0.95)))
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.95)


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_are_let_go_after_the_step(backend, transposed):
    """A batch that is kept for the next step must not hold their memory while that step's gradients come."""
    p = torch.nn.Parameter(torch.randn(80, 80))
    opt = optim.AdamW8bit([p])
    opt.backend = backend
    for _ in range(3):
        memory = np.ones((80, 80), dtype=np.float32)
        alive = weakref.ref(memory)
        p.grad = torch.from_numpy(memory).t() if transposed else torch.from_numpy(memory)
        opt.step()
        opt.zero_grad()
        del memory
        gc.collect()
        assert alive() is None


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_states_may_leave_and_come_back_between_steps(backend):
    """Training loops take states off the device while they generate: nothing keeps the old ones, or steps on them."""
    net, plain = model(), model()
    opts = [optim.AdamW8bit(m.parameters()) for m in (net, plain)]
    for opt, m in zip(opts, (net, plain), strict=True):
        opt.backend = backend
        train(m, opt, 3)
    first = weakref.ref(opts[0].state[net[0].weight]["exp_avg"])
    for state in opts[0].state.values():
        for key in state:
            state[key] = state[key].clone()
    gc.collect()
    assert first() is None
    for opt, m in zip(opts, (net, plain), strict=True):
        train(m, opt, 2, seed=1)
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(opts[0].state[p][key], value) for key, value in opts[1].state[q].items())


@pytest.mark.parametrize("change", ["a group is removed", "another parameter", "another group"])
def test_groups_that_are_exchanged_between_steps_count(change):
    a, b, c = (torch.nn.Parameter(torch.zeros(5000)) for _ in range(3))
    opt = optim.AdamW8bit([{"params": [a]}, {"params": [b]}], lr=0.1)
    for _ in range(3):
        for p in (a, b, c):
            p.grad = torch.ones_like(p)
        opt.step()
    before = [p.detach().clone() for p in (a, b, c)]
    if change == "a group is removed":
        opt.param_groups.pop(0)
        moves = (False, True, False)
    elif change == "another parameter":
        opt.param_groups[0]["params"] = [c]
        moves = (False, True, True)
    else:
        opt.param_groups[0] = {**opt.param_groups[0], "lr": 0.0}
        moves = (False, True, False)
    opt.step()
    assert tuple(not torch.equal(p, old) for p, old in zip((a, b, c), before, strict=True)) == moves
