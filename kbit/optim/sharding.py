"""Sharded parameters (FSDP2): states are DTensors with the parameter's logical shape and placements.

A rank steps its own part, with the same kernels. Whether states have 8 bits is decided by the full size. Block scales
of parameters whose rows are whole blocks of 256 are DTensors too, sharded with the rows: numerics equal the unsharded
optimizer's, and checkpoints reshard to any number of ranks. Where rows are not whole blocks, blocks run over each
rank's own elements, and `state_dict` holds the decoded fp32 values instead of codes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def is_sharded(x: Any) -> bool:
    """Whether a tensor is a DTensor. Does not import torch.distributed.tensor: without it there is none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def local(x: Tensor) -> Tensor:
    """This rank's part of a tensor; the tensor itself where it is not sharded. Without autograd."""
    if not is_sharded(x):
        return x.detach()
    part: Tensor = x.detach().to_local()  # type: ignore[attr-defined]
    return part


def wrap(part: Tensor, like: Tensor, shape: Sequence[int]) -> Tensor:
    """A DTensor of logical `shape`, sharded as `like`, from this rank's part; the part where `like` is not sharded.

    Raises NotImplementedError for placements other than replicated and sharded along dimension 0.
    """
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    check(like)
    stride = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    wrapped: Tensor = DTensor.from_local(
        part,
        like.device_mesh,  # type: ignore[attr-defined]
        like.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=torch.Size(shape),
        stride=tuple(stride),
    )
    return wrapped


def check(p: Tensor) -> None:
    """Raise NotImplementedError for a sharding that optimizers here do not know."""
    for placement in p.placements:  # type: ignore[attr-defined]
        if not (placement.is_replicate() or placement.is_shard(0)):
            raise NotImplementedError(
                f"a parameter of shape {tuple(p.shape)} is placed {placement}; optimizers here know replicated "
                "parameters and those sharded along dimension 0 (FSDP2's way)"
            )


def distribute(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor cut like `like` (rows go with rows); a DTensor, or a tensor for an unsharded `like`, as it is."""
    if is_sharded(value) or not is_sharded(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(value.to(like.device), mesh, placements)
