"""bitsandbytes.nn, by kbit."""

from bitsandbytes.nn import modules, parametrize
from bitsandbytes.nn.modules import (
    Embedding,
    Embedding4bit,
    Embedding8bit,
    EmbeddingFP4,
    EmbeddingNF4,
    Int8Params,
    Linear4bit,
    Linear8bitLt,
    LinearFP4,
    LinearNF4,
    Params4bit,
    StableEmbedding,
)
from kbit.integrations.bitsandbytes.identity import absent_names
from kbit.integrations.bitsandbytes.legacy import MODULES

__all__ = [
    "Embedding",
    "Embedding4bit",
    "Embedding8bit",
    "EmbeddingFP4",
    "EmbeddingNF4",
    "Int8Params",
    "Linear4bit",
    "Linear8bitLt",
    "LinearFP4",
    "LinearNF4",
    "Params4bit",
    "StableEmbedding",
    "modules",
    "parametrize",
]

__getattr__ = absent_names(__name__, MODULES)
