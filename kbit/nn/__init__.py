"""Quantized layers and the conversion of whole models."""

from kbit.nn.convert import dequantize_model, model_memory, quantize_model
from kbit.nn.embedding import Embedding4bit, Embedding8bit
from kbit.nn.linear import Linear4bit, Linear8bit
from kbit.nn.training import SwitchBackLinear

__all__ = [
    "Embedding4bit",
    "Embedding8bit",
    "Linear4bit",
    "Linear8bit",
    "SwitchBackLinear",
    "dequantize_model",
    "model_memory",
    "quantize_model",
]
