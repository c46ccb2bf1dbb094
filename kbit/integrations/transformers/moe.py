"""Fused experts in transformers 5: kbit's forward in its registry, and checkpoint keys that lead to their weights.

A quantized projection is a module under the name of the Parameter that it replaced, so the key of its codes is
`experts.gate_up_proj.weight` where the model's own is `experts.gate_up_proj`.
"""

from __future__ import annotations

import re
from typing import Any

from kbit.nn.experts import IMPLEMENTATION, ExpertWeight, experts_forward
from kbit.nn.select import EXPERT_PROJECTIONS


def register() -> None:
    """Add `experts_forward` to transformers' experts implementations. Called when `integrations.moe` is imported."""
    from transformers.integrations import moe

    functions = getattr(moe, "ALL_EXPERTS_FUNCTIONS", None)
    if functions is not None:
        functions[IMPLEMENTATION] = experts_forward


def adapt_conversions(conversions: list[Any], modules: dict[str, Any], pre_quantized: bool) -> list[Any]:
    """The conversions of a checkpoint's keys for a model in which `modules` are quantized.

    A checkpoint of kbit has the keys of the model: what merges single experts into fused ones must not touch them.
    A floating point checkpoint's experts are merged as ever, and then lead to the quantized module.
    """
    names = [name for name, module in modules.items() if isinstance(module, ExpertWeight)]
    if not names:
        return conversions
    projections = sorted({name.rpartition(".")[2] for name in names})
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    adapted = []
    for conversion in conversions:
        targets = conversion._original_target_patterns
        if not any(target.endswith(EXPERT_PROJECTIONS) for target in targets):
            adapted.append(conversion)
        elif not pre_quantized:
            renamed = [f"{t}.weight" if t.rpartition(".")[2] in projections else t for t in targets]
            extra = {"operations": list(conversion.operations)} if isinstance(conversion, WeightConverter) else {}
            adapted.append(conversion.copy(list(conversion._original_source_patterns), renamed, **extra))
    if not pre_quantized:
        parents = sorted({re.escape(name.split(".")[-2]) for name in names})
        for parent in parents:
            for projection in projections:
                adapted.append(WeightRenaming(rf"{parent}\.{projection}$", f"{parent}.{projection}.weight"))
    return adapted
