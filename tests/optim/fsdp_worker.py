"""One rank of test_fsdp.py: `python fsdp_worker.py RANK WORLD PORT FOLDER train|load`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import kbit.optim as optim


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    # Rows of whole blocks, rows that are none, and small biases; rows that 2 and 3 ranks share unevenly.
    return torch.nn.Sequential(torch.nn.Linear(512, 41), torch.nn.Linear(100, 61))


def steps(net: torch.nn.Module, optimizer: torch.optim.Optimizer, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for p in net.parameters():
            g = torch.randn(p.shape, generator=generator).to(p.dtype)
            p.grad = distribute_tensor(g, p.device_mesh, p.placements) if isinstance(p, DTensor) else g
        optimizer.step()


def full(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def collect(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Whole parameters and states by name."""
    out = {f"p.{name}": full(p.detach()).clone() for name, p in net.named_parameters()}
    state = get_optimizer_state_dict(net, optimizer)["state"]
    for name, values in state.items():
        out |= {f"{name}.{key}": full(v).clone() for key, v in values.items()}
    return out


def whole_compensation_is_cut_like_its_parameter(mesh: DeviceMesh) -> None:
    net = torch.nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    fully_shard(net, mesh=mesh)
    optimizer = optim.AdamW32bit(net.parameters(), kahan=True)
    steps(net, optimizer, 2, seed=3)
    saved = optimizer.state_dict()
    saved["state"] = {0: {key: full(value) for key, value in saved["state"][0].items()}}
    loaded = optim.AdamW32bit(net.parameters(), kahan=True)
    loaded.load_state_dict(saved)
    mine, theirs = (o.state[net.weight]["compensation"] for o in (loaded, optimizer))
    assert isinstance(mine, DTensor) and torch.equal(mine.to_local(), theirs.to_local())


def main() -> None:
    rank, world, port, folder, what = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), sys.argv[5]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    net = model()
    fully_shard(net, mesh=mesh)
    optimizer = optim.AdamW8bit(net.parameters(), lr=0.01)
    if what == "train":
        steps(net, optimizer, 3, seed=1)
        for p in net.parameters():
            values = optimizer.state[p]["exp_avg"]
            assert isinstance(values, DTensor) and values.shape == p.shape
            assert (values.dtype == torch.uint8) == (p.numel() >= 4096)
        state = {"optimizer": get_optimizer_state_dict(net, optimizer)}
        dcp.save(state, checkpoint_id=folder / "checkpoint")
        out = collect(net, optimizer)
        steps(net, optimizer, 2, seed=2)
        out |= {"after." + k: v for k, v in collect(net, optimizer).items()}
        if rank == 0:
            torch.save(out, folder / "trained.pt")
        whole_compensation_is_cut_like_its_parameter(mesh)
    else:
        trained = torch.load(folder / "trained.pt", weights_only=True)
        for name, p in net.named_parameters():
            p.data.copy_(distribute_tensor(trained["p." + name], p.device_mesh, p.placements))
        state = {"optimizer": get_optimizer_state_dict(net, optimizer)}
        dcp.load(state, checkpoint_id=folder / "checkpoint")
        set_optimizer_state_dict(net, optimizer, state["optimizer"])
        for name, p in net.named_parameters():
            p.data.copy_(distribute_tensor(trained["p." + name], p.device_mesh, p.placements))
        out = collect(net, optimizer)
        steps(net, optimizer, 2, seed=2)
        out |= {"after." + k: v for k, v in collect(net, optimizer).items()}
        if rank == 0:
            torch.save(out, folder / f"loaded-{world}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
