"""The mathematics of every format, in plain torch; nothing here imports anything but torch."""

from kbit.formats.spec import BLOCK_SIZES, FORMAT_NAMES, Format
from kbit.formats.tensor import QuantizedTensor

__all__ = ["BLOCK_SIZES", "FORMAT_NAMES", "Format", "QuantizedTensor"]
