"""Optimizer step on a GPU: one launch for all tensors of a batch.

A table in device memory holds the addresses of every tensor; each program looks up which tensor and which elements are
its own. The mathematics is kbit/optim/rules.py, operation for operation: fused multiply-add only where written. A
small launch before it (`_prologue`) advances the step counts and turns hyperparameters into the scalars of each tensor
in float64, on the device: a changing learning rate or step count neither recompiles nor synchronises, and the whole
step can be captured in a CUDA graph.

8-bit codes: the candidate comes from arithmetic (the map is linear within a decade), then it and its neighbour on the
side of the remainder are compared by decoded value, so codes equal the oracle's (formats.blocks.quantize_dynamic).
"""

from __future__ import annotations

import triton
import triton.language as tl

# int64 columns of a table row: p, g, 3 states, 3 absmax, count, scalars row, step, compensation, seed, first program,
# index of the first element in its parameter, 0
COLUMNS = 16
SCALARS = 16  # floats of a scalars row, in the order of rules.Scalars
HYPER = 16  # doubles of the hyperparameter row, see kbit/optim/gpu.py

# Numbers of kbit/optim/rules.py.
ADEMAMIX = tl.constexpr(1)
LION = tl.constexpr(2)
SGD = tl.constexpr(3)
RMSPROP = tl.constexpr(4)
ADAGRAD = tl.constexpr(5)
COUPLED = tl.constexpr(1)
DECOUPLED = tl.constexpr(2)
IN_DIRECTION = tl.constexpr(3)
CAP = tl.constexpr(1)
LAMB_TRUST = tl.constexpr(2)
LARS_TRUST = tl.constexpr(3)

_SMALLEST = tl.constexpr(1.17549435e-38)
_ROW = tl.constexpr(COLUMNS)
_WIDTH = tl.constexpr(SCALARS)


@triton.jit
def prologue(table, hyper, lr, scalars, tensors, ALGO: tl.constexpr, DECAY: tl.constexpr, LR_TENSOR: tl.constexpr,
             BLOCK: tl.constexpr):  # fmt: skip
    """Advance the step counts of all tensors and write their scalars."""
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = t < tensors
    address = tl.load(table + t * _ROW + 10, mask=live, other=0).to(tl.pointer_type(tl.float32))
    count = tl.load(address, mask=live, other=0.0) + 1.0
    tl.store(address, count, mask=live)
    step = count.to(tl.float64)
    zero = step * 0.0
    one = zero + 1.0
    if LR_TENSOR:
        rate = zero + tl.load(lr).to(tl.float64)
    else:
        rate = zero + tl.load(hyper)
    decay = tl.load(hyper + 1)
    b1 = zero + tl.load(hyper + 2)
    b2 = zero + tl.load(hyper + 3)
    b3 = zero + tl.load(hyper + 4)
    eps = tl.load(hyper + 5)
    alpha = zero + tl.load(hyper + 6)
    out = scalars + t * _WIDTH
    shrink = one
    l2 = zero
    dir_decay = zero
    if DECAY == COUPLED:
        l2 = zero + decay
    elif DECAY == DECOUPLED:
        shrink = 1.0 - rate * decay
    elif DECAY == IN_DIRECTION:
        dir_decay = zero + decay
    c1 = 1.0 - b1
    inv_bias1 = one
    inv_sqrt_bias2 = one
    if ALGO <= 1:
        corrected = tl.load(hyper + 14) != 0.0
        bias1 = 1.0 - tl.exp(step * tl.load(hyper + 9))
        bias2 = 1.0 - tl.exp(step * tl.load(hyper + 10))
        inv_bias1 = tl.where(corrected, 1.0 / bias1, one)
        inv_sqrt_bias2 = tl.where(corrected, 1.0 / tl.sqrt(bias2), one)
    if ALGO == ADEMAMIX:
        t_alpha = tl.load(hyper + 7)
        t_beta3 = tl.load(hyper + 8)
        log1 = tl.load(hyper + 9)
        log3 = tl.load(hyper + 11)
        alpha = tl.where(t_alpha > 0.0, tl.minimum(step * alpha / tl.maximum(t_alpha, 1e-30), alpha), alpha)
        part = step / tl.maximum(t_beta3, 1e-30)
        warm = tl.exp(log1 * log3 / ((1.0 - part) * log3 + part * log1))
        b3 = tl.where(part < tl.where(t_beta3 > 0.0, 1.0, 0.0), tl.minimum(warm, b3), b3)
    if ALGO == SGD:
        first = count == 1.0
        c1 = tl.where(first, one, 1.0 - tl.load(hyper + 13))
        b2 = b1
        b1 = tl.where(first, zero, b1)
    if ALGO == ADAGRAD:
        rate = rate / (1.0 + (step - 1.0) * tl.load(hyper + 12))
    tl.store(out, rate.to(tl.float32), mask=live)
    tl.store(out + 1, shrink.to(tl.float32), mask=live)
    tl.store(out + 2, l2.to(tl.float32), mask=live)
    tl.store(out + 3, dir_decay.to(tl.float32), mask=live)
    tl.store(out + 4, b1.to(tl.float32), mask=live)
    tl.store(out + 5, c1.to(tl.float32), mask=live)
    tl.store(out + 6, b2.to(tl.float32), mask=live)
    tl.store(out + 7, (1.0 - b2).to(tl.float32), mask=live)
    tl.store(out + 8, b3.to(tl.float32), mask=live)
    tl.store(out + 9, (1.0 - b3).to(tl.float32), mask=live)
    tl.store(out + 10, inv_bias1.to(tl.float32), mask=live)
    tl.store(out + 11, inv_sqrt_bias2.to(tl.float32), mask=live)
    tl.store(out + 12, (zero + eps).to(tl.float32), mask=live)
    tl.store(out + 13, alpha.to(tl.float32), mask=live)
    tl.store(out + 14, (zero + tl.load(hyper + 15)).to(tl.float32), mask=live)
    tl.store(out + 15, count, mask=live)


