"""The config class that transformers keeps on a model: kbit's plain dataclass plus what transformers calls on it."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from kbit.checkpoint import bnb
from kbit.config import RUN_TIME_SETTINGS
from kbit.config import KbitConfig as PlainConfig

BITSANDBYTES = "bitsandbytes"


# transformers compares class names when a checkpoint brings a config and the caller passes another: same name.
class KbitConfig(PlainConfig, QuantizationConfigMixin):  # type: ignore[misc]
    """`kbit.KbitConfig` as transformers wants it. Users pass `kbit.KbitConfig`; this class is made from it."""

    # How the checkpoint that this config came from stores its weights; what is saved is native in any case.
    layout = "native"
    # The block size that the caller spelled out, for the layout whose config.json does not tell it.
    wanted_block_size: int | None = None

    __repr__ = PlainConfig.__repr__
    __eq__ = PlainConfig.__eq__
    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def from_plain(cls, config: PlainConfig) -> KbitConfig:
        """The same settings in this class."""
        if isinstance(config, cls):
            return config
        return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(PlainConfig)})

    @classmethod
    def from_dict(  # type: ignore[override]
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """From the `quantization_config` of a config.json. Keyword arguments that are fields override it.

        Raises ValueError for keys or values that do not exist.
        """
        known = {field.name for field in dataclasses.fields(PlainConfig)}
        config = super().from_dict({**config_dict, **{key: kwargs[key] for key in kwargs if key in known}})
        if return_unused_kwargs:
            return config, {key: value for key, value in kwargs.items() if key not in known}
        return config

    @classmethod
    def from_bitsandbytes(cls, config_dict: dict[str, Any]) -> KbitConfig:
        """The config that loads a bitsandbytes checkpoint into kbit's layers. ValueError as from `bnb.kbit_config`."""
        config = cls.from_plain(bnb.kbit_config(config_dict))
        config.layout = BITSANDBYTES
        return config

    def to_diff_dict(self) -> dict[str, Any]:
        """Every field: what a checkpoint says must not depend on the defaults of the version that reads it."""
        return self.to_dict()

    def get_loading_attributes(self) -> dict[str, Any]:
        """Settings that may differ between two loads of one checkpoint, because they do not change its bytes."""
        return {name: getattr(self, name) for name in RUN_TIME_SETTINGS}
