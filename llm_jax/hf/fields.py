"""Fields: the config of a published model, read once each, so that what no field of ours expresses is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_jax.base.errors import ConfigError

# Fields that say nothing about what the model computes.
IGNORED = frozenset((
    '_attn_implementation', '_name_or_path', 'architectures', 'attention_dropout', 'attn_pdrop', 'auto_map',
    'bos_token_id', 'cache_implementation', 'chunk_size_feed_forward', 'classifier_dropout', 'dtype', 'embd_pdrop',
    'embedding_dropout', 'eos_token_id', 'finetuning_task', 'id2label', 'initializer_range', 'is_llama_config',
    'label2id', 'model_type', 'n_ctx', 'output_attentions', 'output_hidden_states', 'pad_token_id', 'pretraining_tp',
    'problem_type', 'reorder_and_upcast_attn', 'resid_pdrop', 'residual_dropout', 'return_dict',
    'rope_interleaved', 'summary_activation', 'summary_first_dropout', 'summary_proj_to_labels', 'summary_type',
    'summary_use_proj', 'task_specific_params', 'tokenizer_class', 'torch_dtype', 'transformers.js_config',
    'transformers_version', 'unsloth_fixed', 'unsloth_version', 'use_cache', 'is_decoder', 'gradient_checkpointing',
    'max_sequence_length', 'num_labels', 'output_past', 'predict_special_tokens', 'tie_encoder_decoder', 'torchscript',
    'use_bfloat16', 'tf_legacy_loss', 'output_scores', 'return_dict_in_generate', 'prefix', 'sep_token_id',
    # Of generation.
    'max_length', 'min_length', 'do_sample', 'early_stopping', 'num_beams', 'num_beam_groups', 'diversity_penalty',
    'temperature', 'top_k', 'top_p', 'typical_p', 'repetition_penalty', 'length_penalty', 'no_repeat_ngram_size',
    'encoder_no_repeat_ngram_size', 'bad_words_ids', 'num_return_sequences', 'forced_bos_token_id',
    'forced_eos_token_id', 'remove_invalid_values', 'exponential_decay_length_penalty', 'suppress_tokens',
    'begin_suppress_tokens', 'decoder_start_token_id'))


class Fields:
  """The values of a config.json. What is wrong is collected in `problems`."""

  def __init__(self, values: Mapping[str, Any]):
    self.values, self._used, self.problems = dict(values), set[str](), list[str]()

  def get(self, name: str, default: Any = None) -> Any:
    """The value of a field; `default`, that of transformers, where it is absent."""
    self._used.add(name)
    return self.values.get(name, default)

  def number(self, name: str, default: Any = None) -> Any:
    """The same for a number, which must be there if there is no default; None counts as absent."""
    value = self.get(name, default)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 2**31:
      self.problems.append(f'{name}: must be a number below 2^31; got {str(value)[:60]!r}')
      return 1
    return value

  def count(self, name: str, default: Any = None, most: int = 2**31 - 1) -> int:
    """The same for a whole number from 1 to `most`."""
    value = self.number(name, default)
    if value != int(value) or not 1 <= value <= most:
      self.problems.append(f'{name}: must be a whole number from 1 to {most}; got {value!r}')
      return 1
    return int(value)

  def flag(self, name: str, default: bool) -> bool:
    """The same for true or false; None counts as the default."""
    value = self.get(name, default)
    value = default if value is None else value
    if not isinstance(value, bool):
      self.problems.append(f'{name}: must be true or false; got {value!r}')
    return value is True

  def only(self, name: str, default: Any, *legal: Any) -> None:
    """Notes a problem unless the field has the default or a legal value."""
    value = self.get(name, default)
    if value != default and value not in legal:
      self.problems.append(f'{name}={value!r}; it would fit with {" or ".join(map(repr, (default, *legal)))}')

  def choice(self, name: str, default: Any, table: Mapping[Any, Any]) -> Any:
    """The entry of the table for the field's value."""
    value = self.get(name, default)
    if not isinstance(value, str) or value not in table:
      self.problems.append(f'{name}={value!r}; it would fit with {", ".join(map(repr, table))}')
      return next(iter(table.values()))
    return table[value]

  def finish(self, where: str) -> None:
    """Raises ConfigError for problems, and for unknown fields that are set."""
    unknown = [f'{name}={str(value)[:60]}: unknown field' for name, value in self.values.items()
               if value and name not in self._used | IGNORED and not _no_window(name, value) and name[0] != '_']
    if self.problems or unknown:
      raise ConfigError(f'{where}: the model cannot be computed here, because of its fields\n  '
                        + '\n  '.join([*self.problems, *unknown]))


def _no_window(name: str, value: Any) -> bool:
  return name == 'layer_types' and isinstance(value, list) and all(kind == 'full_attention' for kind in value)


def name_for(table: Mapping[str, Any], value: Any) -> str | None:
  """The first key with this value; None if there is none."""
  return next((name for name, entry in table.items() if entry == value), None)