@triton.jit
def _lookup(table, codes, ROWS: tl.constexpr, GATHER: tl.constexpr):
    """Map values of int32 codes [ROWS, 256]; through shared memory (GATHER) or the L1 cache."""
    if GATHER:
        values = tl.load(table + tl.arange(0, 256))
        found = tl.reshape(tl.gather(values, tl.reshape(codes, (ROWS * 256,)), 0), (ROWS, 256))
    else:
        found = tl.load(table + codes)
    return found


@triton.jit
def _encode(x, table, SIGNED: tl.constexpr, ROWS: tl.constexpr, GATHER: tl.constexpr):
    """uint8 codes [ROWS, 256] and absmax [ROWS] of fp32 x [ROWS, 256]."""
    x = tl.where(tl.abs(x) < _SMALLEST, 0.0, x)
    absmax = tl.max(tl.abs(x), axis=1)
    inverse = tl.where(absmax > 0.0, tl.div_rn(1.0, tl.where(absmax > 0.0, absmax, 1.0)), 0.0)
    scale = absmax[:, None]
    a = tl.abs(x) * inverse[:, None]
    # Decade: float bits are nearly a logarithm, 2**38 / 9864 of them a factor of ten. The origin is such that no number
    # is put into too high a decade; one put too low gets that decade's last code, whose upper neighbour is compared.
    bits = tl.maximum(a.to(tl.int32, bitcast=True) - 870201351, 0).to(tl.uint32)
    decade = tl.minimum((tl.umulhi(bits, tl.full((), 9864, tl.uint32)) >> 6).to(tl.int32), 6)
    steps = ((decade + 127) << 23).to(tl.float32, bitcast=True)
    if not SIGNED:
        steps = steps * 2.0
    width = tl.exp2(decade.to(tl.float32) * -3.3219280948873623) * (1e6 / 0.9)
    within = tl.floor((a * width - (0.1 / 0.9)) * steps)
    within = tl.minimum(tl.maximum(within, 0.0), steps - 1.0)
    if SIGNED:
        rank = (within + (steps - 1.0)).to(tl.int32)
        code = tl.where(x < 0.0, 126 - rank, 128 + rank)
    else:
        code = (within + (steps - 1.0)).to(tl.int32)
    rest = x - _lookup(table, code, ROWS, GATHER) * scale
    up = rest > 0.0
    other = tl.where(up, tl.minimum(code + 1, 255), tl.maximum(code - 1, 0))
    distance = tl.abs(rest)
    other_distance = tl.abs(x - _lookup(table, other, ROWS, GATHER) * scale)
    better = tl.where(up, other_distance < distance, other_distance <= distance)
    return tl.where(better, other, code).to(tl.uint8), absmax


