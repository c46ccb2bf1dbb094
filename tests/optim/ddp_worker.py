"""One rank of test_ddp.py: `python ddp_worker.py RANK WORLD PORT FOLDER`. Also what the test compares with."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import kbit.optim as optim

ROWS = 16


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 100), torch.nn.Tanh(), torch.nn.Linear(100, 8))


def train(net: torch.nn.Module, rank: int, world: int) -> torch.optim.Optimizer:
    """Four steps, each on this rank's rows of the batch; the rank that trains alone takes all."""
    optimizer = optim.AdamW8bit(net.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        x = torch.randn(ROWS, 64, generator=generator)
        optimizer.zero_grad()
        net(x[rank * ROWS // world : (rank + 1) * ROWS // world]).square().mean().backward()
        optimizer.step()
    return optimizer


def main() -> None:
    rank, world, port, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    net = model()
    optimizer = train(DistributedDataParallel(net), rank, world)
    saved = {"parameters": list(net.parameters()), "optimizer": optimizer.state_dict()}
    torch.save(saved, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
