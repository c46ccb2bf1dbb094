"""What a model will take: bytes of weights, of running it and of training it, and what fits into a given memory.

skeleton = kbit.plan.from_pretrained("path/or/name")      # config.json alone, on the meta device
plan = kbit.plan.make_plan(skeleton, kbit.plan.Settings(memory=12_000_000_000, train="qlora"))
print(plan.recommendation.python)
"""

from __future__ import annotations

from kbit.plan.memory import Memory, Optimizer
from kbit.plan.recommend import Plan, Recommendation, Row, Settings, default_context, make_plan
from kbit.plan.shape import ModelShape, Skeleton, from_params, from_pretrained
from kbit.plan.weights import WeightPlan, plan_weights

__all__ = [
    "Memory",
    "ModelShape",
    "Optimizer",
    "Plan",
    "Recommendation",
    "Row",
    "Settings",
    "Skeleton",
    "WeightPlan",
    "default_context",
    "from_params",
    "from_pretrained",
    "make_plan",
    "plan_weights",
]
