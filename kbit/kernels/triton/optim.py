"""Optimizer step on a GPU: one launch for all tensors of a batch.

A table in device memory holds the addresses of every tensor; each program looks up which tensor and which elements are
its own. The mathematics is kbit/optim/rules.py, operation for operation: fused multiply-add only where written. A
small launch before it (`_prologue`) advances the step counts and turns hyperparameters into the scalars of each tensor
in float64, on the device: a changing learning rate or step count neither recompiles nor synchronises, and the whole
step can be captured in a CUDA graph.

8-bit codes: a candidate comes from arithmetic (the map is linear within a decade), then one midpoint decides. So a code
is the nearest, up to the rounding of the scaled value: where two codes are equally near to within 1e-6, it may be the
other one than the oracle's (kbit/optim/state.py). Quotients and roots of the update are the fast ones.
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
def _exp2(x, FAST: tl.constexpr):
    """FAST: NVIDIA's instructions, which take subnormal numbers for zero; only used where eps is far above those."""
    if FAST:
        y = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        y = tl.exp2(x)
    return y


@triton.jit
def _root(x, FAST: tl.constexpr):
    if FAST:
        y = tl.inline_asm_elementwise("sqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        y = tl.sqrt(x)
    return y


@triton.jit
def _quotient(x, y, FAST: tl.constexpr):
    if FAST:
        z = tl.inline_asm_elementwise("div.approx.ftz.f32 $0, $1, $2;", "=f,f,f", [x, y], tl.float32, True, 1)
    else:
        z = x / y
    return z


@triton.jit
def _lookup(table, codes, ROWS: tl.constexpr):
    """Values of int32 codes [ROWS, 256] in a table of 256 fp32, which goes through shared memory."""
    values = tl.load(table + tl.arange(0, 256))
    return tl.reshape(tl.gather(values, tl.reshape(codes, (ROWS * 256,)), 0), (ROWS, 256))


@triton.jit
def _encode(x, midpoints, SIGNED: tl.constexpr, ROWS: tl.constexpr, FAST: tl.constexpr):
    """uint8 codes [ROWS, 256] and absmax [ROWS] of fp32 x [ROWS, 256].

    midpoints: fp32 [256], between the magnitudes of rank r and r + 1 (rank 0 is zero), then infinity.
    """
    x = tl.where(tl.abs(x) < _SMALLEST, 0.0, x)
    absmax = tl.max(tl.abs(x), axis=1)
    inverse = tl.where(absmax > 0.0, tl.div_rn(1.0, tl.where(absmax > 0.0, absmax, 1.0)), 0.0)
    a = tl.abs(x) * inverse[:, None]
    # Decade: float bits are nearly a logarithm, 2**38 / 9864 of them a factor of ten. The origin is such that no number
    # is put into too high a decade; one put too low gets that decade's last rank, and the midpoint lifts it.
    bits = tl.maximum(a.to(tl.int32, bitcast=True) - 870201351, 0).to(tl.uint32)
    decade = tl.minimum((tl.umulhi(bits, tl.full((), 9864, tl.uint32)) >> 6).to(tl.int32), 6)
    # A decade holds 2**decade ranks (twice as many when unsigned), linear in a. `place` lies half a rank low, so its
    # nearest integer is the rank or the one below. Adding 1.5 * 2**23 leaves that integer in the low bits.
    steps = ((decade << 23) + (0x3F800000 if SIGNED else 0x40000000)).to(tl.float32, bitcast=True)
    slope = _exp2(
        decade.to(tl.float32) * -2.321928094887362 + (20.083571662769224 if SIGNED else 21.083571662769224), FAST
    )
    low: tl.constexpr = 1.0 if SIGNED else 2.0
    place = tl.minimum(tl.fma(a, slope, steps * (8.0 / 9.0) - low), steps * 2.0 - low)
    rank = (place + 12582912.0).to(tl.int32, bitcast=True) & 0xFF
    rank += (a > _lookup(midpoints, rank, ROWS)).to(tl.int32)
    if SIGNED:
        rank = tl.where(x < 0.0, tl.maximum(127 - rank, 0), 127 + rank)
    else:
        rank = tl.maximum(rank, (x > 0.0).to(tl.int32))  # a positive second moment never becomes 0
    return rank.to(tl.uint8), absmax


@triton.jit
def _scramble(x):
    x = x ^ (x >> 16)
    x = x * tl.full((), 0x7FEB352D, tl.uint32)
    x = x ^ (x >> 15)
    x = x * tl.full((), 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def _advance(p, g, o0, o1, o2, b1, c1, b2, c2, b3, c3, inv1, inv2, eps, alpha, dir_decay,
             ALGO: tl.constexpr, FLAGS: tl.constexpr, DECAY: tl.constexpr,
             FAST: tl.constexpr):  # fmt: skip
    """New states (unused ones returned as they came) and direction; see rules.advance."""
    n0 = o0
    n1 = o1
    n2 = o2
    if ALGO == 0:
        n0 = o0 * b1 + g * c1
        n1 = o1 * b2 + g * g * c2
        direction = _quotient(n0 * inv1, _root(n1, FAST) * inv2 + eps, FAST)
    elif ALGO == ADEMAMIX:
        n0 = o0 * b1 + g * c1
        n1 = o1 * b3 + g * c3
        n2 = o2 * b2 + g * g * c2
        mixed = n0 * inv1 + n1 * alpha
        direction = _quotient(mixed, _root(n2, FAST) * inv2 + eps, FAST)
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
        direction = _quotient(g, _root(spread, FAST) + eps, FAST)
        if FLAGS & 2:
            direction = o1 * b2 + direction
            n1 = direction
    else:
        n0 = o0 + g * g
        direction = _quotient(g, _root(n0, FAST) + eps, FAST)
    if DECAY == IN_DIRECTION:
        direction = direction + p * dir_decay
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
def _read_state(codes_at, absmax_at, offsets, blocks, live, live_block, table, BITS8: tl.constexpr,
                ROWS: tl.constexpr, FAST: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    if BITS8:
        codes = _load(codes_at, offsets, live, MASKED).to(tl.int32)
        absmax = _load(absmax_at, blocks, live_block, MASKED)
        values = _lookup(table, codes, ROWS) * absmax[:, None]
        if MASKED:
            values = tl.where(live, values, 0.0)
    else:
        values = _load(codes_at, offsets, live, MASKED)
    return values


@triton.jit
def _write_state(codes_at, absmax_at, values, offsets, blocks, live, live_block, midpoints, SIGNED: tl.constexpr,
                 BITS8: tl.constexpr, ROWS: tl.constexpr, FAST: tl.constexpr,
                 MASKED: tl.constexpr):  # fmt: skip
    if BITS8:
        codes, absmax = _encode(values, midpoints, SIGNED, ROWS, FAST)
        _store(codes_at, offsets, codes, live, MASKED)
        _store(absmax_at, blocks, absmax, live_block, MASKED)
    else:
        _store(codes_at, offsets, values, live, MASKED)


@triton.jit
def _tile(p_at, g_at, s0, s1, s2, a0, a1, a2, rest_at, first, count, base, seed, sums, signed_table, unsigned_table,
          scale, rate, shrink, l2, dir_decay, b1, c1, b2, c2, b3, c3, inv1, inv2, eps, alpha, number,
          ALGO: tl.constexpr, FLAGS: tl.constexpr, DECAY: tl.constexpr, NORM: tl.constexpr, SUMS: tl.constexpr,
          BITS8: tl.constexpr, SKIP: tl.constexpr, STOCHASTIC: tl.constexpr, KAHAN: tl.constexpr,
          P_DTYPE: tl.constexpr, ROWS: tl.constexpr, FAST: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """ROWS blocks of 256 elements of one tensor: the step, or (SUMS) only the sums of squares for its norms."""
    rows = tl.arange(0, ROWS)
    offsets = first + (rows[:, None] * 256 + tl.arange(0, 256)[None, :])
    blocks = first // 256 + rows
    live = offsets < count
    live_block = blocks * 256 < count
    p = _load(p_at, offsets, live, MASKED).to(tl.float32)
    g = _load(g_at, offsets, live, MASKED).to(tl.float32)
    if KAHAN:
        p = p + _load(rest_at, offsets, live, MASKED).to(tl.float32)
    infinite = float("inf")
    # Which elements move: all, unless zeros are skipped or 8-bit states could become infinite.
    CHECK: tl.constexpr = SKIP or (BITS8 and ((ALGO != SGD) or (FLAGS & 2) != 0))
    raw = g
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
            o0 = _read_state(s0, a0, offsets, blocks, live, live_block, table0, BITS8, ROWS, FAST, MASKED)
        if S1:
            o1 = _read_state(s1, a1, offsets, blocks, live, live_block, table1, BITS8, ROWS, FAST, MASKED)
        if S2:
            o2 = _read_state(s2, a2, offsets, blocks, live, live_block, table2, BITS8, ROWS, FAST, MASKED)
        if DECAY == COUPLED:
            g = tl.fma(p, l2, g)
        if NORM == LARS_TRUST:
            g = g * scale
        n0, n1, n2, direction = _advance(p, g, o0, o1, o2, b1, c1, b2, c2, b3, c3, inv1, inv2, eps, alpha,
                                         dir_decay, ALGO, FLAGS, DECAY, FAST)  # fmt: skip
        if CHECK:
            if BITS8:
                # 8-bit codes cannot hold infinity or NaN: such an element is left alone, its block is not harmed.
                largest = tl.abs(n0)
                if S1:
                    largest = tl.maximum(largest, tl.abs(n1), propagate_nan=tl.PropagateNan.ALL)
                if S2:
                    largest = tl.maximum(largest, tl.abs(n2), propagate_nan=tl.PropagateNan.ALL)
                keep = largest < infinite
                if SKIP:
                    keep = keep & (raw != 0.0)
            else:
                keep = raw != 0.0
            n0 = tl.where(keep, n0, o0)
            n1 = tl.where(keep, n1, o1)
            n2 = tl.where(keep, n2, o2)
            direction = tl.where(keep, direction, 0.0)
        if SUMS:
            if MASKED:
                direction = tl.where(live, direction, 0.0)
            tl.store(sums, tl.sum(p * p))
            tl.store(sums + 1, tl.sum(direction * direction))
        else:
            if NORM == CAP or NORM == LAMB_TRUST:
                rate = rate * scale
            moved = tl.fma(direction, -rate, p * shrink)
            if CHECK:
                moved = tl.where(keep, moved, p)
            if KAHAN:
                rounded = moved.to(P_DTYPE)
                _store(p_at, offsets, rounded, live, MASKED)
                _store(rest_at, offsets, (moved - rounded.to(tl.float32)).to(P_DTYPE), live, MASKED)
            elif STOCHASTIC:
                count_bits = number.to(tl.int32).to(tl.uint32)
                key = _scramble(count_bits * tl.full((), 0x9E3779B9, tl.uint32) + seed.to(tl.uint32))
                index = offsets + base
                high = (index >> 32).to(tl.uint32) * tl.full((), 0x85EBCA6B, tl.uint32)
                noise = _scramble(index.to(tl.uint32) + key + high) & 0xFFFF
                bits = (moved.to(tl.uint32, bitcast=True) + noise) & 0xFFFF0000
                cut = tl.where(tl.abs(moved) < infinite, bits.to(tl.float32, bitcast=True), moved)
                _store(p_at, offsets, cut.to(P_DTYPE), live, MASKED)
            else:
                _store(p_at, offsets, moved.to(P_DTYPE), live, MASKED)
            # Behind the 256 values of a table lie the midpoints of its magnitudes.
            if S0:
                _write_state(s0, a0, n0, offsets, blocks, live, live_block, table0 + 256, SIGN0,
                             BITS8, ROWS, FAST, MASKED)  # fmt: skip
            if S1:
                _write_state(s1, a1, n1, offsets, blocks, live, live_block, table1 + 256, SIGN1,
                             BITS8, ROWS, FAST, MASKED)  # fmt: skip
            if S2:
                _write_state(s2, a2, n2, offsets, blocks, live, live_block, table2 + 256, SIGN2,
                             BITS8, ROWS, FAST, MASKED)  # fmt: skip


@triton.jit
def step(table, programs, scalars, scales, sums, signed_table, unsigned_table,
         ALGO: tl.constexpr, FLAGS: tl.constexpr, DECAY: tl.constexpr, NORM: tl.constexpr, SUMS: tl.constexpr,
         BITS8: tl.constexpr, SKIP: tl.constexpr, STOCHASTIC: tl.constexpr, KAHAN: tl.constexpr,
         P_DTYPE: tl.constexpr, G_DTYPE: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
         FAST: tl.constexpr):  # fmt: skip
    """One program: TILES tiles of ROWS * 256 elements of the tensor that `programs` names."""
    program = tl.program_id(0).to(tl.int64)
    row = table + tl.load(programs + program).to(tl.int64) * _ROW
    tensor = tl.load(row + 9)
    count = tl.load(row + 8)
    seed = tl.load(row + 12)
    base = tl.load(row + 14)
    first = (program - tl.load(row + 13)) * (TILES * ROWS * 256)
    STATE: tl.constexpr = tl.uint8 if BITS8 else tl.float32
    p_at = _address(row, 0, P_DTYPE, ALIGNED)
    g_at = _address(row, 1, G_DTYPE, ALIGNED)
    s0 = _address(row, 2, STATE, ALIGNED)
    s1 = _address(row, 3, STATE, ALIGNED)
    s2 = _address(row, 4, STATE, ALIGNED)
    a0 = _address(row, 5, tl.float32, False)
    a1 = _address(row, 6, tl.float32, False)
    a2 = _address(row, 7, tl.float32, False)
    rest_at = _address(row, 11, P_DTYPE, ALIGNED)
    h = scalars + tensor * _WIDTH
    rate = tl.load(h)
    shrink = tl.load(h + 1)
    l2 = tl.load(h + 2)
    dir_decay = tl.load(h + 3)
    b1 = tl.load(h + 4)
    c1 = tl.load(h + 5)
    b2 = tl.load(h + 6)
    c2 = tl.load(h + 7)
    b3 = tl.load(h + 8)
    c3 = tl.load(h + 9)
    inv1 = tl.load(h + 10)
    inv2 = tl.load(h + 11)
    eps = tl.load(h + 12)
    alpha = tl.load(h + 13)
    number = tl.load(h + 15)
    scale = 1.0
    if NORM != 0 and not SUMS:
        scale = tl.load(scales + tensor)
    for tile in range(TILES):
        begin = first + tile * (ROWS * 256)
        out = sums + (program * TILES + tile) * 2
        if begin + ROWS * 256 <= count:
            _tile(p_at, g_at, s0, s1, s2, a0, a1, a2, rest_at, begin, count, base, seed, out, signed_table,
                  unsigned_table, scale, rate, shrink, l2, dir_decay, b1, c1, b2, c2, b3, c3, inv1, inv2, eps, alpha,
                  number, ALGO, FLAGS, DECAY, NORM, SUMS, BITS8, SKIP, STOCHASTIC, KAHAN, P_DTYPE, ROWS, FAST,
                  False)  # fmt: skip
        elif begin < count:
            _tile(p_at, g_at, s0, s1, s2, a0, a1, a2, rest_at, begin, count, base, seed, out, signed_table,
                  unsigned_table, scale, rate, shrink, l2, dir_decay, b1, c1, b2, c2, b3, c3, inv1, inv2, eps, alpha,
                  number, ALGO, FLAGS, DECAY, NORM, SUMS, BITS8, SKIP, STOCHASTIC, KAHAN, P_DTYPE, ROWS, FAST,
                  True)  # fmt: skip


@triton.jit
def trust(table, scalars, sums, scales, NORM: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr):
    """The factor of each tensor from the sums of its tiles, in float64; see rules.trust_scale."""
    tensor = tl.program_id(0).to(tl.int64)
    row = table + tensor * _ROW
    first = tl.load(row + 13) * TILES
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
