"""bitsandbytes.optim.sgd, by kbit."""

from kbit.integrations.bitsandbytes.optim import SGD, SGD8bit, SGD32bit

__all__ = ["SGD", "SGD8bit", "SGD32bit"]