@triton.jit
def _scramble(x):
    x = x ^ (x >> 16)
    x = x * tl.full((), 0x7FEB352D, tl.uint32)
    x = x ^ (x >> 15)
    x = x * tl.full((), 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def _advance(p, g, o0, o1, o2, h, ALGO: tl.constexpr, FLAGS: tl.constexpr, DECAY: tl.constexpr):
    """New states (unused ones returned as they came) and direction; see rules.advance."""
    b1 = tl.load(h + 4)
    c1 = tl.load(h + 5)
    b2 = tl.load(h + 6)
    c2 = tl.load(h + 7)
    eps = tl.load(h + 12)
    n0 = o0
    n1 = o1
    n2 = o2
    if ALGO == 0:
        n0 = o0 * b1 + g * c1
        n1 = o1 * b2 + g * g * c2
        direction = tl.div_rn(n0 * tl.load(h + 10), tl.sqrt_rn(n1) * tl.load(h + 11) + eps)
    elif ALGO == ADEMAMIX:
        n0 = o0 * b1 + g * c1
        n1 = o1 * tl.load(h + 8) + g * tl.load(h + 9)
        n2 = o2 * b2 + g * g * c2
        mixed = n0 * tl.load(h + 10) + n1 * tl.load(h + 13)
        direction = tl.div_rn(mixed, tl.sqrt_rn(n2) * tl.load(h + 11) + eps)
    elif ALGO == LION:
        c = o0 * b1 + g * c1
        direction = tl.where(c > 0.0, 1.0, tl.where(c < 0.0, -1.0, c))
        n0 = o0 * b2 + g * c2
    elif ALGO == SGD:
        direction = g
        if FLAGS & 2:
            n0 = tl.fma(g, c1, o0 * b1)
            direction = n0
            if FLAGS & 1:
                direction = tl.fma(n0, b2, g)
    elif ALGO == RMSPROP:
        n0 = o0 * b1 + g * g * c1
        spread = n0
        if FLAGS & 4:
            if FLAGS & 2:
                n2 = o2 * b1 + g * c1
                spread = n0 - n2 * n2
            else:
                n1 = o1 * b1 + g * c1
                spread = n0 - n1 * n1
            spread = tl.where(spread < 0.0, 0.0, spread)
        direction = tl.div_rn(g, tl.sqrt_rn(spread) + eps)
        if FLAGS & 2:
            direction = o1 * b2 + direction
            n1 = direction
    else:
        n0 = o0 + g * g
        direction = tl.div_rn(g, tl.sqrt_rn(n0) + eps)
    if DECAY == IN_DIRECTION:
        direction = direction + p * tl.load(h + 3)
    return n0, n1, n2, direction


@triton.jit
def _load(address, offsets, live, MASKED: tl.constexpr):
    if MASKED:
        values = tl.load(address + offsets, mask=live, other=0)
    else:
        values = tl.load(address + offsets)
    return values


@triton.jit
def _store(address, offsets, values, live, MASKED: tl.constexpr):
    if MASKED:
        tl.store(address + offsets, values, mask=live)
    else:
        tl.store(address + offsets, values)


@triton.jit
def _address(row, column, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer out of the table; ALIGNED promises 16 bytes, so that accesses can be wide."""
    address = tl.load(row + column).to(tl.pointer_type(dtype))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def _read_state(row, slot: tl.constexpr, offsets, blocks, live, live_block, table, BITS8: tl.constexpr,
                ALIGNED: tl.constexpr, ROWS: tl.constexpr, GATHER: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    if BITS8:
        codes = _load(_address(row, 2 + slot, tl.uint8, ALIGNED), offsets, live, MASKED).to(tl.int32)
        absmax = _load(_address(row, 5 + slot, tl.float32, False), blocks, live_block, MASKED)
        values = _lookup(table, codes, ROWS, GATHER) * absmax[:, None]
        if MASKED:
            values = tl.where(live, values, 0.0)
    else:
        values = _load(_address(row, 2 + slot, tl.float32, ALIGNED), offsets, live, MASKED)
    return values


@triton.jit
def _write_state(row, slot: tl.constexpr, values, offsets, blocks, live, live_block, table, SIGNED: tl.constexpr,
                 BITS8: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, GATHER: tl.constexpr,
                 MASKED: tl.constexpr):  # fmt: skip
    if BITS8:
        codes, absmax = _encode(values, table, SIGNED, ROWS, GATHER)
        _store(_address(row, 2 + slot, tl.uint8, ALIGNED), offsets, codes, live, MASKED)
        _store(_address(row, 5 + slot, tl.float32, False), blocks, absmax, live_block, MASKED)
    else:
        _store(_address(row, 2 + slot, tl.float32, ALIGNED), offsets, values, live, MASKED)


@triton.jit
def _tile(row, first, count, h, scale, sums, signed_table, unsigned_table,
          ALGO: tl.constexpr, FLAGS: tl.constexpr, DECAY: tl.constexpr, NORM: tl.constexpr, SUMS: tl.constexpr,
          BITS8: tl.constexpr, SKIP: tl.constexpr, STOCHASTIC: tl.constexpr, KAHAN: tl.constexpr,
          P_DTYPE: tl.constexpr, G_DTYPE: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr,
          GATHER: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """ROWS blocks of 256 elements of one tensor: the step, or (SUMS) only the sums of squares for its norms."""
    rows = tl.arange(0, ROWS)
    offsets = first + (rows[:, None] * 256 + tl.arange(0, 256)[None, :])
    blocks = first // 256 + rows
    live = offsets < count
    live_block = blocks * 256 < count
    p_address = _address(row, 0, P_DTYPE, ALIGNED)
    stored = _load(p_address, offsets, live, MASKED)
    p = stored.to(tl.float32)
    g = _load(_address(row, 1, G_DTYPE, ALIGNED), offsets, live, MASKED).to(tl.float32)
    if KAHAN:
        rest_address = _address(row, 11, P_DTYPE, ALIGNED)
        p = p + _load(rest_address, offsets, live, MASKED).to(tl.float32)
    infinite = float("inf")
    keep = live
    if SKIP:
        keep = keep & (g != 0.0)
    if SUMS and NORM == LARS_TRUST:
        counted = g
        if BITS8:
            counted = tl.where(tl.abs(g) < infinite, g, 0.0)
        tl.store(sums, tl.sum(p * p))
        tl.store(sums + 1, tl.sum(counted * counted))
    else:
        # Which states there are, and which have a sign.
        S0: tl.constexpr = (ALGO != SGD) or (FLAGS & 2) != 0
        S1: tl.constexpr = (ALGO <= 1) or (ALGO == RMSPROP and (FLAGS & 6) != 0)
        S2: tl.constexpr = (ALGO == ADEMAMIX) or (ALGO == RMSPROP and (FLAGS & 6) == 6)
        SIGN0: tl.constexpr = ALGO < 4
        SIGN1: tl.constexpr = ALGO != 0
        SIGN2: tl.constexpr = ALGO != 1
        table0 = signed_table if SIGN0 else unsigned_table
        table1 = signed_table if SIGN1 else unsigned_table
        table2 = signed_table if SIGN2 else unsigned_table
        o0 = p
        o1 = p
        o2 = p
        if S0:
            o0 = _read_state(row, 0, offsets, blocks, live, live_block, table0, BITS8, ALIGNED, ROWS, GATHER, MASKED)
        if S1:
            o1 = _read_state(row, 1, offsets, blocks, live, live_block, table1, BITS8, ALIGNED, ROWS, GATHER, MASKED)
        if S2:
            o2 = _read_state(row, 2, offsets, blocks, live, live_block, table2, BITS8, ALIGNED, ROWS, GATHER, MASKED)
        if DECAY == COUPLED:
            g = tl.fma(p, tl.load(h + 2), g)
        if NORM == LARS_TRUST:
            g = g * scale
        n0, n1, n2, direction = _advance(p, g, o0, o1, o2, h, ALGO, FLAGS, DECAY)
        if BITS8:
            # 8-bit codes cannot hold infinity or NaN: such an element is left alone, its block is not harmed.
            if S0:
                keep = keep & (tl.abs(n0) < infinite)
            if S1:
                keep = keep & (tl.abs(n1) < infinite)
            if S2:
                keep = keep & (tl.abs(n2) < infinite)
        if SUMS:
            direction = tl.where(keep, direction, 0.0)
            tl.store(sums, tl.sum(p * p))
            tl.store(sums + 1, tl.sum(direction * direction))
        else:
            rate = tl.load(h)
            if NORM == CAP or NORM == LAMB_TRUST:
                rate = rate * scale
            moved = tl.fma(direction, -rate, p * tl.load(h + 1))
            moved = tl.where(keep, moved, p)
            if KAHAN:
                rounded = moved.to(P_DTYPE)
                _store(p_address, offsets, rounded, live, MASKED)
                _store(rest_address, offsets, (moved - rounded.to(tl.float32)).to(P_DTYPE), live, MASKED)
            elif STOCHASTIC:
                seed = tl.load(row + 12).to(tl.uint32)
                count_bits = tl.load(h + 15).to(tl.int32).to(tl.uint32)
                key = _scramble(count_bits * tl.full((), 0x9E3779B9, tl.uint32) + seed)
                index = offsets + tl.load(row + 14)
                high = (index >> 32).to(tl.uint32) * tl.full((), 0x85EBCA6B, tl.uint32)
                noise = _scramble(index.to(tl.uint32) + key + high) & 0xFFFF
                bits = (moved.to(tl.uint32, bitcast=True) + noise) & 0xFFFF0000
                cut = tl.where(tl.abs(moved) < infinite, bits.to(tl.float32, bitcast=True), moved)
                _store(p_address, offsets, cut.to(P_DTYPE), live, MASKED)
            else:
                _store(p_address, offsets, moved.to(P_DTYPE), live, MASKED)
            if S0:
                _write_state(row, 0, tl.where(keep, n0, o0), offsets, blocks, live, live_block, table0, SIGN0, BITS8,
                             ALIGNED, ROWS, GATHER, MASKED)  # fmt: skip
            if S1:
                _write_state(row, 1, tl.where(keep, n1, o1), offsets, blocks, live, live_block, table1, SIGN1, BITS8,
                             ALIGNED, ROWS, GATHER, MASKED)  # fmt: skip
            if S2:
                _write_state(row, 2, tl.where(keep, n2, o2), offsets, blocks, live, live_block, table2, SIGN2, BITS8,
                             ALIGNED, ROWS, GATHER, MASKED)  # fmt: skip


@triton.jit
def step(table, programs, scalars, scales, sums, signed_table, unsigned_table,
         ALGO: tl.constexpr, FLAGS: tl.constexpr, DECAY: tl.constexpr, NORM: tl.constexpr, SUMS: tl.constexpr,
         BITS8: tl.constexpr, SKIP: tl.constexpr, STOCHASTIC: tl.constexpr, KAHAN: tl.constexpr,
         P_DTYPE: tl.constexpr, G_DTYPE: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr,
         GATHER: tl.constexpr):  # fmt: skip
    """One program: ROWS * 256 elements of the tensor that `programs` names."""
    program = tl.program_id(0).to(tl.int64)
    row = table + tl.load(programs + program).to(tl.int64) * _ROW
    tensor = tl.load(row + 9)
    count = tl.load(row + 8)
    first = (program - tl.load(row + 13)) * (ROWS * 256)
    h = scalars + tensor * _WIDTH
    scale = 1.0
    if NORM != 0 and not SUMS:
        scale = tl.load(scales + tensor)
    out = sums + program * 2
    if first + ROWS * 256 <= count:
        _tile(row, first, count, h, scale, out, signed_table, unsigned_table, ALGO, FLAGS, DECAY, NORM, SUMS, BITS8,
              SKIP, STOCHASTIC, KAHAN, P_DTYPE, G_DTYPE, ALIGNED, ROWS, GATHER, False)  # fmt: skip
    else:
        _tile(row, first, count, h, scale, out, signed_table, unsigned_table, ALGO, FLAGS, DECAY, NORM, SUMS, BITS8,
              SKIP, STOCHASTIC, KAHAN, P_DTYPE, G_DTYPE, ALIGNED, ROWS, GATHER, True)  # fmt: skip


@triton.jit
def trust(table, scalars, sums, scales, NORM: tl.constexpr, TILE: tl.constexpr):
    """The factor of each tensor from the sums of its programs, in float64; see rules.trust_scale."""
    tensor = tl.program_id(0).to(tl.int64)
    row = table + tensor * _ROW
    first = tl.load(row + 13)
    last = first + (tl.load(row + 8) + TILE - 1) // TILE
    pp = tl.zeros((128,), tl.float64)
    oo = tl.zeros((128,), tl.float64)
    for begin in range(first, last, 128):
        at = begin + tl.arange(0, 128)
        pp += tl.load(sums + at * 2, mask=at < last, other=0.0).to(tl.float64)
        oo += tl.load(sums + at * 2 + 1, mask=at < last, other=0.0).to(tl.float64)
    p_norm = tl.sqrt(tl.sum(pp))
    other = tl.sqrt(tl.sum(oo))
    h = scalars + tensor * _WIDTH
    cap = tl.load(h + 14).to(tl.float64)
    usable = (p_norm != 0.0) & (other != 0.0)
    ratio = p_norm / tl.where(usable, other, 1.0)
    if NORM == LARS_TRUST:
        below = other + tl.load(h + 2).to(tl.float64) * p_norm
        factor = cap * p_norm / tl.where(usable, below, 1.0)
    elif NORM == CAP:
        factor = tl.minimum(cap * ratio, 1.0)
    else:
        factor = tl.where(cap > 0.0, tl.minimum(cap * ratio, ratio), ratio)
    tl.store(scales + tensor, tl.where(usable, factor, 1.0).to(tl.float32))
