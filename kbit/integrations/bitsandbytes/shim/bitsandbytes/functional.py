"""bitsandbytes.functional, by kbit."""

from kbit.integrations.bitsandbytes.blockwise import (
    dequantize_4bit,
    dequantize_blockwise,
    dequantize_fp4,
    dequantize_nf4,
    gemv_4bit,
    quantize_4bit,
    quantize_blockwise,
    quantize_fp4,
    quantize_nf4,
)
from kbit.integrations.bitsandbytes.codes import (
    create_dynamic_map,
    create_fp8_map,
    create_linear_map,
    create_normal_map,
    get_4bit_type,
)
from kbit.integrations.bitsandbytes.identity import absent_names
from kbit.integrations.bitsandbytes.int8 import (
    int8_double_quant,
    int8_linear_matmul,
    int8_mm_dequant,
    int8_vectorwise_dequant,
    int8_vectorwise_quant,
)
from kbit.integrations.bitsandbytes.legacy import FUNCTIONAL
from kbit.integrations.bitsandbytes.legacy import NATIVE_LIBRARY as lib
from kbit.integrations.bitsandbytes.quant_state import QuantState, pack_dict_to_tensor, unpack_tensor_to_dict
from kbit.integrations.bitsandbytes.utils import get_ptr, has_avx512bf16, is_on_gpu

C = 127.0
# Filled by bitsandbytes with tables of the last device used; kbit keeps one a device.
name2qmap: dict = {}

__all__ = [
    "C",
    "QuantState",
    "create_dynamic_map",
    "create_fp8_map",
    "create_linear_map",
    "create_normal_map",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_fp4",
    "dequantize_nf4",
    "gemv_4bit",
    "get_4bit_type",
    "get_ptr",
    "has_avx512bf16",
    "int8_double_quant",
    "int8_linear_matmul",
    "int8_mm_dequant",
    "int8_vectorwise_dequant",
    "int8_vectorwise_quant",
    "is_on_gpu",
    "lib",
    "name2qmap",
    "pack_dict_to_tensor",
    "quantize_4bit",
    "quantize_blockwise",
    "quantize_fp4",
    "quantize_nf4",
    "unpack_tensor_to_dict",
]

__getattr__ = absent_names(__name__, FUNCTIONAL)
