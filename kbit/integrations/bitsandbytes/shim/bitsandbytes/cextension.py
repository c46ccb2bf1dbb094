"""Where bitsandbytes loads its compiled library; kbit has none."""

import torch

from kbit.integrations.bitsandbytes.identity import absent_names
from kbit.integrations.bitsandbytes.legacy import CEXTENSION
from kbit.integrations.bitsandbytes.legacy import NATIVE_LIBRARY as lib

COMPILED_WITH_CUDA = torch.version.cuda is not None
HIP_ENVIRONMENT = torch.version.hip is not None

__all__ = ["COMPILED_WITH_CUDA", "HIP_ENVIRONMENT", "lib"]

__getattr__ = absent_names(__name__, CEXTENSION)
