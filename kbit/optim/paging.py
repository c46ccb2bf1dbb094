"""Paged states: in pinned host memory between steps, on the device only while they are needed.

Work is cut into chunks. Three streams overlap: chunk i + 1 is copied in and chunk i - 1 copied out while chunk i is
computed, between two staging buffers. The kernel is the one of unpaged states, so results are the same to the bit.
Plain allocations only. Block scales (1/64 of the codes) stay on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kbit.optim import state as states
from kbit.optim.batch import Batch, Item, Look, table_row
from kbit.optim.gpu import Plan, addresses_of, device_of, hyperparameters, launch_cuda, launch_prologue, launch_step

# Bytes of one staging buffer; a chunk holds as many elements as fit.
STAGING_BYTES = 64 * 2**20
_ALIGN = 256


@dataclass
class Piece:
    """Elements [begin, end) of one item, and where each of its states lies in the staging buffer."""

    item: int
    begin: int
    end: int
    places: list[int]


class PagedPlan:
    """Chunks of a batch, one plan (table rows, programs) each, the staging buffers and the streams."""

    def __init__(self, batch: Batch, device: torch.device, cuda: bool) -> None:
        self.cuda = cuda
        self.look = Look(batch)
        self.addresses: tuple[list[int], list[int]] = [], []
        width = 1 if batch.bits8 else 4
        slots = len(batch.rule.states)
        budget = max(STAGING_BYTES // (width * slots) // 256 * 256, 256)
        self.chunks = _cut([item.p.numel() for item in batch.items], budget, width, slots)
        size = max((_end(piece, width) for chunk in self.chunks for piece in chunk), default=0)
        self.staging = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(min(2, len(self.chunks)))]
        full = [table_row(batch, item) for item in batch.items]
        self.prologue = Plan(full, range(len(full)), batch, device, cuda)
        self.plans = [self._plan(batch, chunk, full, index % 2, device) for index, chunk in enumerate(self.chunks)]
        if device.type == "cuda":
            self.streams = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def _plan(self, batch: Batch, chunk: list[Piece], full: list[list[int]], slot: int, device: torch.device) -> Plan:
        rows = []
        for piece in chunk:
            row = list(full[piece.item])
            item = batch.items[piece.item]
            row[0] += piece.begin * item.p.element_size()
            row[1] += piece.begin * item.g.element_size()
            for index, place in enumerate(piece.places):
                row[2 + index] = self.staging[slot].data_ptr() + place
                if batch.bits8:
                    row[5 + index] += piece.begin // states.BLOCK_SIZE * 4
            row[8] = piece.end - piece.begin
            if row[11]:
                row[11] += piece.begin * item.p.element_size()
            row[14] = piece.begin
            rows.append(row)
        plan = Plan(rows, [piece.item for piece in chunk], batch, device, self.cuda)
        if not self.cuda:  # scalars and factors belong to tensors, not to pieces
            plan.scalars, plan.scales = self.prologue.scalars, self.prologue.scales
        return plan


def _cut(counts: list[int], budget: int, width: int, slots: int) -> list[list[Piece]]:
    """Chunks of at most `budget` elements; cuts fall on block boundaries."""
    chunks: list[list[Piece]] = []
    room, offset = 0, 0
    for index, count in enumerate(counts):
        begin = 0
        while begin < count:
            if room < 256:
                chunks.append([])
                room, offset = budget, 0
            end = min(count, begin + room)
            places = []
            for _ in range(slots):
                places.append(offset)
                offset += -(-(end - begin) * width // _ALIGN) * _ALIGN
            chunks[-1].append(Piece(index, begin, end, places))
            room -= -(-(end - begin) // 256) * 256
            begin = end
    return chunks


def _end(piece: Piece, width: int) -> int:
    return piece.places[-1] + -(-(piece.end - piece.begin) * width // _ALIGN) * _ALIGN


def step_paged(batch: Batch, plans: dict[Any, Any], key: Any, cuda: bool) -> None:
    """Advance a batch whose states lie in pinned host memory, by the CUDA kernel or by Triton's."""
    key = (key, cuda, "paged")
    if batch.rule.norm:
        _step_whole(batch, plans, key)
        return
    device = batch.items[0].p.device
    addresses = addresses_of(batch)
    plan = plans.get(key)
    if not isinstance(plan, PagedPlan) or not plan.look.fits(batch):
        plan = plans[key] = PagedPlan(batch, device, cuda)
        plan.addresses = addresses
    elif plan.addresses != addresses:
        _move(plan, batch)
        plan.addresses = addresses
    hyper, lr_tensor = hyperparameters(batch)
    plan.prologue.upload(hyper)
    with device_of(batch.items[0].p):
        buffer, pointer = plan.prologue.buffer, plan.prologue.hyper_pointer()
        if not cuda:
            launch_prologue(buffer, pointer, plan.prologue.scalars, len(batch.items), batch, lr_tensor)
        elif not plan.chunks:  # nothing but empty tensors: their steps count all the same
            launch_cuda(plan.prologue, batch, hyper, lr_tensor, plan.prologue)
        if device.type == "cuda":
            _pipeline(plan, batch, hyper, lr_tensor)
        else:
            for index, chunk in enumerate(plan.chunks):
                _copy(plan, batch, chunk, index % 2, inward=True)
                _compute(plan, batch, index, hyper, lr_tensor)
                _copy(plan, batch, chunk, index % 2, inward=False)
    for item in batch.items:
        if item.target is not None:
            item.target.copy_(item.p)


