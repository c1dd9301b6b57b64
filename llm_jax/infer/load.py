"""Loads a trained run or an exported model from its folder. Code in the folder is only executed if it is trusted."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from llm_jax.base import plugins
from llm_jax.base.batch import Params
from llm_jax.base.builder import build
from llm_jax.base.errors import ConfigError, DataError, StorageError
from llm_jax.base.files import check_run, latest_step
from llm_jax.base.multihost import say
from llm_jax.base.trees import merge, split
from llm_jax.config import Config
from llm_jax.config_file import read_values
from llm_jax.data.chat.find import folder_template
from llm_jax.data.chat.tokenizer import ChatTokenizer
from llm_jax.data.open import Data, data_fingerprint, open_data, with_special_tokens
from llm_jax.data.pipeline import example_batch
from llm_jax.data.sources.documents import shown
from llm_jax.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from llm_jax.infer.export import FILE, read_params
from llm_jax.infer.importers import importer_of
from llm_jax.losses.config import make_objective
from llm_jax.models.protocol import LanguageModel
from llm_jax.models.registry import make_model
from llm_jax.optim.chain import make_optimizer
from llm_jax.optim.groups import trainable_paths
from llm_jax.training.checkpoint import Checkpoints
from llm_jax.training.lost import lost
from llm_jax.training.manifest import check_run_files
from llm_jax.training.shardings import abstract_params, abstract_state, boxed_params, param_info, shardings_of
from llm_jax.training.stages import config_at


@dataclasses.dataclass(frozen=True)
class Opened:
  """A trained run without its weights."""

  config: Config
  tokenizer: Tokenizer | None
  encoder_tokenizer: Tokenizer | None  # for prompts; None: tokenizer encodes them too

  @property
  def prompt_tokenizer(self) -> Tokenizer | None:
    return self.tokenizer if self.encoder_tokenizer is None else self.encoder_tokenizer


@dataclasses.dataclass(frozen=True)
class Loaded(Opened):
  """A trained run in memory."""

  model: LanguageModel
  params: Params  # averaged, if the optimizer averages weights
  meta: dict  # of the checkpoint: step, data fingerprint, ...

  @property
  def mesh(self) -> Mesh:
    """That the parameters are on."""
    return jax.tree.leaves(self.params)[0].sharding.mesh


def tokenizers_of(source: Data | Loaded) -> list[str | None]:
  """The tokenizer and the prompt tokenizer, as JSON."""
  return [None if t is None else t.to_json() for t in (source.tokenizer, source.prompt_tokenizer)]


def open_run(workdir: Path, *, trust: bool = False, flag: str = '--workdir') -> Opened:
  """Opens the run in `workdir` without reading its weights; `flag` is what named the folder, for messages.

  The run's plug-ins must be loaded before; with `trust` the copies in the folder are executed. Raises UserErrors.
  """
  if (importer := importer_of(check_run(workdir, flag))) is not None:
    return importer.open(workdir, flag)
  check_run_files(workdir)
  config = read_config(workdir, trust, flag)
  def read(name: str) -> Tokenizer:
    return with_special_tokens(config.data, load_tokenizer(workdir / f'{name}.json'))

  tokenizer = read('tokenizer') if (workdir / 'tokenizer.json').exists() else None
  if tokenizer is not None and (template := folder_template(workdir)) is not None:
    tokenizer = ChatTokenizer(tokenizer, template)
  encoder_tokenizer = None
  if config.data.encoder_tokenizer is not None:
    encoder_tokenizer = read('encoder_tokenizer')
  return Opened(config, tokenizer, encoder_tokenizer)


def load_run(workdir: Path, mesh: Mesh, checkpoint: str = 'latest', *, trust: bool = False,
             module: Any = None, flag: str = '--workdir') -> Loaded:
  """Loads the run in `workdir` at 'latest', 'best' or a step, as `open_run` opens it. `module` is its model, if it was
  passed from Python. Raises UserErrors.
  """
  return read_run(open_run(workdir, trust=trust, flag=flag), workdir, mesh, checkpoint, module=module, flag=flag)


def read_run(run: Opened, workdir: Path, mesh: Mesh, checkpoint: str = 'latest', *, module: Any = None,
             flag: str = '--workdir') -> Loaded:
  """The run in `workdir` with its weights. Raises UserErrors."""
  if (importer := importer_of(workdir)) is not None:
    if checkpoint != 'latest':
      raise ConfigError(f'--checkpoint: {workdir} is a published model with one set of weights; leave it out; got '
                        f'{checkpoint!r}')
    return importer.read(run, workdir, mesh)
  config, tokenizers = run.config, (run.tokenizer, run.encoder_tokenizer)
  model = model_of(run, module)
  if (workdir / FILE).is_file():  # an exported model
    if checkpoint != 'latest':
      raise ConfigError(f'--checkpoint: {workdir} is an exported model with one set of weights; leave it out, '
                        f'or set it to latest; got {checkpoint!r}')
    boxed = boxed_params(example_batch(config.data), model=model)
    params, meta = read_params(workdir / FILE, abstract_params(boxed, mesh))
    return Loaded(config, *tokenizers, model, params, meta)
  if latest_step(workdir) < 0:
    raise StorageError(lost(workdir) or f'{flag}: {workdir} has no checkpoints yet')
  with Checkpoints(workdir / 'checkpoints', config.checkpoint, read_only=True) as checkpoints:
    params, meta = read_weights(checkpoints, checkpoints.named(checkpoint, '--checkpoint'), config, model, mesh)
  return Loaded(config_at(config, meta['step']), *tokenizers, model, params, meta)


def model_of(run: Opened, module: Any = None) -> LanguageModel:
  """The model of a run; `module` is that which was passed from Python, if any."""
  objective = make_objective(run.config.loss)
  return make_model(run.config.model, objective.heads, objective.num_weights, module)


def read_config(workdir: Path, trust: bool, flag: str = '--workdir') -> Config:
  """Reads a run's config. Raises StorageError, and ConfigError if there is no run or a plug-in is not loaded."""
  path = check_run(workdir, flag) / 'config.json'
  for line in plugins.check_notes(workdir, trust=trust):
    say(line)
  try:
    return build(Config, read_values(path, flag, trust))
  except (ValueError, ConfigError) as e:
    raise StorageError(f'{path}: damaged: {e}') from None


