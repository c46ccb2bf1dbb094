"""kbit inside transformers: `from_pretrained(..., quantization_config=KbitConfig(...))` and what it saves.

`register()` makes the config and the quantizer known through the public plug-in points. It is called by
`kbit.integrations.arm` as soon as `transformers.quantizers.auto` has been imported, hence while
`transformers.quantizers` itself may still be half imported: nothing here may import more than that module did.
"""

from __future__ import annotations

from kbit.config import QUANT_METHOD


def register() -> None:
    """Register kbit's config and quantizer in the transformers that is imported. Safe to call again."""
    from transformers.quantizers import auto

    from kbit.integrations.transformers import attach, native
    from kbit.integrations.transformers.config import KbitConfig
    from kbit.integrations.transformers.quantizer import quantizer_class

    if QUANT_METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(QUANT_METHOD)(KbitConfig)
    if QUANT_METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(QUANT_METHOD)(quantizer_class())
    native.install(auto)
    attach.install()
