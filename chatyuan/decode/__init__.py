"""Generation: greedy, sampling and beam search with a key-value cache, on tokens and on text."""

from chatyuan.decode.config import DecodeConfig
from chatyuan.decode.engine import DecodeOutput, make_generate
from chatyuan.decode.text import TextConfig, TextGenerator, TextResult

__all__ = [
    "DecodeConfig",
    "DecodeOutput",
    "TextConfig",
    "TextGenerator",
    "TextResult",
    "make_generate",
]
