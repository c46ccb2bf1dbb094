"""Who loads a checkpoint whose config.json says `quant_method: "bitsandbytes"`: bitsandbytes, its stand-in, or kbit.

kbit's own layers take it where `quantization_config=KbitConfig(...)` asks for them, and where nothing called
bitsandbytes can be imported, so that transformers would only refuse. Otherwise transformers' own integration loads it.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import sys
from typing import Any

from kbit.config import KbitConfig as PlainConfig
from kbit.integrations.transformers.config import KbitConfig

logger = logging.getLogger("kbit")


def is_bitsandbytes(config: Any) -> bool:
    """Whether `config` is what stands in the config.json of a bitsandbytes checkpoint."""
    return isinstance(config, dict) and config.get("quant_method", None) == "bitsandbytes"


def _importable() -> bool:
    return "bitsandbytes" in sys.modules or importlib.util.find_spec("bitsandbytes") is not None


def install(auto: Any) -> None:
    """Wrap the two functions of `transformers.quantizers.auto` that read a checkpoint's config. Safe to call again."""
    configs, quantizers = auto.AutoQuantizationConfig, auto.AutoHfQuantizer
    if hasattr(configs.from_dict, "_kbit"):
        return
    from_dict, merge = configs.from_dict, quantizers.merge_quantization_configs

    @functools.wraps(from_dict)
    def choose(data: Any, *args: Any, **kwargs: Any) -> Any:
        if is_bitsandbytes(data) and not _importable():
            logger.info("no bitsandbytes here: kbit's own layers load this bitsandbytes checkpoint")
            return KbitConfig.from_bitsandbytes(data)
        return from_dict(data, *args, **kwargs)

    @functools.wraps(merge)
    def merge_or_take(quantization_config: Any, quantization_config_from_args: Any = None, **kwargs: Any) -> Any:
        asked = quantization_config_from_args
        if is_bitsandbytes(quantization_config) and isinstance(asked, PlainConfig):
            config = KbitConfig.from_bitsandbytes(quantization_config)
            # The checkpoint decides the bytes; these say how they are multiplied.
            for name in ("compute_dtype", "outlier_threshold", "int8_activations"):
                setattr(config, name, getattr(asked, name))
            if asked.bits != config.bits:
                logger.warning(
                    "the checkpoint is stored in %d bits and loads so; bits=%d is ignored", config.bits, asked.bits
                )
            return config
        return merge(quantization_config, asked, **kwargs)

    choose._kbit = True  # type: ignore[attr-defined]
    configs.from_dict = staticmethod(choose)
    quantizers.merge_quantization_configs = staticmethod(merge_or_take)
