"""kbit: large language models in 8 and 4 bits, that fit, and run.

Public names load on first use: `import kbit` costs little and touches neither CUDA, triton nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kbit.integrations.arm import arm

__version__ = "0.1.0"

_PUBLIC = {
    "KbitConfig": "kbit.config",
    "Format": "kbit.formats",
    "QuantizedTensor": "kbit.formats",
    "quantize": "kbit.ops",
    "dequantize": "kbit.ops",
    "compile_backend": "kbit.ops.compiler",
    "Linear4bit": "kbit.nn",
    "Linear8bit": "kbit.nn",
    "SwitchBackLinear": "kbit.nn",
    "Embedding4bit": "kbit.nn",
    "Embedding8bit": "kbit.nn",
    "quantize_model": "kbit.nn",
    "dequantize_model": "kbit.nn",
    "model_memory": "kbit.nn",
    "demo_model": "kbit.assets",
    "prepare_for_training": "kbit.integrations.peft",
    "merge_adapters": "kbit.integrations.peft",
    "install_as_bitsandbytes": "kbit.integrations.bitsandbytes",
}
_SUBMODULES = ("config", "formats", "ops", "nn", "optim", "checkpoint", "plan", "eval", "integrations", "cli", "assets")

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from kbit.assets import demo_model as demo_model
    from kbit.config import KbitConfig as KbitConfig
    from kbit.formats import Format as Format
    from kbit.formats import QuantizedTensor as QuantizedTensor
    from kbit.integrations.bitsandbytes import install_as_bitsandbytes as install_as_bitsandbytes
    from kbit.integrations.peft import merge_adapters as merge_adapters
    from kbit.integrations.peft import prepare_for_training as prepare_for_training
    from kbit.nn import Embedding4bit as Embedding4bit
    from kbit.nn import Embedding8bit as Embedding8bit
    from kbit.nn import Linear4bit as Linear4bit
    from kbit.nn import Linear8bit as Linear8bit
    from kbit.nn import SwitchBackLinear as SwitchBackLinear
    from kbit.nn import dequantize_model as dequantize_model
    from kbit.nn import model_memory as model_memory
    from kbit.nn import quantize_model as quantize_model
    from kbit.ops import dequantize as dequantize
    from kbit.ops import quantize as quantize
    from kbit.ops.compiler import compile_backend as compile_backend


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
    elif name in _SUBMODULES:
        value = importlib.import_module(f"kbit.{name}")
    else:
        raise AttributeError(f"module 'kbit' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC, *_SUBMODULES})


arm()  # a KbitConfig works in `from_pretrained`, whichever of kbit and transformers is imported first