def _pipeline(plan: PagedPlan, batch: Batch, hyper: tuple[float, ...], lr_tensor: Tensor | None) -> None:
    main = torch.cuda.current_stream()
    inward, outward = plan.streams
    # The last step's copies out must have left both staging buffers and reached the host.
    inward.wait_stream(outward)
    inward.wait_stream(main)
    drained: list[torch.cuda.Event | None] = [None, None]
    for index, chunk in enumerate(plan.chunks):
        slot = index % 2
        with torch.cuda.stream(inward):
            if (event := drained[slot]) is not None:
                inward.wait_event(event)
            _copy(plan, batch, chunk, slot, inward=True)
            ready = inward.record_event()
        main.wait_event(ready)
        _compute(plan, batch, index, hyper, lr_tensor)
        done = main.record_event()
        with torch.cuda.stream(outward):
            outward.wait_event(done)
            _copy(plan, batch, chunk, slot, inward=False)
            drained[slot] = outward.record_event()


def _compute(plan: PagedPlan, batch: Batch, index: int, hyper: tuple[float, ...], lr_tensor: Tensor | None) -> None:
    part = plan.plans[index]
    part.upload(hyper)
    if plan.cuda:
        last = index == len(plan.chunks) - 1
        launch_cuda(part, batch, hyper, lr_tensor, plan.prologue if last else None)
        return
    launch_step(part, part.buffer, part.programs, part.total, part.scalars, batch)


def _copy(plan: PagedPlan, batch: Batch, chunk: list[Piece], slot: int, inward: bool) -> None:
    """Bring the states of a chunk to its staging buffer, or back."""
    staging = plan.staging[slot]
    for piece in chunk:
        for spec, place in zip(batch.rule.states, piece.places, strict=True):
            host = _flat(batch.items[piece.item], spec.name)
            size = host.element_size()
            host = host[piece.begin : piece.end].view(torch.uint8)
            there = staging[place : place + (piece.end - piece.begin) * size]
            if inward:
                there.copy_(host, non_blocking=True)
            else:
                host.copy_(there, non_blocking=True)


def _flat(item: Item, name: str) -> Tensor:
    state: Tensor = item.state[name]
    return state.view(-1)


def _move(plan: PagedPlan, batch: Batch) -> None:
    """New addresses of parameters and gradients (states and buffers stay)."""
    for chunk, part in zip(plan.chunks, plan.plans, strict=True):
        for row, piece in enumerate(chunk):
            item = batch.items[piece.item]
            part.table[row, 0] = item.p.data_ptr() + piece.begin * item.p.element_size()
            part.table[row, 1] = item.g.data_ptr() + piece.begin * item.g.element_size()
        part.dirty = True


def _step_whole(batch: Batch, plans: dict[Any, Any], key: Any) -> None:
    """With norms a tensor is needed whole, twice: bring each one in, step, bring it back."""
    from kbit.optim.gpu import step_gpu

    for item in batch.items:
        names = [spec.name for spec in batch.rule.states]
        resident = {**item.state, **{name: item.state[name].to(item.p.device, non_blocking=True) for name in names}}
        inner = Item(item.p, item.g, resident, item.seed, item.target, item.owner)
        step_gpu(Batch(batch.name, batch.rule, batch.config, batch.bits8, [inner]), {}, key, False)
        for name in names:
            item.state[name].copy_(resident[name], non_blocking=True)


def synchronize(state: dict[Any, dict[str, Any]]) -> None:
    """Wait until copies to pinned states have arrived, before the host reads them."""
    for p, values in state.items():
        if isinstance(p, Tensor) and p.is_cuda:
            if any(isinstance(v, Tensor) and v.device.type == "cpu" for v in values.values()):
                torch.cuda.synchronize(p.device)
                return
