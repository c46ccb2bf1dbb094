"""bitsandbytes.optim.lars, by kbit."""

from kbit.integrations.bitsandbytes.optim import LARS, LARS8bit, LARS32bit, PytorchLARS

__all__ = ["LARS", "LARS8bit", "LARS32bit", "PytorchLARS"]
