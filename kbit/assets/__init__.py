"""What ships with kbit: a small language model, and texts to evaluate and fine-tune it (sources: README.md here)."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent


def demo_model() -> str:
    """The folder of the language model that ships with kbit (Llama architecture, 8 million parameters, bf16)."""
    return str(_FOLDER / "demo_model")


def heldout_text() -> str:
    """The path of a text of 200 KB that the shipped model has not seen, for evaluation."""
    return str(_FOLDER / "heldout.txt")
