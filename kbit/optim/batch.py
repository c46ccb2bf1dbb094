"""A batch: tensors of one group that one kernel call can advance, and the ways to advance it."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kbit.optim import rules, state
from kbit.optim.rounding import round_to

TABLE_COLUMNS = 16
#: In the place of an item's gradient between two steps: its memory belongs to the next backward pass.
RELEASED = torch.empty(0)


@dataclass
class Item:
    """One parameter of a batch. Tensors are local (a shard, for a sharded parameter)."""

    p: Tensor
    g: Tensor
    state: dict[str, Any]
    seed: int
    # Where a non-contiguous parameter is copied back to after the step; the parameter itself.
    target: Tensor | None = None
    owner: Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass
class Batch:
    """Items that share device, dtypes, settings and kind of states."""

    name: str  # algorithm, for rules.scalars
    rule: rules.Rule
    config: dict[str, Any]
    bits8: bool
    items: list[Item]
    #: Addresses of parameters and of gradients in this step, where `Look.again` has just read them.
    addresses: tuple[list[int], list[int]] | None = None

    @property
    def kahan(self) -> bool:
        return bool(self.config["kahan"]) and self.items[0].p.dtype in (torch.bfloat16, torch.float16)

    @property
    def stochastic(self) -> bool:
        return bool(self.config["stochastic_rounding"]) and self.items[0].p.dtype == torch.bfloat16

    def kind(self) -> tuple[Any, ...]:
        """What the meaning of a batch's bytes hangs on."""
        item = self.items[0]
        return self.rule, self.bits8, self.kahan, self.stochastic, item.p.dtype, item.g.dtype

    def scalars(self, item: Item) -> rules.Scalars:
        """Scalars of an item's next step; advances its step count. Reads the count on the host."""
        item.state["step"] += 1
        count = int(item.state["step"].item())
        values = rules.scalars(self.name, self.rule, self.config, float(self.config["lr"]), count)
        return values._replace(step=float(count))


class Look:
    """What a batch's tensors were when their addresses were written down, to see whether these still hold.

    Kernels get bare addresses, so nothing may have been freed, replaced or moved. Memory and states that are freed
    say so themselves, by weak references. `again` runs at every step over hundreds of tensors: each line of it is one
    pass in C.
    """

    def __init__(self, batch: Batch) -> None:
        items = batch.items
        self.kind = batch.kind()
        self.owners, self.states = [item.owner for item in items], [item.state for item in items]
        self.names, self.places = list(map(id, _values(self.states))), _places(self.states)
        self.sizes = [item.p.numel() for item in items]
        self.parameters = [item.p.data_ptr() for item in items]
        self.dtypes, self.devices = [items[0].g.dtype] * len(items), [items[0].p.get_device()] * len(items)
        #: Filled when one of the states, or the memory of a state or a parameter, is freed.
        self.freed: list[Any] = []
        tensors = [value for value in _values(self.states) if isinstance(value, Tensor)]
        parameters = [item.p for item in items if item.target is None]  # the rest are copies, new at every step
        memory = (tensor.untyped_storage() for tensor in (*tensors, *parameters))
        self.marks = [weakref.ref(each, self.freed.append) for each in (*tensors, *memory)]

    def again(self, batch: Batch) -> bool:
        """Give the batch, the one looked at, its new gradients; False where it must be built anew."""
        if self.freed or list(map(id, _values(self.states))) != self.names:
            return False
        if self.devices[0] < 0 and _places(self.states) != self.places:  # a CPU's kernel is told all anew
            return False
        try:
            grads: list[Any] = list(map(_GRAD, self.owners))
            addresses = list(map(Tensor.data_ptr, self.owners)), list(map(Tensor.data_ptr, grads))
            unchanged = (
                addresses[0] == self.parameters
                and list(map(Tensor.numel, grads)) == self.sizes
                and list(map(_DTYPE, grads)) == self.dtypes
                and list(map(Tensor.get_device, grads)) == self.devices
                and all(map(Tensor.is_contiguous, self.owners))
                and all(map(Tensor.is_contiguous, grads))
            )
        except (TypeError, RuntimeError):  # no gradient, or a sparse one
            return False
        if unchanged:
            batch.addresses = addresses
            for item, grad in zip(batch.items, grads, strict=True):
                item.g = grad
        return unchanged

    def fits(self, batch: Batch) -> bool:
        """Whether another batch has the same kind and the very same states, which were checked just now."""
        other = batch.items
        return (
            not self.freed
            and self.kind == batch.kind()
            and self.sizes == [item.p.numel() for item in other]
            and _places(item.state for item in other) == self.places
        )


_GRAD, _DTYPE = operator.attrgetter("grad"), operator.attrgetter("dtype")


def _values(states: Iterable[dict[str, Any]]) -> Iterable[Any]:
    return chain.from_iterable(map(dict.values, states))


