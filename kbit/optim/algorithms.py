"""The optimizers by name, with the arguments that bitsandbytes' users know.

For each algorithm: `X` (bits as `optim_bits` says), `X32bit`, `X8bit`, and where large states matter `PagedX`,
`PagedX32bit`, `PagedX8bit`. Beyond bitsandbytes every class takes `max_unorm`, `skip_zeros`, `stochastic_rounding`,
`kahan` by keyword. What is common to all is described once, in KbitOptimizer. The results are torch.optim's where it
has the algorithm, else the paper's.
"""

from __future__ import annotations

from typing import Any

from kbit.optim.optimizer import KbitOptimizer
from kbit.optim.settings import parse_betas


def _no_amsgrad(name: str, amsgrad: bool) -> None:
    if amsgrad:
        raise ValueError(f"{name} does not support amsgrad=True")


class Adam(KbitOptimizer):
    """Adam (Kingma & Ba 2014, arXiv 1412.6980), as torch.optim.Adam.

    params: parameters, named parameters or groups. lr: a float, or a tensor of one element.
    betas: decay of the averages of gradients and of their squares, in [0, 1); a string "(0.9, 0.999)" is read too.
    eps: added to the root of the average of squares.
    weight_decay: added to the gradient, times the parameter.
    amsgrad: only False; True raises ValueError.
    optim_bits, args, min_8bit_size, is_paged, options: as in KbitOptimizer.

    States: `exp_avg` (signed), `exp_avg_sq` (not negative), each in 8 or 32 bits, and `step`.
    """

    algorithm = "adam"

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        **options: Any,
    ) -> None:
        _no_amsgrad(type(self).__name__, amsgrad)
        defaults = {"lr": lr, "betas": parse_betas(betas, 2), "eps": eps, "weight_decay": weight_decay}
        super().__init__(
            params,
            defaults,
            optim_bits=optim_bits,
            args=args,
            min_8bit_size=min_8bit_size,
            is_paged=is_paged,
            **options,
        )


class AdamW(Adam):
    """AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101), as torch.optim.AdamW.

    weight_decay: the parameter is multiplied by 1 - lr * weight_decay, then moves.

    Other arguments and the states are Adam's.
    """

    algorithm = "adamw"

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, optim_bits, args, min_8bit_size, is_paged, **options
        )


class AdEMAMix(KbitOptimizer):
    """AdEMAMix (Pagliardini et al. 2024, arXiv 2409.03137): Adam with a second, slow average of gradients.

    betas: decay of the fast average, of the average of squares and of the slow average, in [0, 1).
    alpha: weight of the slow average. t_alpha, t_beta3: steps over which alpha and the slow beta warm up, None for no
    warm-up.
    weight_decay: decoupled, as in AdamW.
    lr, eps, optim_bits, min_8bit_size, is_paged, options: as in Adam.

    States: `exp_avg`, `exp_avg_slow` (signed), `exp_avg_sq` (not negative), and `step`.
    """

    algorithm = "ademamix"

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: Any = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        optim_bits: int = 32,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        **options: Any,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": parse_betas(betas, 3),
            "alpha": alpha,
            "t_alpha": t_alpha,
            "t_beta3": t_beta3,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(
            params, defaults, optim_bits=optim_bits, min_8bit_size=min_8bit_size, is_paged=is_paged, **options
        )


class Lion(KbitOptimizer):
    """Lion (Chen et al. 2023, arXiv 2302.06675): every element moves by lr, along the sign of a momentum.

    betas: weight of the momentum in that sign, and its decay, in [0, 1).
    weight_decay: decoupled, as in AdamW.
    lr, optim_bits, args, min_8bit_size, is_paged, options: as in Adam.

    States: `exp_avg` (signed), and `step`.
    """

    algorithm = "lion"

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-4,
        betas: Any = (0.9, 0.99),
        weight_decay: float = 0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        **options: Any,
    ) -> None:
        defaults = {"lr": lr, "betas": parse_betas(betas, 2), "weight_decay": weight_decay}
        super().__init__(
            params,
            defaults,
            optim_bits=optim_bits,
            args=args,
            min_8bit_size=min_8bit_size,
            is_paged=is_paged,
            **options,
        )


