"""Loading a state dict into 4-bit layers that FSDP2 has sharded.

Their codes are a DTensor, their scales lie beside it on every rank and are no Parameters. What
`torch.distributed.checkpoint.state_dict.set_model_state_dict` hands to a module depends on its options: with
`broadcast_from_rank0` it writes the codes into the DTensor in place, and the scales stay on rank 0.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kbit.checkpoint import bnb
from kbit.integrations.bitsandbytes.quant_state import QuantState


def is_sharded(weight: Any) -> bool:
    """Whether `weight` is a DTensor, which is what FSDP2 puts in the place of a Parameter."""
    if not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(weight, DTensor)


def parts_of_every_rank(name: str, packed: Tensor, parts: dict[str, Any], weight: Any) -> dict[str, Any]:
    """The scales and metadata of the weight `name`: `parts`, or those of rank 0 where only rank 0 was given them.

    Every rank calls this, since the very Parameter in the state dict is how `broadcast_from_rank0` shows.
    ValueError where a rank has none and cannot know whether rank 0 has.
    """
    if packed is weight:
        box = [{key: value.cpu() for key, value in parts.items()} if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(box, src=0)
        parts = box[0] or {}
    if not parts:
        raise ValueError(
            f"{name} holds packed 4-bit codes without their state ({name}.absmax and so on): give every rank the whole "
            "state dict, with StateDictOptions(full_state_dict=True, broadcast_from_rank0=False)"
        )
    return parts


def load_sharded(module: Any, name: str, packed: Tensor, parts: dict[str, Any]) -> None:
    """Take over the state in `parts`; `packed` is the DTensor of its codes, which loading copies into the layer's.

    ValueError where they do not fit each other or the layer, or where the layer was never quantized; with
    `broadcast_from_rank0` torch has written the codes by then, so the model has to be loaded anew.
    """
    weight = module.weight
    parts = parts_of_every_rank(name, packed, parts, weight)  # first: no rank may wait for one that raised
    if module.quant_state is None:
        raise ValueError(
            f"{name} is sharded but was never quantized, so there is no place for its codes: move the model to a "
            "device before fully_shard, or load the state dict before sharding"
        )
    if not is_sharded(packed):
        raise ValueError(
            f"{name} is sharded, but its codes in the state dict are whole: load it with "
            "torch.distributed.checkpoint.state_dict.set_model_state_dict and full_state_dict=True"
        )
    meta = bnb.read_metadata(name, parts)
    whole = torch.empty(packed.shape, dtype=packed.dtype, device="meta")
    bnb.check_parts(name, meta, {**parts, "weight": whole})
    if tuple(meta.shape) != module.weight_shape:
        raise ValueError(f"{name} is a quantized {list(meta.shape)}, but this layer needs {list(module.weight_shape)}")
    if packed.shape != weight.shape or packed.dtype != weight.dtype:
        raise ValueError(
            f"{name} is {packed.dtype} {list(packed.shape)}, this layer's codes are {weight.dtype} "
            f"{list(weight.shape)}: make the layers with the quant_storage of the checkpoint"
        )
    state = QuantState.from_dict(parts, device=weight.to_local().device)
    module.quant_state = state
    if getattr(weight, "quant_state", None) is not None:
        weight.quant_state = state
