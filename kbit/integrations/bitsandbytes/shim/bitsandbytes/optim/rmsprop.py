"""bitsandbytes.optim.rmsprop, by kbit."""

from kbit.integrations.bitsandbytes.optim import RMSprop, RMSprop8bit, RMSprop32bit

__all__ = ["RMSprop", "RMSprop8bit", "RMSprop32bit"]
