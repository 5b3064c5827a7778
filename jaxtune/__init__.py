"""JAX-native instruction tuning: a Hugging Face folder in, a Hugging Face folder out."""

__version__ = "0.1.0"
