"""llm_jax: a pure-function training stack for language models in JAX."""

__version__ = '0.1.0'
