"""bitsandbytes.autograd._functions, by kbit."""

import logging

from kbit.integrations.bitsandbytes.identity import absent_names
from kbit.integrations.bitsandbytes.legacy import AUTOGRAD
from kbit.integrations.bitsandbytes.matmul import MatmulLtState, matmul, matmul_4bit

# Scripts silence warnings of bitsandbytes here.
logger = logging.getLogger(__name__)

__all__ = ["MatmulLtState", "logger", "matmul", "matmul_4bit"]

__getattr__ = absent_names(__name__, AUTOGRAD)
