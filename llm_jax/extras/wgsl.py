"""The validator of WGSL shaders by tree-sitter's grammar, which does not check types and names."""

from __future__ import annotations

from llm_jax.base.errors import ConfigError
from llm_jax.base.registry import NoSettings, register
from llm_jax.infer.validators import VALIDATORS, Validator


def wgsl() -> Validator:
  """Returns the validator. Raises ConfigError if the parser is not installed."""
  try:
    import tree_sitter
    import tree_sitter_wgsl_bevy
  except ImportError:
    raise ConfigError("config.eval.validator: wgsl needs a parser: pip install 'llm_jax[wgsl]'") from None
  parser = tree_sitter.Parser(tree_sitter.Language(tree_sitter_wgsl_bevy.language()))

  def accepts(text: str) -> bool:
    root = parser.parse(text.encode()).root_node
    return root.child_count > 0 and not root.has_error

  return accepts


register(VALIDATORS, 'wgsl', wgsl, NoSettings)
