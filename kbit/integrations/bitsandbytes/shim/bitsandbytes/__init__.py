"""kbit under the name bitsandbytes: thin re-exports of kbit.integrations.bitsandbytes. See docs/guide-dropin.md."""

from bitsandbytes import functional, nn, optim, research, utils
from bitsandbytes.autograd._functions import MatmulLtState, matmul, matmul_4bit
from bitsandbytes.nn import modules
from bitsandbytes.optim import adam
from kbit.integrations.bitsandbytes.identity import VERSION as __version__

# transformers, accelerate and diffusers ask for this before they quantize on anything but CUDA.
features = {"multi_backend"}
supported_torch_devices = {"cpu", "cuda", "xpu", "hpu", "npu", "mps"}

__all__ = [
    "MatmulLtState",
    "__version__",
    "adam",
    "features",
    "functional",
    "matmul",
    "matmul_4bit",
    "modules",
    "nn",
    "optim",
    "research",
    "supported_torch_devices",
    "utils",
]
