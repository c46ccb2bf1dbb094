"""Algorithms that torch.optim does not have, in float64, written from their papers and independent of kbit."""

from __future__ import annotations

import math

import torch


class Reference:
    """p is the float64 parameter; step(g) moves it."""

    def __init__(self, p: torch.Tensor) -> None:
        self.p = p.double().clone()
        self.t = 0
        self.m = torch.zeros_like(self.p)
        self.v = torch.zeros_like(self.p)
        self.slow = torch.zeros_like(self.p)


class LionReference(Reference):
    """Algorithm 2 of arXiv 2302.06675."""

    def step(self, g, lr, betas, weight_decay):
        g = g.double()
        update = (betas[0] * self.m + (1 - betas[0]) * g).sign()
        self.p -= lr * (update + weight_decay * self.p)
        self.m = betas[1] * self.m + (1 - betas[1]) * g


class LAMBReference(Reference):
    """Algorithm 2 of arXiv 1904.00962, phi the identity."""

    def step(self, g, lr, betas, eps, weight_decay):
        g = g.double()
        self.t += 1
        self.m = betas[0] * self.m + (1 - betas[0]) * g
        self.v = betas[1] * self.v + (1 - betas[1]) * g * g
        r = (self.m / (1 - betas[0] ** self.t)) / ((self.v / (1 - betas[1] ** self.t)).sqrt() + eps)
        u = r + weight_decay * self.p
        self.p -= lr * self.p.norm() / u.norm() * u


class LARSReference(Reference):
    """Algorithm 1 of arXiv 1708.03888 at a constant rate; trust is its eta."""

    def step(self, g, lr, momentum, weight_decay, trust):
        g = g.double()
        local = trust * self.p.norm() / (g.norm() + weight_decay * self.p.norm())
        self.v = momentum * self.v + lr * local * (g + weight_decay * self.p)
        self.p -= self.v


class AdEMAMixReference(Reference):
    """Algorithm 1 of arXiv 2409.03137 with the schedulers of section 3.1."""

    def step(self, g, lr, betas, alpha, eps, weight_decay, t_alpha=None, t_beta3=None):
        g = g.double()
        self.t += 1
        b1, b2, b3 = betas
        if t_alpha:
            alpha = min(self.t * alpha / t_alpha, alpha)
        if t_beta3 and self.t < t_beta3:
            x = self.t / t_beta3
            b3 = min(b3, math.exp(math.log(b1) * math.log(b3) / ((1 - x) * math.log(b3) + x * math.log(b1))))
        self.m = b1 * self.m + (1 - b1) * g
        self.slow = b3 * self.slow + (1 - b3) * g
        self.v = b2 * self.v + (1 - b2) * g * g
        m_hat, v_hat = self.m / (1 - b1**self.t), self.v / (1 - b2**self.t)
        self.p -= lr * ((m_hat + alpha * self.slow) / (v_hat.sqrt() + eps) + weight_decay * self.p)
