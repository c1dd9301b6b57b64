"""The interface of models, and the adapter that turns any Flax module into one.

A module that maps tokens [B, T] to logits [B, T, V] is enough. Everything else is optional and has a default here:
hidden states (`readout`), a cache (`init_cache`, `prefill`, `decode`), the attributes of ModelConfig.
Dims: B batch, T length, S cache length, V vocab.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.base.batch import Batch, Cache
from llm_jax.base.errors import ConfigError
from llm_jax.base.registry import is_frozen, settings_from_signature
from llm_jax.losses.readout import Readout

FEATURES = frozenset(field.name for field in dataclasses.fields(Batch))


class LanguageModel(Protocol):
  """A hashable Flax module, called bound or through `apply(method=...)`."""

  cfg: Any  # a ModelConfig
  reads: frozenset[str]  # features of a Batch that it uses
  needs: frozenset[str]  # those of `reads` that it requires and not all tasks provide
  prompt_in_row: bool  # whether a prompt and its answer share a row
  init: Callable[..., Any]  # flax.linen.Module.init and apply
  apply: Callable[..., Any]

  def __call__(self, batch: Batch, *, train: bool = False) -> jax.Array:
    """Logits, float32 [B, T, V]."""
    ...

  def readout(self, batch: Batch, *, train: bool = False) -> Readout:
    """Hidden states, with the function from them to logits."""
    ...

  def init_cache(self, batch_size: int, max_len: int) -> Cache:
    """An empty cache for rows of up to `max_len` tokens: a tree of leaves [B, ...].

    Two optional members make generation faster. `decode_variables(params)` returns the variables for `apply` in prefill
    and decode, in another layout than {'params': params}. `cache_grows` = True allows a small cache first: init_cache
    is called with fewer tokens, and a full cache becomes the beginning of a larger one along each dimension.
    """
    ...

  def prefill(self, tokens_BT: jax.Array, lengths_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """Reads right-padded prompts; returns logits [B, V] for the token after each, and the cache."""
    ...

  def decode(self, tokens_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """Reads one more token per row; returns logits [B, V] for the token after it, and the cache."""
    ...


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The config section of a model, with defaults for everything that the package needs from a model's config."""

  name: str = ''  # one of models.registry.MODELS
  vocab_size: int | None = None  # None: the tokenizer's
  max_len: int | None = None  # tokens of the longest row; None: data.seq_len

  @property
  def prefix_attention(self) -> bool:
    """Whether a prefix is attended to in both directions."""
    return False

  @property
  def operand_dtype(self) -> jnp.dtype:
    """The dtype of operands of matrix products."""
    return jnp.dtype('float32')

  @property
  def longest_prompt(self) -> int:
    """Length of the longest prompt that leaves room for one more token."""
    return (self.max_len or 0) - 1

  def positions_of(self, seq_len: int) -> int:
    """The number of attention positions for rows of seq_len tokens."""
    return seq_len

  def flops_per_token(self, seq_len: int) -> float | None:
    """Matrix FLOPs of a training step per token; None: training/flops.py counts them in the traced forward pass."""
    return None

  @property
  def title(self) -> str:
    """The model in messages."""
    return f'the model {self.name}'

  def too_small(self, needed: int) -> str:
    """The message that vocab_size is smaller than the vocabulary of the data."""
    return (f'config.model.vocab_size: {self.vocab_size} is less than the {needed} tokens of the data; leave it None '
            f'or set it to {needed} or more')

  def describe(self, seq_len: int, segments: bool) -> list[str]:
    """Lines to print at the start of a run."""
    return [f'model: {self.name}, vocabulary {self.vocab_size}']


def too_few_logits(cfg: ModelConfig, num_logits: int, needed: int) -> str:
  """The message that a module has fewer logits than the data have tokens."""
  return (f'{cfg.title} has logits for {num_logits} tokens, but the data have {needed}: make it for {needed} or more, '
          'or use a tokenizer with fewer (config.data.tokenizer, config.data.vocab_size)')


