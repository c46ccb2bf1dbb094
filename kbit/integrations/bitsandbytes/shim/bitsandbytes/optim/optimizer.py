"""bitsandbytes.optim.optimizer, by kbit."""

from kbit.integrations.bitsandbytes.identity import absent_names
from kbit.integrations.bitsandbytes.legacy import OPTIMIZER
from kbit.integrations.bitsandbytes.optim import GlobalOptimManager, Optimizer1State, Optimizer2State, Optimizer8bit

__all__ = ["GlobalOptimManager", "Optimizer1State", "Optimizer2State", "Optimizer8bit"]

__getattr__ = absent_names(__name__, OPTIMIZER)
