"""The 8-bit, 32-bit and paged forms: the same algorithm with its containers fixed by the name."""

from __future__ import annotations

from kbit.optim.algorithms import LAMB, LARS, SGD, Adagrad, Adam, AdamW, AdEMAMix, Lion, RMSprop


class Adam32bit(Adam):
    """Adam with 32-bit states."""

    forced_bits = 32


class Adam8bit(Adam):
    """Adam with 8-bit states."""

    forced_bits = 8


class PagedAdam(Adam):
    """Adam with states in pinned host memory."""

    forced_paging = True


class PagedAdam32bit(Adam):
    """Adam with 32-bit states in pinned host memory."""

    forced_bits = 32
    forced_paging = True


class PagedAdam8bit(Adam):
    """Adam with 8-bit states in pinned host memory."""

    forced_bits = 8
    forced_paging = True


class AdamW32bit(AdamW):
    """AdamW with 32-bit states."""

    forced_bits = 32


class AdamW8bit(AdamW):
    """AdamW with 8-bit states."""

    forced_bits = 8


class PagedAdamW(AdamW):
    """AdamW with states in pinned host memory."""

    forced_paging = True


class PagedAdamW32bit(AdamW):
    """AdamW with 32-bit states in pinned host memory."""

    forced_bits = 32
    forced_paging = True


class PagedAdamW8bit(AdamW):
    """AdamW with 8-bit states in pinned host memory."""

    forced_bits = 8
    forced_paging = True


class AdEMAMix32bit(AdEMAMix):
    """AdEMAMix with 32-bit states."""

    forced_bits = 32


class AdEMAMix8bit(AdEMAMix):
    """AdEMAMix with 8-bit states."""

    forced_bits = 8


class PagedAdEMAMix(AdEMAMix):
    """AdEMAMix with states in pinned host memory."""

    forced_paging = True


class PagedAdEMAMix32bit(AdEMAMix):
    """AdEMAMix with 32-bit states in pinned host memory."""

    forced_bits = 32
    forced_paging = True


class PagedAdEMAMix8bit(AdEMAMix):
    """AdEMAMix with 8-bit states in pinned host memory."""

    forced_bits = 8
    forced_paging = True


class Lion32bit(Lion):
    """Lion with 32-bit states."""

    forced_bits = 32


class Lion8bit(Lion):
    """Lion with 8-bit states."""

    forced_bits = 8


class PagedLion(Lion):
    """Lion with states in pinned host memory."""

    forced_paging = True


class PagedLion32bit(Lion):
    """Lion with 32-bit states in pinned host memory."""

    forced_bits = 32
    forced_paging = True


class PagedLion8bit(Lion):
    """Lion with 8-bit states in pinned host memory."""

    forced_bits = 8
    forced_paging = True


class SGD32bit(SGD):
    """SGD with 32-bit states."""

    forced_bits = 32


class SGD8bit(SGD):
    """SGD with 8-bit states."""

    forced_bits = 8


class LARS32bit(LARS):
    """LARS with 32-bit states."""

    forced_bits = 32


class LARS8bit(LARS):
    """LARS with 8-bit states."""

    forced_bits = 8


class RMSprop32bit(RMSprop):
    """RMSprop with 32-bit states."""

    forced_bits = 32


class RMSprop8bit(RMSprop):
    """RMSprop with 8-bit states."""

    forced_bits = 8


class Adagrad32bit(Adagrad):
    """Adagrad with 32-bit states."""

    forced_bits = 32


class Adagrad8bit(Adagrad):
    """Adagrad with 8-bit states."""

    forced_bits = 8


class LAMB32bit(LAMB):
    """LAMB with 32-bit states."""

    forced_bits = 32


class LAMB8bit(LAMB):
    """LAMB with 8-bit states."""

    forced_bits = 8
