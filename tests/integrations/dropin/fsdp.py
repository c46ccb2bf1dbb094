"""QLoRA under FSDP with bitsandbytes being kbit: one of two gloo ranks. `python fsdp.py RANK PORT fsdp1|fsdp2`.

As in the recipes of PEFT and accelerate: codes stored in bf16 (quant_storage), the dtype of everything else, so that a
block's parameters fit one flat tensor; frozen codes and trained adapters in one wrapped block (use_orig_params).
"""

from __future__ import annotations

import copy
import sys

import bitsandbytes as bnb
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor


class Block(nn.Module):
    """A quantized base with a bias, and an adapter beside it."""

    def __init__(self, quant_type: str, nested: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64, dtype=torch.bfloat16)
        options = {"compute_dtype": torch.bfloat16, "quant_storage": torch.bfloat16, "compress_statistics": nested}
        self.up = bnb.nn.Linear4bit(64, 136, quant_type=quant_type, **options)
        self.down = bnb.nn.Linear4bit(136, 64, bias=False, quant_type=quant_type, **options)
        self.up.bias.data = self.up.bias.data.bfloat16()
        self.a = nn.Linear(64, 4, bias=False, dtype=torch.bfloat16)
        self.b = nn.Linear(4, 136, bias=False, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(torch.nn.functional.silu(self.up(y) + self.b(self.a(y))))


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(Block("nf4", True), Block("fp4", False), Block("nf4", False)).to("cpu")
    for name, p in net.named_parameters():
        p.requires_grad_(".a." in name or ".b." in name)
        if ".b." in name:
            nn.init.normal_(p, std=0.1)
    return net


def full(p: Tensor) -> Tensor:
    return p.full_tensor() if isinstance(p, DTensor) else p


def shard(net: nn.Module, how: str) -> nn.Module:
    if how == "fsdp1":
        return FullyShardedDataParallel(
            net,
            auto_wrap_policy=ModuleWrapPolicy({Block}),
            use_orig_params=True,
            device_id=torch.device("cpu"),
        )
    for block in net:
        fully_shard(block)
    return fully_shard(net)


def adapters(net: nn.Module, how: str) -> dict[str, Tensor]:
    """Whole trained parameters by name."""
    if how == "fsdp1":
        with FullyShardedDataParallel.summon_full_params(net, writeback=False):
            return {clean(n): p.detach().clone() for n, p in net.named_parameters() if p.requires_grad}
    return {n: full(p.detach()).clone() for n, p in net.named_parameters() if p.requires_grad}


def check_state_dict(net: nn.Module, whole: nn.Module, rank: int) -> None:
    """A gathered state dict has every code and scale to the bit, and loads into an unsharded model."""
    options = StateDictOptions(full_state_dict=True)  # torch crashes where FSDP offloads what is on the CPU
    gathered = {clean(key): value for key, value in get_model_state_dict(net, options=options).items()}
    if rank:
        return
    wanted = whole.state_dict()
    assert gathered.keys() == wanted.keys(), gathered.keys() ^ wanted.keys()
    for key, value in wanted.items():
        assert gathered[key].dtype == value.dtype and torch.equal(as_bytes(gathered[key]), as_bytes(value)), key
    again = model()
    again.load_state_dict(gathered)
    x = torch.randn(3, 64).bfloat16()
    assert torch.equal(again(x), whole(x))


def check_load(whole: nn.Module, rank: int, x: Tensor) -> None:
    """A whole state dict loads into sharded layers that hold another model, scales included, on every rank."""
    state = {key: value.detach().clone() for key, value in whole.state_dict().items()}
    for from_rank_0 in (True, False):
        net = shard(model(seed=5), "fsdp2")
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=from_rank_0)
        with torch.no_grad():
            assert not torch.equal(net(x), whole(x))
            set_model_state_dict(net, dict(state) if rank == 0 or not from_rank_0 else {}, options=options)
            assert torch.equal(net(x), whole(x))
    net.load_state_dict({key: value.clone() for key, value in net.state_dict().items()})  # shards into shards
    bare = {key: value for key, value in state.items() if not key.startswith("0.up.weight.")}
    other = {key.replace("0.up", "1.down"): v for key, v in state.items() if key.startswith("0.up.weight.")}
    for damaged, message in ((bare, "without their state"), ({**state, **other}, "1.down.weight")):
        try:
            set_model_state_dict(net, damaged, options=options)
        except RuntimeError as error:
            assert message in str(error), error
        else:
            raise AssertionError("codes with no scales or with those of another layer were loaded")


def as_bytes(t: Tensor) -> Tensor:  # codes that look like NaN are equal to themselves
    return t.detach().reshape(-1).view(torch.uint8)


def clean(name: str) -> str:
    return name.replace("_fsdp_wrapped_module.", "")


def main() -> None:
    rank, port, how = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    whole = model()
    net = shard(copy.deepcopy(whole), how)
    held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in net.parameters())
    everything = sum(p.numel() for p in whole.parameters())
    assert held <= everything * 0.55, (held, everything)

    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(2, 6, 64, generator=generator).bfloat16() for _ in range(3)]
    ours = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.5)
    theirs = torch.optim.SGD([p for p in whole.parameters() if p.requires_grad], lr=0.5)
    for batch in batches:
        with torch.no_grad():
            assert torch.equal(net(batch), whole(batch))  # before and between steps, with the same weights
        net(batch[rank : rank + 1]).square().mean().backward()
        ((whole(batch[:1]).square().mean() + whole(batch[1:]).square().mean()) / 2).backward()
        ours.step(), theirs.step()
        ours.zero_grad(), theirs.zero_grad()
        wanted = {n: p.detach() for n, p in whole.named_parameters() if p.requires_grad}
        found = adapters(net, how)
        assert found.keys() == wanted.keys()
        for name, p in wanted.items():  # one bf16 rounding apart: the mean over ranks is rounded elsewhere
            torch.testing.assert_close(found[name], p, rtol=2**-7, atol=2**-9)
            p.copy_(found[name])
    check_state_dict(net, whole, rank)
    with torch.no_grad():
        assert torch.equal(net(batches[0]), whole(batches[0]))  # gathering has left the layers as they were
    if how == "fsdp2":
        check_load(whole, rank, batches[0])
    dist.destroy_process_group()
    print("done")


if __name__ == "__main__":
    main()
