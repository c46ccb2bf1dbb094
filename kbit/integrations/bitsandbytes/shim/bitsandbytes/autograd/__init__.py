"""bitsandbytes.autograd, by kbit."""

from bitsandbytes.autograd import _functions

__all__ = ["_functions"]