def _places(states: Iterable[dict[str, Any]]) -> list[int]:
    return [value.data_ptr() for value in _values(states) if isinstance(value, Tensor)]


def choose(batch: Batch) -> str:
    """The fastest way to advance a batch."""
    p, g = batch.items[0].p, batch.items[0].g
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    if p.dtype not in dtypes or g.dtype not in dtypes:
        return "torch"
    if p.is_cuda:
        from kbit.optim.gpu import prefers, triton_available

        if prefers(batch):
            return "cuda"
        return "triton" if triton_available() else "torch"
    if p.device.type == "cpu":
        from kbit.kernels.cpu import optim as native

        return "native" if native.available() else "torch"
    return "torch"


def step_plain(batch: Batch) -> None:
    """Advance a batch with plain torch operations, on any device."""
    for item in batch.items:
        h = batch.scalars(item)
        if item.p.numel() == 0:
            continue
        _step_item(batch, item, h)


def _step_item(batch: Batch, item: Item, h: rules.Scalars) -> None:
    rule, states = batch.rule, item.state
    dtype = torch.float64 if item.p.dtype == torch.float64 else torch.float32
    p, g = item.p.to(dtype), item.g.to(dtype)
    if batch.kahan:
        p = p + states["compensation"].to(dtype)
    drop = g == 0 if batch.config["skip_zeros"] else torch.zeros_like(g, dtype=torch.bool)
    old = [state.read(states, spec, p.device) for spec in rule.states]
    scale = 1.0
    if rule.norm == rules.LARS_TRUST:
        finite = g.masked_fill(~g.isfinite(), 0.0) if batch.bits8 else g
        trust = rules.trust_scale(rule.norm, rules.norm(p), rules.norm(finite), h)
        g, h = torch.add(g, p, alpha=h.l2) * trust, h._replace(l2=0.0)
    new, direction = rules.advance(rule, p, g, old, h)
    if batch.bits8:
        # 8-bit codes cannot hold infinity or NaN: such an element is left alone, its block is not harmed.
        for values in new:
            drop = drop | ~values.isfinite()
    if rule.norm in (rules.CAP, rules.LAMB_TRUST):
        update = rules.norm(direction.masked_fill(drop, 0.0))
        scale = rules.trust_scale(rule.norm, rules.norm(p), update, h)
    moved = torch.where(drop, p, rules.apply(p, direction, h, scale))
    for spec, before, after in zip(rule.states, old, new, strict=True):
        state.write(states, spec, torch.where(drop, before, after.to(before.dtype)))
    rounded = round_to(moved, item.p.dtype, item.seed, int(h.step)) if batch.stochastic else moved.to(item.p.dtype)
    if batch.kahan:
        states["compensation"].copy_(moved - rounded.to(dtype))
    (item.target if item.target is not None else item.p).copy_(rounded)


def step_native(batch: Batch) -> None:
    """Advance a batch of CPU tensors with the compiled kernel, in one call."""
    from kbit.kernels.cpu import optim as kernel

    rows: dict[rules.Scalars, int] = {}
    table = np.zeros((len(batch.items), TABLE_COLUMNS), dtype=np.int64)
    for index, item in enumerate(batch.items):
        row = rows.setdefault(batch.scalars(item), len(rows))
        table[index] = table_row(batch, item)
        table[index, 9] = row
    kernel.step(
        table,
        np.array(list(rows), dtype=np.float32),
        algorithm=batch.rule.algorithm,
        flags=batch.rule.flags,
        decay_in_direction=batch.rule.decay == rules.IN_DIRECTION,
        norm=batch.rule.norm,
        bits8=batch.bits8,
        skip_zeros=bool(batch.config["skip_zeros"]),
        p_dtype=batch.items[0].p.dtype,
        g_dtype=batch.items[0].g.dtype,
        stochastic=batch.stochastic,
        kahan=batch.kahan,
    )
    for item in batch.items:
        if item.target is not None:
            item.target.copy_(item.p)


def table_row(batch: Batch, item: Item) -> list[int]:
    """An item's row: p, g, 3 states, 3 absmax, count, scalars row, step, compensation, seed; the rest is for GPUs."""
    values, scales = [0, 0, 0], [0, 0, 0]
    for slot, spec in enumerate(batch.rule.states):
        values[slot] = item.state[spec.name].data_ptr()
        if batch.bits8:
            scales[slot] = item.state[state.absmax_key(spec.name)].data_ptr()
    compensation = item.state["compensation"].data_ptr() if batch.kahan else 0
    step = item.state["step"].data_ptr()
    return [
        item.p.data_ptr(), item.g.data_ptr(), *values, *scales, item.p.numel(), 0, step,
        compensation, item.seed, 0, 0, 0
    ]  # fmt: skip
