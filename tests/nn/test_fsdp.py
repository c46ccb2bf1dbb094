"""FSDP2 on two gloo processes: codes and scales shard along rows and gather again, bit for bit."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.nn.helpers import linear

# 7 and 5 rows do not divide by two.
CASES = [("nf4", 6), ("nf4-plain", 7), ("int8", 5)]


def check(label: str, rows: int) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.manual_seed(0)
    layer = linear(label, rows, 128)
    before: dict[str, Tensor] = {name: p.detach().clone() for name, p in layer.named_parameters()}
    x = torch.randn(5, 128).bfloat16().requires_grad_()
    expected = layer(x).detach()
    model = fully_shard(nn.Sequential(layer), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    assert model[0].weight.to_local().shape[0] in (rows // 2, rows - rows // 2)
    out = model(x)  # the bf16 policy casts what is floating point: codes and scales are not
    assert torch.equal(out, expected)
    out.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    for name, parameter in model[0].named_parameters():
        full = parameter.full_tensor()
        assert full.dtype == before[name].dtype and torch.equal(full, before[name]), name


def check_load(label: str, rows: int, rank: int) -> None:
    """A whole state dict, given to every rank or to the first alone, loads into sharded layers."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(1)
    whole = nn.Sequential(linear(label, rows, 128))
    state = {name: tensor.detach().clone() for name, tensor in whole.state_dict().items()}
    for from_rank_0 in (True, False):
        model = fully_shard(nn.Sequential(linear(label, rows, 128)))
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=from_rank_0)
        set_model_state_dict(model, dict(state) if rank == 0 or not from_rank_0 else {}, options=options)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.full_tensor(), state[name]), name


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        dist.init_device_mesh("cpu", (2,))
        for case in CASES:
            check(*case)
            check_load(*case, rank)
        torch.save(True, f"{folder}/{rank}")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo")
def test_shards_and_gathers_to_the_bit(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.start_processes(worker, (port, str(tmp_path)), nprocs=2, start_method="spawn")
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}
