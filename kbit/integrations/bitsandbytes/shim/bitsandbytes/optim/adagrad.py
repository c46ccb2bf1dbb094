"""bitsandbytes.optim.adagrad, by kbit."""

from kbit.integrations.bitsandbytes.optim import Adagrad, Adagrad8bit, Adagrad32bit

__all__ = ["Adagrad", "Adagrad8bit", "Adagrad32bit"]
