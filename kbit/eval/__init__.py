"""How good a quantized model is: perplexity, error by layer, outlier features, and a report of all of it."""

from kbit.eval.layer_error import LayerError, layer_errors, quantized_layer_errors, relative_error
from kbit.eval.outliers import inject_outliers, scale_channels
from kbit.eval.perplexity import Perplexity, encode, perplexity

__all__ = [
    "LayerError",
    "Perplexity",
    "encode",
    "inject_outliers",
    "layer_errors",
    "perplexity",
    "quantized_layer_errors",
    "relative_error",
    "scale_channels",
]