def read_weights(checkpoints: Checkpoints, step: int | None, config: Config, model: LanguageModel,
                 mesh: Mesh) -> tuple[Params, dict]:
  """(weights to evaluate, meta) of a checkpoint; weights are averaged if the optimizer averages them."""
  boxed = boxed_params(example_batch(config.data), model=model)
  if not any(link.averages for link in config.optim.links):
    params, _, meta = checkpoints.restore(abstract_params(boxed, mesh), step=step)
    return params, meta
  info = param_info(boxed)
  is_trainable, tx = trainable_paths(config.optim.groups, info), make_optimizer(config.optim, config.num_steps, info)
  state = abstract_state(boxed, mesh, tx=tx, is_trainable=is_trainable)
  params, kept, meta = checkpoints.restore(state.params, (state.step, state.opt_state), step=step)
  trainable, frozen = split(params, is_trainable)
  averaged = jax.jit(tx.evaluated, out_shardings=shardings_of(state.trainable))(kept[1], trainable)
  return merge(averaged, frozen), meta


def own_data(run: Loaded) -> Data:
  """Opens the data of a run. Raises DataError if they have changed since training."""
  if not run.config.data.path:
    raise ConfigError('--split: the model in this folder has no data of its own; evaluate it on other data with '
                      '--data=FILE')
  data = open_data(run.config.data)
  fingerprint = data_fingerprint(run.config.data, data, 0, 0)
  if any(fingerprint.get(name) != run.meta['data'].get(name) for name in ('train_tokens', 'encoder_tokenizer')):
    raise DataError(f'config.data.path: {shown(run.config.data.path)} has changed since training, so the '
                    'validation part is unknown; evaluate on other data with --data=FILE')
  return data