def adapt_model(name: str, value: Any, settings: type | None) -> tuple[Any, type]:
  """(function config -> module, the config class with ModelConfig's attributes added).

  With `settings`, `value` is called with the config; otherwise with the config fields named like its parameters.
  """
  own = settings or settings_from_signature(value)
  if settings is not None and not is_frozen(settings):
    raise ConfigError(f'model {name!r}: {settings.__name__} must be a dataclass: @dataclasses.dataclass(frozen=True)')
  cls = own
  if not issubclass(own, ModelConfig):
    cls = dataclasses.make_dataclass(own.__name__, [('name', str, dataclasses.field(default=name))],
                                     bases=(own, ModelConfig), frozen=True)
    cls.__module__ = own.__module__
  parameters = inspect.signature(value).parameters

  def make(cfg: Any) -> nn.Module:
    if settings is not None:
      return value(cfg)
    return value(**{field: getattr(cfg, field) for field in parameters if field != 'name' and hasattr(cfg, field)})

  return make, cls


def as_language_model(module: Any, cfg: Any) -> LanguageModel:
  """The module itself if it has `readout`, else a LanguageModel around a module that maps tokens to logits."""
  return module if hasattr(type(module), 'readout') else cast(LanguageModel, TokensToLogits(module, cfg))


class TokensToLogits(nn.Module):
  """A LanguageModel around a module that maps tokens [B, T] to logits [B, T, V]. Parameters keep their paths.

  The module receives the features of a Batch, and `train`, that are parameters of its __call__. A module without a
  cache recomputes the whole row for each generated token.
  """

  module: nn.Module
  cfg: Any
  needs: ClassVar[frozenset[str]] = frozenset()
  prompt_in_row: ClassVar[bool] = True
  hidden_states: ClassVar[bool] = False

  def setup(self) -> None:
    nn.share_scope(self, self.module)

  @property
  def accepts(self) -> frozenset[str]:
    return frozenset(inspect.signature(type(self.module).__call__).parameters) & (FEATURES | {'train'})

  @property
  def reads(self) -> frozenset[str]:
    return (self.accepts & FEATURES) | {'tokens', 'targets', 'loss_mask'}

  def __call__(self, batch: Batch, *, train: bool = False) -> jax.Array:
    parameters = inspect.signature(type(self.module).__call__).parameters
    given = {}
    for name in self.accepts & FEATURES - {'tokens'}:
      x = getattr(batch, name)
      if x is not None or parameters[name].default is inspect.Parameter.empty:
        given[name] = feature_of_one_document(name, batch.tokens) if x is None else x
    if 'train' in self.accepts:
      given['train'] = train
    return self.module(batch.tokens, **given).astype(jnp.float32)

  def readout(self, batch: Batch, *, train: bool = False) -> Readout:
    return Readout(self(batch, train=train), (), logits_of)

  def decode_variables(self, params: Any) -> dict[str, Any]:
    own = getattr(self.module, 'decode_variables', None)
    return {'params': params} if own is None else own(params)

  def init_cache(self, batch_size: int, max_len: int) -> Cache:
    if hasattr(self.module, 'init_cache'):
      return self.module.init_cache(batch_size, max_len)
    return {'tokens_BS': jnp.zeros((batch_size, max_len), jnp.int32),
            'length_B': jnp.zeros(batch_size, jnp.int32)}

  def prefill(self, tokens_BT: jax.Array, lengths_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    if hasattr(self.module, 'prefill'):
      return self.module.prefill(tokens_BT, lengths_B, cache)
    cache = cache | {'tokens_BS': cache['tokens_BS'].at[:, :tokens_BT.shape[1]].set(tokens_BT), 'length_B': lengths_B}
    return self._last_logits(cache), cache

  def decode(self, tokens_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    if hasattr(self.module, 'decode'):
      return self.module.decode(tokens_B, cache)
    write = jax.vmap(lambda row_S, at, token: row_S.at[at].set(token))
    cache = cache | {'tokens_BS': write(cache['tokens_BS'], cache['length_B'], tokens_B),
                     'length_B': cache['length_B'] + 1}
    return self._last_logits(cache), cache

  def _last_logits(self, cache: Cache) -> jax.Array:
    tokens_BS = cache['tokens_BS']
    blank = jnp.zeros_like(tokens_BS)
    logits_BSV = self(Batch(tokens=tokens_BS, targets=blank, loss_mask=blank.astype(jnp.float32)))
    return jnp.take_along_axis(logits_BSV, (cache['length_B'] - 1)[:, None, None], axis=1)[:, 0]


def feature_of_one_document(name: str, tokens_BT: jax.Array) -> jax.Array:
  """A feature that a batch does not have, as when text is generated: each row is one document."""
  if name == 'positions':
    return jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
  return jnp.full_like(tokens_BT, int(name == 'segment_ids'))


def logits_of(w: Any, x_BTV: jax.Array) -> jax.Array:
  """The projection of a readout whose hidden states are already logits."""
  return x_BTV
