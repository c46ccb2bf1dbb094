"""bitsandbytes.optim.lamb, by kbit."""

from kbit.integrations.bitsandbytes.optim import LAMB, LAMB8bit, LAMB32bit

__all__ = ["LAMB", "LAMB8bit", "LAMB32bit"]
