"""How a run begins that does not begin at nothing: where it was, as a branch of another, or with another's weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from llm_jax.base.batch import Params
from llm_jax.base.errors import ConfigError, StorageError
from llm_jax.config import Config, differences, renamed, to_dict
from llm_jax.data.open import check_fingerprint
from llm_jax.infer.export import by_name, unpacked
from llm_jax.infer.load import example_batch, load_run, tokenizers_of
from llm_jax.losses.config import LossConfig
from llm_jax.optim.masks import path_of
from llm_jax.training.checkpoint import Checkpoints
from llm_jax.training.program import Parts
from llm_jax.training.state import TrainState, param_info

# Of the loss, what a run keeps: the shapes of its heads, the classes' order, the teacher's state.
FIXED_LOSS = ('classification.num_classes', 'classification.classes', 'contrastive.embedding_dim',
              'distillation.hidden', 'distillation.hidden_dim', 'distillation.checkpoint')


def check_resume(meta: dict, *, config: Config, fingerprint: dict, state_key: str, begin: int = 0) -> None:
  """Raises ConfigError naming what differs when this checkpoint is of another model or other data.

  At the step where a stage begins, `begin`, the data may be other data.
  """
  model = to_dict(type(config.model)()) | meta['config']['model']  # what it did not know had its default
  changed = {name: values for name, values in differences(model, to_dict(config)['model']).items()
             if name not in ('scan_unroll', 'remat', 'dropout', 'attention')}
  if changed:
    raise ConfigError('the checkpoint is of another model:\n  ' + '\n  '.join(
        f'config.model.{name}: checkpoint {old}, now {new}' for name, (old, new) in changed.items())
        + '\nPut it back, or start in another --workdir.')
  learnt = to_dict(LossConfig()) | renamed(meta['config']).get('loss', {})
  if (tuple(learnt['terms']), learnt['balance']) != (config.loss.terms, config.loss.balance):
    raise ConfigError(f'config.loss: the checkpoint learns {", ".join(learnt["terms"])} (balance {learnt["balance"]}), '
                      f'now it is {", ".join(config.loss.terms)} ({config.loss.balance}); put it back, or start in '
                      'another --workdir')
  for name, (old, new) in differences(learnt, to_dict(config)['loss']).items():
    if name in FIXED_LOSS:
      raise ConfigError(f'config.loss.{name}: the checkpoint has {old}, now it is {new}; put it back, or start in '
                        'another --workdir')
  chain = tuple(meta['config']['optim']['chain'])
  if chain != config.optim.chain:
    raise ConfigError(f'config.optim.chain: the checkpoint holds the state of {chain}, now it is {config.optim.chain}; '
                      'put it back, or start in another --workdir')
  if meta.get('state_key', state_key) != state_key:
    settings = differences(meta['config']['optim'], to_dict(config)['optim'])
    raise ConfigError(
        'config.optim: the optimizer would keep other arrays than the checkpoint holds; put back what was changed, or '
        'start in another --workdir:\n  ' + '\n  '.join(
            f'config.optim.{name}: checkpoint {old}, now {new}' for name, (old, new) in settings.items()))
  if meta['step'] < begin:
    raise ConfigError(f'config.stages: a stage begins at step {begin}, and the newest checkpoint that can be read is '
                      f'of step {meta["step"]}; move the newer ones out of checkpoints/ to go on from there')
  if not begin or meta['step'] != begin:
    check_fingerprint(meta['data'], fingerprint, meta['step'])


def report_resume(config: Config, meta: dict) -> None:
  say(f'going on from step {meta["step"]}')
  for name, (old, new) in differences(meta['config'], to_dict(config)).items():
    say(f'  changed since: config.{name}: {old} -> {new}')


def say(text: str) -> None:
  if jax.process_index() == 0:
    print(text, flush=True)


def first_state(parts: Parts, checkpoints: Checkpoints, mesh: Mesh) -> tuple[TrainState, dict[str, Any]]:
  """(state, what its checkpoint says of it): the newest of the run's own, else a branch's, else fresh ones with {}.

  A branch is another run as far as its record goes. Raises UserErrors.
  """
  config, abstract = parts.config, parts.abstract
  shapes = abstract.params, (abstract.step, abstract.opt_state)
  check = partial(check_resume, config=config, fingerprint=parts.fingerprint, state_key=parts.state_key)
  if checkpoints.steps():
    params, (step, opt_state), meta = checkpoints.restore(*shapes, check=partial(check, begin=parts.stage.begin))
    checkpoints.set_aside_after(meta['step'])
    report_resume(config, meta)
    return TrainState(step, params, opt_state), meta
  if config.start.whole:
    folder = Path(config.start.run).expanduser() / 'checkpoints'
    if not folder.is_dir():
      raise ConfigError(f'config.start.run: {config.start.run} has no checkpoints')
    with Checkpoints(folder, config.checkpoint, read_only=True) as theirs:
      params, (step, opt_state), meta = theirs.restore(
          *shapes, check=check, step=theirs.named(config.start.checkpoint, 'config.start.checkpoint'))
    report_resume(config, meta)
    return TrainState(step, params, opt_state), {name: meta.get(name) for name in ('stream_states', 'epoch')}
  return (with_weights_of(parts, mesh) if config.start.run else parts.init()), {}


def with_weights_of(parts: Parts, mesh: Mesh) -> TrainState:
  """A fresh state with the other run's weights, where it has them. Raises ConfigError for those of other shapes."""
  config, fresh = parts.config, parts.init()
  try:
    run = load_run(Path(config.start.run).expanduser(), mesh, config.start.checkpoint)
  except (StorageError, ConfigError) as e:
    raise ConfigError(str(e).replace('--workdir', 'config.start.run')
                      .replace('--checkpoint', 'config.start.checkpoint')) from None
  if tokenizers_of(parts.data) != tokenizers_of(run):
    raise ConfigError(f'config.start.run: {config.start.run} has another tokenizer; give config.data.tokenizer its '
                      'tokenizer.json')
  mine, info = by_name(fresh.params), param_info(example_batch(config), model=parts.model)
  other = unpacked(run.params, fresh.params, info, getattr(config.model, 'einsum', '') == 'bitnet')
  wrong = [name for name in mine.keys() & other.keys() if mine[name].shape != other[name].shape]
  if wrong:
    raise ConfigError(f'config.start.run: {config.start.run} is of another shape:\n  ' + '\n  '.join(
        f'{name}: {other[name].shape}, here {mine[name].shape}' for name in sorted(wrong)))
  for what, names in (('begin fresh', mine.keys() - other.keys()), ('are left out', other.keys() - mine.keys())):
    if names:
      say(f'of {config.start.run}, {what}: {", ".join(sorted(names))}')

  def pick(path: Any, leaf: jax.Array) -> jax.Array:
    return jax.device_put(other.get(path_of(path), leaf), leaf.sharding)

  params: Params = jax.tree_util.tree_map_with_path(pick, fresh.params)
  # What an optimizer keeps of the weights it keeps of the new ones.
  opt_state = jax.jit(parts.tx.init, out_shardings=parts.shardings.opt_state)(params)
  return TrainState(fresh.step, params, opt_state)
