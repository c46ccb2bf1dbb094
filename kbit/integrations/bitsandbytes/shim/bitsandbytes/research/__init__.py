"""bitsandbytes.research was removed from bitsandbytes; every name says what to use instead."""

from kbit.integrations.bitsandbytes.identity import absent_names
from kbit.integrations.bitsandbytes.legacy import RESEARCH

__all__: list[str] = []

__getattr__ = absent_names(__name__, RESEARCH)
