"""Checkpoints on disk: read and written tensor by tensor, quantized without ever holding a model in memory."""

from kbit.checkpoint.native import QuantizeSummary, quantize_checkpoint
from kbit.checkpoint.stream import CheckpointReader, CheckpointWriter

__all__ = ["CheckpointReader", "CheckpointWriter", "QuantizeSummary", "quantize_checkpoint"]
