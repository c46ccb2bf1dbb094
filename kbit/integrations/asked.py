"""A KbitConfig beside a quantized checkpoint: how its weights are multiplied may change, not their bytes."""

from __future__ import annotations

import copy
import dataclasses
from typing import TypeVar

from kbit.config import RUN_TIME_SETTINGS, KbitConfig

Config = TypeVar("Config", bound=KbitConfig)


def check_stored(config: KbitConfig, asked: KbitConfig, *names: str) -> None:
    """ValueError where `asked` spells out another storage than that of the checkpoint with `config`."""
    for name in names:
        wanted, stored = getattr(asked, name), getattr(config, name)
        if name in asked.asked and wanted != stored and not (config.bits == 8 and name == "double_quant"):
            fmt = config.weight_format if "block_size" in names else config.format
            raise ValueError(
                f"the checkpoint is stored with {name}={stored!r} ({fmt}), quantization_config asks for {wanted!r}: "
                f"leave {name} out, or quantize the floating point model"
            )


def with_run_time(config: Config, asked: KbitConfig) -> Config:
    """A copy of `config` that multiplies as `asked` spells out; what is stored stays. ValueError as from KbitConfig."""
    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(KbitConfig)}
    settings |= {name: getattr(asked, name) for name in asked.asked & set(RUN_TIME_SETTINGS)}
    KbitConfig(**settings)  # refuses what these bits would ignore
    config = copy.copy(config)
    for name in RUN_TIME_SETTINGS:
        setattr(config, name, settings[name])
    return config
