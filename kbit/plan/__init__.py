"""What a model will take: bytes of weights, of running it and of training it, and what fits into a given memory."""

from __future__ import annotations

__all__: list[str] = []