class SGD(KbitOptimizer):
    """Stochastic gradient descent with momentum (Sutskever et al. 2013, ICML), as torch.optim.SGD.

    momentum: weight of the sum of past gradients; 0 for none. dampening: 1 minus the weight of a new gradient in it.
    nesterov: look one step ahead; needs a momentum and no dampening.
    weight_decay: added to the gradient, times the parameter.
    lr, optim_bits, args, min_8bit_size, options: as in Adam.

    States: `momentum_buffer` (signed) where momentum is not 0, and `step`.
    """

    algorithm = "sgd"

    def __init__(
        self,
        params: Any,
        lr: Any,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        **options: Any,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(params, defaults, optim_bits=optim_bits, args=args, min_8bit_size=min_8bit_size, **options)


class LARS(SGD):
    """LARS (You et al. 2017, arXiv 1708.03888): SGD on gradients scaled by |p| / |g| for each parameter.

    max_unorm: the paper's trust coefficient. The gradient with decay, g + weight_decay * p, is multiplied by
        max_unorm * |p| / (|g| + weight_decay * |p|) before it enters the momentum. 0 turns the scaling off.

    Other arguments and the states are SGD's.
    """

    algorithm = "lars"

    def __init__(
        self,
        params: Any,
        lr: Any,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 0.02,
        **options: Any,
    ) -> None:
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            optim_bits,
            args,
            min_8bit_size,
            max_unorm=max_unorm,
            **options,
        )


class RMSprop(KbitOptimizer):
    """RMSprop (Hinton 2012, lecture 6e of "Neural Networks for Machine Learning"), as torch.optim.RMSprop.

    alpha: decay of the average of squares, in [0, 1). eps: added to its root.
    momentum: weight of past updates; 0 for none. centered: divide by the deviation instead of the root of the squares.
        Centered states have 32 bits whatever `optim_bits` says: their difference would be lost among codes.
    weight_decay: added to the gradient, times the parameter.
    lr, optim_bits, args, min_8bit_size, options: as in Adam.

    States: `square_avg` (not negative), `momentum_buffer` (signed) with momentum, `grad_avg` (signed) where centered,
    and `step`.
    """

    algorithm = "rmsprop"

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        **options: Any,
    ) -> None:
        defaults = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "centered": centered,
        }
        super().__init__(params, defaults, optim_bits=optim_bits, args=args, min_8bit_size=min_8bit_size, **options)


class Adagrad(KbitOptimizer):
    """Adagrad (Duchi et al. 2011, JMLR 12), as torch.optim.Adagrad.

    lr_decay: the rate of step t is lr / (1 + (t - 1) * lr_decay).
    initial_accumulator_value: what the sum of squares starts from. eps: added to its root.
    weight_decay: added to the gradient, times the parameter.
    lr, optim_bits, args, min_8bit_size, options: as in Adam.

    States: `sum` (not negative), and `step`.
    """

    algorithm = "adagrad"

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        **options: Any,
    ) -> None:
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "eps": eps,
        }
        super().__init__(params, defaults, optim_bits=optim_bits, args=args, min_8bit_size=min_8bit_size, **options)


class LAMB(KbitOptimizer):
    """LAMB (You et al. 2019, arXiv 1904.00962): Adam's update, decay included, rescaled to the parameter's norm.

    The step is lr * (|p| / |u|) * u with u = m / (sqrt(v) + eps) + weight_decay * p.

    max_unorm: below 1 it makes the step smaller by that factor; from 1 up, and at 0, the step is the paper's.
    adam_w_mode: False adds decay to the gradient instead.
    bias_correction: False leaves the averages uncorrected.

    Other arguments and the states are Adam's.
    """

    algorithm = "lamb"

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        bias_correction: bool = True,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 1.0,
        **options: Any,
    ) -> None:
        _no_amsgrad(type(self).__name__, amsgrad)
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": parse_betas(betas, 2),
            "eps": eps,
            "weight_decay": weight_decay,
            "adam_w_mode": adam_w_mode,
        }
        super().__init__(
            params,
            defaults,
            optim_bits=optim_bits,
            args=args,
            min_8bit_size=min_8bit_size,
            max_unorm=max_unorm,
            **options,
        )
