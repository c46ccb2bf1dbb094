"""bitsandbytes.utils, by kbit."""

from kbit.integrations.bitsandbytes.identity import absent_names
from kbit.integrations.bitsandbytes.legacy import UTILS
from kbit.integrations.bitsandbytes.quant_state import pack_dict_to_tensor, unpack_tensor_to_dict
from kbit.integrations.bitsandbytes.utils import (
    INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING,
    LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING,
    OutlierTracer,
    execute_and_return,
    find_outlier_dims,
    replace_linear,
    sync_gpu,
)

__all__ = [
    "INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING",
    "LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING",
    "OutlierTracer",
    "execute_and_return",
    "find_outlier_dims",
    "pack_dict_to_tensor",
    "replace_linear",
    "sync_gpu",
    "unpack_tensor_to_dict",
]

__getattr__ = absent_names(__name__, UTILS)
