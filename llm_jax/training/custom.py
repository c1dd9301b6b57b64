"""Parts of a run that are passed from Python instead of being named in its config.

The config names them `custom` and describes them, so config.json stays complete and a resumed run detects a change.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import optax

from llm_jax.base.builder import Sections
from llm_jax.base.callbacks import CALLBACKS
from llm_jax.base.errors import ConfigError
from llm_jax.base.registry import register
from llm_jax.config import Config, replace
from llm_jax.data.given import GivenBatches
from llm_jax.losses.config import LOSSES, LossConfig
from llm_jax.losses.function import FunctionTerm, LossFunction, adapt_loss
from llm_jax.models.protocol import ModelConfig, too_few_logits
from llm_jax.models.registry import MODELS
from llm_jax.optim.chain import TRANSFORMS, OptimConfig
from llm_jax.optim.link import Link
from llm_jax.training.histograms import Histograms

NAME = 'custom'


@dataclasses.dataclass(frozen=True)
class CustomModel(ModelConfig):
  """The config section of a Flax module passed from Python."""

  name: str = NAME
  description: str = ''

  @property
  def module_name(self) -> str:
    return self.description.partition('(')[0]

  @property
  def title(self) -> str:
    return f'your model {self.module_name}'.rstrip()

  def too_small(self, needed: int) -> str:
    return too_few_logits(self, self.vocab_size or 0, needed)

  def describe(self, seq_len: int, segments: bool) -> list[str]:
    return [f'model: {self.module_name}, passed from Python, logits for {self.vocab_size} tokens']


@dataclasses.dataclass(frozen=True)
class CustomLoss(FunctionTerm):
  """The config section of a loss passed from Python."""

  description: str = ''


@dataclasses.dataclass(frozen=True)
class CustomOptimizer(Link):
  """The config section of an Optax transformation passed from Python."""

  description: str = ''


def refuse_custom(cfg: CustomModel) -> Any:
  """Raises ConfigError: a config cannot create a module that was passed from Python."""
  raise ConfigError(f'config.model: {cfg.description} was passed from Python; pass it again: '
                    'llm_jax.train(config, workdir, model=...), llm_jax.load(workdir, model=...)')


register(MODELS, NAME, refuse_custom, CustomModel, listed=False)
register(LOSSES, NAME, CustomLoss, listed=False)
register(TRANSFORMS, NAME, CustomOptimizer, listed=False)


@dataclasses.dataclass(frozen=True)
class Custom:
  """The arguments of llm_jax.train besides config and folder; None: as in the config."""

  model: Any = None  # a Flax module
  tx: optax.GradientTransformation | None = None
  loss: LossFunction | None = None
  batches: GivenBatches | None = None
  callbacks: tuple[Callable[[Any], Any], ...] = ()
  summary: tuple[str, ...] = ()  # further lines of the summary that is printed before the first step

  @property
  def loss_terms(self) -> dict[str, Any]:
    """{'custom': the term for the loss function}; {} without one."""
    return {} if self.loss is None else {NAME: adapt_loss(NAME, self.loss, None)[1]()}


def with_custom(config: Config, custom: Custom) -> Config:
  """The config with the custom parts named in it. Raises ConfigError if it names one that was not passed."""
  if custom.model is not None:
    config = replace(config, model=CustomModel(
        vocab_size=getattr(custom.model, 'vocab_size', None) or config.model.vocab_size,
        description=describe_part(custom.model)))
  if custom.loss is not None:
    term = CustomLoss(description=describe_part(custom.loss))
    config = replace(config, loss=LossConfig(terms=(NAME,), sections=Sections({NAME: term})))
  if custom.tx is not None:
    link = CustomOptimizer(description='an optax.GradientTransformation')
    config = replace(config, optim=OptimConfig(
        chain=(NAME,), schedule='constant', groups=config.optim.groups, sections=Sections({NAME: link})))
  if custom.batches is not None:
    num_rows, seq_len = custom.batches.first()['tokens'].shape
    config = replace(config, data=dataclasses.replace(config.data, seq_len=seq_len), batch_tokens=num_rows * seq_len,
                     tokens_per_device=num_rows * seq_len)
  given = {'model': custom.model, 'loss': custom.loss, 'tx': custom.tx}
  named = {'model': config.model.name == NAME, 'loss': NAME in config.loss.terms, 'tx': NAME in config.optim.chain}
  if missing := [part for part in given if named[part] and given[part] is None]:
    raise ConfigError(f'config: the run was trained with {" and ".join(missing)} passed from Python; pass it '
                      f'again: llm_jax.train(config, workdir, {", ".join(f"{part}=..." for part in missing)})')
  return config


def with_named_callbacks(custom: Custom, config: Config) -> Custom:
  """`custom` with the callbacks added that config.log asks for."""
  named = [CALLBACKS[name](CALLBACKS.section(name, config.log.sections)) for name in config.log.callbacks]
  every = config.checkpoint.export_every
  exports = [] if every is None else [CALLBACKS['export'](SimpleNamespace(
      every=every, model=config.model, where='config.checkpoint.export_every'))]
  return dataclasses.replace(custom, callbacks=(
      *custom.callbacks, Histograms(config.log.histograms_every), *named, *exports))


def describe_part(part: Any) -> str:
  """A description of a module by its fields, or of a function by its name, without memory addresses."""
  text = f'{part.__module__}.{part.__qualname__}' if hasattr(part, '__qualname__') else repr(part)
  return re.sub(r' at 0x[0-9a-f]+', '', re.sub(r'\s+', ' ', text))


def as_callbacks(callbacks: Iterable[Callable[[Any], Any]] | Callable[[Any], Any]) -> tuple[Callable[[Any], Any], ...]:
  """One callback or several. Raises ConfigError for what cannot be called."""
  found = (callbacks,) if callable(callbacks) else tuple(callbacks)
  if wrong := [callback for callback in found if not callable(callback)]:
    raise ConfigError(f'callbacks: {wrong[0]!r} is not callable; pass functions of an Event')
  return found
