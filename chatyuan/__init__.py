"""ChatYuan: from raw Chinese text to an aligned chat model, in JAX."""

__version__ = "0.1.0"
