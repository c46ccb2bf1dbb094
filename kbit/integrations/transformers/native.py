"""Who loads a checkpoint whose config.json says `quant_method: "bitsandbytes"`: bitsandbytes, its stand-in, or kbit.

kbit's own layers take it where `quantization_config=KbitConfig(...)` asks for them, and where nothing called
bitsandbytes can be imported, so that transformers would only refuse. Otherwise transformers' own integration loads it.

And what a KbitConfig that is passed beside a quantized checkpoint means: it changes how the weights are multiplied, and
asking for another storage is an error.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import sys
from typing import Any

from kbit.config import QUANT_METHOD, RUN_TIME_SETTINGS
from kbit.config import KbitConfig as PlainConfig
from kbit.integrations.asked import check_stored, with_run_time
from kbit.integrations.transformers.config import KbitConfig

logger = logging.getLogger("kbit")


def is_bitsandbytes(config: Any) -> bool:
    """Whether `config` is what stands in the config.json of a bitsandbytes checkpoint."""
    return isinstance(config, dict) and config.get("quant_method", None) == "bitsandbytes"


def _importable() -> bool:
    return "bitsandbytes" in sys.modules or importlib.util.find_spec("bitsandbytes") is not None


def _warn_of_modules(config: PlainConfig, asked: PlainConfig) -> None:
    """Which modules are quantized stands in the checkpoint; somebody may ask for the same in other words."""
    for name in ("skip_modules", "quantize_embeddings", "quantize_experts"):
        if name in asked.asked and getattr(asked, name) != getattr(config, name):
            logger.warning(
                "%s=%r is ignored: the checkpoint's modules load as they are stored (%r)",
                *(name, getattr(asked, name), getattr(config, name)),
            )


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
        if isinstance(asked, dict) and asked.get("quant_method") == QUANT_METHOD:
            asked = PlainConfig.from_dict(asked)
        if not isinstance(asked, PlainConfig):
            return merge(quantization_config, asked, **kwargs)
        if is_bitsandbytes(quantization_config):
            config = KbitConfig.from_bitsandbytes(quantization_config)
            # The block size is known once the weights are read.
            check_stored(config, asked, "bits", "format", "double_quant")
            config.wanted_block_size = asked.block_size if "block_size" in asked.asked else None
            return with_run_time(config, asked)
        run_time = asked.asked & set(RUN_TIME_SETTINGS)
        # Given both, transformers warns that the checkpoint's is taken, which is not so for what `asked` changes.
        config = merge(quantization_config, None if run_time else asked, **kwargs)
        if isinstance(config, PlainConfig):
            check_stored(config, asked, "bits", "format", "double_quant", "block_size")
            _warn_of_modules(config, asked)
            config = with_run_time(config, asked)
        elif run_time:
            config = merge(quantization_config, asked, **kwargs)  # another library's checkpoint: transformers' error
        return config

    choose._kbit = True  # type: ignore[attr-defined]
    configs.from_dict = staticmethod(choose)
    quantizers.merge_quantization_configs = staticmethod(merge_or_take)
