"""The drop-in's optimizers, the manager of their overrides, and utilities that walk over a model."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from kbit.integrations.bitsandbytes import optim
from kbit.integrations.bitsandbytes.embedding import (
    StableEmbedding,
)
from kbit.integrations.bitsandbytes.linear import LinearNF4
from kbit.integrations.bitsandbytes.optim_manager import GlobalOptimManager
from kbit.integrations.bitsandbytes.utils import OutlierTracer, find_outlier_dims, is_on_gpu, replace_linear

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


def test_a_refused_override_loses_none() -> None:
    refused, kept = (nn.Parameter(torch.randn(8192)) for _ in range(2))
    manager = GlobalOptimManager.get_instance()
    manager.override_config(refused, "optim_bits", 7)
    manager.override_config(kept, "optim_bits", 32)
    opt = optim.AdamW8bit([refused, kept])
    for p in (refused, kept):
        p.grad = torch.ones_like(p)
    for _ in range(2):
        with pytest.raises(ValueError, match="optim_bits"):
            opt.step()
    manager.override_config(refused, "optim_bits", 8)
    opt.step()
    assert opt.state[refused]["exp_avg"].dtype == torch.uint8
    assert opt.state[kept]["exp_avg"].dtype == torch.float32


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
def test_an_override_survives_the_move_to_the_gpu() -> None:
    model = nn.Linear(64, 64)
    GlobalOptimManager.get_instance().override_config(model.weight, "optim_bits", 32)
    optimizer = optim.PagedAdamW8bit(model.cuda().parameters(), lr=0.1)
    model(torch.randn(2, 64, device="cuda")).sum().backward()
    optimizer.step()
    assert torch.uint8 not in {t.dtype for t in optimizer.state[model.weight].values()}
