"""Launching the step on a GPU: tables of addresses, for the CUDA kernel and the Triton one.

The CUDA kernel serves rules without norms on NVIDIA GPUs: one launch advances all tensors of a batch and their
step counts. Elsewhere it is Triton's, with a small launch before it. A plan keeps what does not change between steps:
the device table, which programs serve which tensor, and the buffers. A step compares the addresses of parameters and
gradients with the plan's; equal ones cost no copy, others one asynchronous copy of the table from pinned memory.
Nothing waits for the device.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kbit.formats.codebooks import codebook
from kbit.kernels.cuda import optim as cuda_kernel
from kbit.optim import rules, state
from kbit.optim.batch import TABLE_COLUMNS, Batch, Look, table_row

# By whether states have 8 bits: blocks of 256 elements in a tile, warps of a program, tiles that it does in turn (which
# hides the latency of looking up the table). Measured on one H200.
ROWS = {True: 1, False: 4}
WARPS = {True: 2, False: 4}
TILES = {True: 16, False: 4}


@functools.cache
def triton_available() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def lookup_table(signed: bool, device: torch.device) -> Tensor:
    """fp32 `[512]`: the 256 values of a dynamic map, then the midpoints of its magnitudes, filled up with infinity."""
    values = codebook(state.codebook_name(signed), "cpu")
    magnitudes = values[values >= 0]
    midpoints = torch.full((256,), math.inf)
    midpoints[: len(magnitudes) - 1] = (magnitudes[:-1] + magnitudes[1:]) / 2
    return torch.cat([values, midpoints]).to(device)


def serves(batch: Batch) -> bool:
    """Whether the CUDA kernel can advance a batch: no norms, and a device that it runs on."""
    return not batch.rule.norm and cuda_kernel.available(batch.items[0].p.device)


def prefers(batch: Batch) -> bool:
    """Whether it should: on the kind of GPU where tests/optim/triton_checks.py compared it with the plain rules."""
    return serves(batch) and _hopper(batch.items[0].p.get_device())


@functools.cache
def _hopper(index: int) -> bool:
    return torch.cuda.get_device_capability(index) == (9, 0)


class Plan:
    """The device side of one batch. cuda: for the CUDA kernel, else for Triton's."""

    def __init__(
        self, rows: list[list[int]], scalar_rows: Sequence[int], batch: Batch, device: torch.device, cuda: bool
    ) -> None:
        self.cuda, self.device, self.batch = cuda, device, batch
        self.tile = ROWS[batch.bits8] * 256
        span = state.BLOCK_SIZE if cuda else self.tile * TILES[batch.bits8]
        self.table = np.array(rows, dtype=np.int64).reshape(len(rows), TABLE_COLUMNS)
        self.table[:, 9] = scalar_rows
        counts = -(-self.table[:, 8] // span)
        self.table[:, 13] = np.cumsum(counts) - counts
        #: Programs of the Triton kernel, or blocks of 256 elements.
        self.total = int(counts.sum())
        self.hyper: tuple[float, ...] = ()
        self.dirty = True
        self.look = Look(batch)
        self.addresses: tuple[list[int], list[int]] = [], []
        size = self.table.size + (0 if cuda else rules_width())
        self.buffer = torch.empty(size, dtype=torch.int64, device=device)
        # Used when a CUDA graph is being captured: then a copy's source must live as long as the graph.
        self.spare = torch.empty(size, dtype=torch.int64, pin_memory=device.type == "cuda")
        self.aligned = False
        if cuda:
            if counts.max(initial=0) >= 2**26:  # the kernel counts a tensor's vectors of 4 elements in 32 bits
                raise ValueError(f"a tensor of {self.table[:, 8].max()} elements is too large for the CUDA step")
            self.tickets = torch.zeros(1, dtype=torch.int32, device=device)
            return
        programs = np.repeat(np.arange(len(rows), dtype=np.int32), counts)
        self.programs = torch.from_numpy(programs).to(device)
        tensors = max(scalar_rows, default=-1) + 1
        self.scalars = torch.empty(tensors, rules_width(), dtype=torch.float32, device=device)
        self.scales = torch.empty(tensors, dtype=torch.float32, device=device)
        sums = 2 * self.total * TILES[batch.bits8] if batch.rule.norm else 2
        self.sums = torch.empty(sums, dtype=torch.float32, device=device)

    def upload(self, hyper: tuple[float, ...]) -> None:
        """Bring the table, and for Triton the hyperparameters, to the device where they changed."""
        if self.cuda:
            hyper = ()
        if not self.dirty and hyper == self.hyper:
            return
        addresses = self.table[:, [0, 1, 2, 3, 4, 11]]
        self.aligned = not (addresses & 15).any()
        content = torch.from_numpy(np.concatenate([self.table.ravel(), np.array(hyper).view(np.int64)]))
        if self.device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                self.spare.copy_(content)
                content = self.spare
            else:
                content = content.pin_memory()
        self.buffer.copy_(content, non_blocking=True)
        self.hyper, self.dirty = hyper, False

    def hyper_pointer(self) -> Tensor:
        return self.buffer[self.table.size :].view(torch.float64)


def addresses_of(batch: Batch) -> tuple[list[int], list[int]]:
    """Addresses of parameters and of gradients."""
    return [item.p.data_ptr() for item in batch.items], [item.g.data_ptr() for item in batch.items]


def rules_width() -> int:
    return len(rules.Scalars._fields)


def hyperparameters(batch: Batch) -> tuple[tuple[float, ...], Tensor | None]:
    """The 16 doubles that the prologue reads, and the learning rate where it is a tensor on the device."""
    config, algorithm = batch.config, batch.rule.algorithm
    lr, lr_tensor = config["lr"], None
    if isinstance(lr, Tensor):
        lr_tensor = lr if lr.device == batch.items[0].p.device else None
        lr = 0.0 if lr_tensor is not None else float(lr)
    betas = list(config.get("betas", (0.0, 0.0)))
    if algorithm == rules.SGD:
        betas = [float(config["momentum"]), 0.0]
    elif algorithm == rules.RMSPROP:
        betas = [float(config["alpha"]), float(config["momentum"])]
    b1, b2, b3 = (*betas, 0.0)[:3]
    logs = [math.log(b) if b > 0.0 else -math.inf for b in (b1, b2, b3)]
    alpha = float(config["alpha"]) if algorithm == rules.ADEMAMIX else 0.0
    warm3 = float(config.get("t_beta3") or 0.0) if b1 > 0.0 and b3 > 0.0 else 0.0
    row = (
        float(lr),
        float(config.get("weight_decay", 0.0)),
        b1,
        b2,
        b3,
        float(config.get("eps", 0.0)),
        alpha,
        float(config.get("t_alpha") or 0.0),
        warm3,
        *logs,
        float(config.get("lr_decay", 0.0)),
        float(config.get("dampening", 0.0)),
        float(config.get("bias_correction", True)),
        float(config.get("max_unorm", 0.0)),
    )
    return row, lr_tensor


def step_gpu(batch: Batch, plans: dict[Any, Any], key: Any, cuda: bool) -> None:
    """Advance a batch on its device. plans: where this optimizer keeps plans; key: this batch's place in it.

    cuda: by the CUDA kernel, else by Triton's.
    """
    first = batch.items[0]
    if cuda and not serves(batch):
        raise ValueError("the CUDA step has no norms (LAMB, LARS, max_unorm) and needs an NVIDIA GPU with NVRTC")
    if batch.rule.states and first.state[batch.rule.states[0].name].device != first.p.device:
        from kbit.optim.paging import step_paged

        step_paged(batch, plans, key, cuda)
        return
    key = (key, cuda)
    addresses = batch.addresses or addresses_of(batch)
    plan = plans.get(key)
    if plan is None or (plan.batch is not batch and not plan.look.fits(batch)):
        rows = [table_row(batch, item) for item in batch.items]
        plan = plans[key] = Plan(rows, range(len(rows)), batch, first.p.device, cuda)
        plan.addresses = addresses
    elif plan.addresses != addresses:
        plan.table[:, 0], plan.table[:, 1] = addresses
        plan.addresses, plan.dirty = addresses, True
    plan.batch = batch
    hyper, lr_tensor = hyperparameters(batch)
    plan.upload(hyper)
    with device_of(first.p):
        if cuda:
            launch_cuda(plan, batch, hyper, lr_tensor, plan)
        else:
            launch_prologue(plan.buffer, plan.hyper_pointer(), plan.scalars, len(batch.items), batch, lr_tensor)
            launch_step(plan, plan.buffer, plan.programs, plan.total, plan.scalars, batch)
    for item in batch.items:
        if item.target is not None:
            item.target.copy_(item.p)


def launch_cuda(
    plan: Plan, batch: Batch, hyper: tuple[float, ...], lr_tensor: Tensor | None, counted: Plan | None
) -> None:
    """The one launch of the CUDA kernel. counted: the plan whose tensors' step counts go up, if any."""
    rule = batch.rule
    if lr_tensor is not None and lr_tensor.dtype not in (torch.float32, torch.float64):
        lr_tensor = lr_tensor.float()
    kind = 0 if lr_tensor is None else 1 if lr_tensor.dtype == torch.float32 else 2
    settings = _cuda_settings(
        rule, batch.bits8, bool(batch.config["skip_zeros"]), batch.stochastic, batch.kahan, batch.items[0].p.dtype,
        batch.items[0].g.dtype, _fast(batch), kind,
    )  # fmt: skip
    cuda_kernel.step(
        plan.buffer,
        len(plan.table),
        plan.total,
        None if counted is None else counted.buffer,
        0 if counted is None else len(counted.table),
        plan.tickets,
        hyper,
        lr_tensor,
        settings,
    )


@functools.lru_cache(maxsize=1024)
def _cuda_settings(
    rule: rules.Rule, bits8: bool, skip: bool, stochastic: bool, kahan: bool, p: torch.dtype, g: torch.dtype,
    fast: bool, lr_kind: int,
) -> tuple[tuple[str, object], ...]:  # fmt: skip
    found = cuda_kernel.macros(
        rule.algorithm, rule.flags, rule.decay, len(rule.states), bits8, skip, stochastic, kahan, p, g, fast, lr_kind
    )
    return tuple(sorted(found.items()))


def _fast(batch: Batch) -> bool:
    """Whether approximate quotients and roots, which take subnormal numbers for zero, are near enough.

    Not where a state keeps quotients: states are exact.
    """
    keeps = batch.rule.algorithm == rules.RMSPROP and bool(batch.rule.flags & rules.MOMENTUM)
    return torch.version.cuda is not None and not keeps and batch.config.get("eps", 1.0) > 1e-15


def launch_prologue(
    table: Tensor, hyper: Tensor, scalars: Tensor, tensors: int, batch: Batch, lr_tensor: Tensor | None
) -> None:
    """Advance step counts and write the scalars `[tensors, 16]`."""
    from kbit.kernels.triton import optim as kernels

    kernels.prologue[(-(-tensors // 128),)](
        table,
        hyper,
        hyper if lr_tensor is None else lr_tensor,
        scalars,
        tensors,
        ALGO=batch.rule.algorithm,
        DECAY=batch.rule.decay,
        LR_TENSOR=lr_tensor is not None,
        BLOCK=128,
        num_warps=4,
    )


def launch_step(plan: Plan, table: Tensor, programs: Tensor, total: int, scalars: Tensor, batch: Batch) -> None:
    """The main launch over `total` programs, after the norms where the rule needs them."""
    import triton.language as tl

    from kbit.kernels.triton import optim as kernels

    if total == 0:
        return
    dtypes = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    rule, device = batch.rule, batch.items[0].p.device
    tables = lookup_table(True, device), lookup_table(False, device)
    settings = {
        "ALGO": rule.algorithm,
        "FLAGS": rule.flags,
        "DECAY": rule.decay,
        "NORM": rule.norm,
        "BITS8": batch.bits8,
        "SKIP": bool(batch.config["skip_zeros"]),
        "STOCHASTIC": batch.stochastic,
        "KAHAN": batch.kahan,
        "P_DTYPE": dtypes[batch.items[0].p.dtype],
        "G_DTYPE": dtypes[batch.items[0].g.dtype],
        "ALIGNED": plan.aligned,
        "ROWS": ROWS[batch.bits8],
        "TILES": TILES[batch.bits8],
        "FAST": device.type == "cuda" and _fast(batch),
        "num_warps": WARPS[batch.bits8],
        "enable_fp_fusion": False,
    }
    if rule.norm:
        kernels.step[(total,)](table, programs, scalars, plan.scales, plan.sums, *tables, SUMS=True, **settings)
        kernels.trust[(len(batch.items),)](
            table,
            scalars,
            plan.sums,
            plan.scales,
            NORM=rule.norm,
            TILE=plan.tile,
            TILES=TILES[batch.bits8],
            num_warps=4,
        )
    kernels.step[(total,)](table, programs, scalars, plan.scales, plan.sums, *tables, SUMS=False, **settings)


def device_of(tensor: Tensor) -> Any:
    """Make the tensor's device current: Triton launches on the current one."""
    from kbit.kernels.triton.common import on_device

    return on_device(tensor)
