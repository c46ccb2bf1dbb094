"""bitsandbytes.nn.modules, by kbit."""

from kbit.integrations.bitsandbytes.embedding import (
    Embedding,
    Embedding4bit,
    Embedding8bit,
    EmbeddingFP4,
    EmbeddingNF4,
    StableEmbedding,
)
from kbit.integrations.bitsandbytes.identity import absent_names
from kbit.integrations.bitsandbytes.legacy import MODULES
from kbit.integrations.bitsandbytes.linear import (
    Linear4bit,
    Linear8bitLt,
    LinearFP4,
    LinearNF4,
    fix_4bit_weight_quant_state_from_module,
)
from kbit.integrations.bitsandbytes.params import Int8Params, Params4bit

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
    "fix_4bit_weight_quant_state_from_module",
]

__getattr__ = absent_names(__name__, MODULES)
