"""bitsandbytes.optim.optimizer, by kbit."""

from kbit.integrations.bitsandbytes.optim import GlobalOptimManager, Optimizer1State, Optimizer2State, Optimizer8bit

__all__ = ["GlobalOptimManager", "Optimizer1State", "Optimizer2State", "Optimizer8bit"]
