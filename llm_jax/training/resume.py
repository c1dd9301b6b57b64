"""Resumes a run, branches from another run, or warm-starts from another run's weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from llm_jax.base.batch import Params
from llm_jax.base.builder import build, to_dict
from llm_jax.base.errors import ConfigError, StorageError
from llm_jax.base.fields import DTYPES
from llm_jax.base.files import unused
from llm_jax.base.host_memory import fetched
from llm_jax.base.multihost import say
from llm_jax.base.redaction import public
from llm_jax.base.storage import as_start_error, is_remote, place_of, read_start
from llm_jax.base.trees import by_name, merge, path_of, split
from llm_jax.config import Config, differences
from llm_jax.data.open import check_fingerprint
from llm_jax.infer.export import EXPORTERS
from llm_jax.infer.importers import importer_of
from llm_jax.infer.load import load_run
from llm_jax.optim.chain import OptimConfig
from llm_jax.training.checkpoint import Checkpoints
from llm_jax.training.growth import check_tokenizers, grow
from llm_jax.training.program import Program
from llm_jax.training.state import TrainState


def check_resume(meta: dict, *, config: Config, fingerprint: dict, state_key: str, advice: str, begin: int = 0,
                 end_row: Callable[[int], int] | None = None) -> None:
  """Raises ConfigError with the differences if a checkpoint is of other data, another model, loss or optimizer, and
  StorageError if it was not trained up to row `end_row(step)`.

  At step `begin`, the begin of a stage, the data may change. `advice` ends the message.
  """
  saved, now = public(with_new_fields(meta['config'])), public(to_dict(config))
  if meta['step'] < begin:
    raise ConfigError(f'config.stages: a stage begins at step {begin}, but the newest intact checkpoint is of step '
                      f'{meta["step"]}; to resume from it, move the newer ones out of checkpoints/')
  try:  # first, as other data may need another vocabulary
    if not begin or meta['step'] != begin:
      check_fingerprint(meta['data'], fingerprint, meta['step'], differences(saved['data'], now['data']))
    check_same_parts(saved, config, meta['state_key'] == state_key)
  except ConfigError as e:
    raise ConfigError(f'{e}\n{advice}') from None
  rows = meta.get('position', {}).get('rows')
  if end_row is not None and rows is not None and begin < meta['step'] and rows != end_row(meta['step']):
    raise StorageError(f'it was trained up to row {rows} of the data, but by rewinds.json it must be row '
                       f'{end_row(meta["step"])}: that file was lost, changed, or is of another run')


def with_new_fields(saved: dict) -> dict:
  """The values of a config with those of fields that its version did not have, if it can still be built."""
  try:
    built = to_dict(build(Config, saved))
  except ConfigError:
    return saved
  later = {name: 'float32' for name in DTYPES[1:] if name in built['model']}  # as before they were fields
  return built | {'model': built['model'] | later | saved['model']}


def check_same_parts(saved: dict, config: Config, same_state: bool) -> None:
  """Raises ConfigError if the model, losses or optimizer differ from those of the config `saved`."""
  def listed(section: str, found: dict[str, tuple[Any, Any]]) -> str:
    return ''.join(f'\n  config.{section}.{name}: checkpoint {old}, now {new}' for name, (old, new) in found.items())

  changed = {name: values for name, values in differences(saved['model'], public(to_dict(config.model))).items()
             if name not in ('scan_unroll', 'remat', 'dropout', 'attention')}
  if changed:
    raise ConfigError(f'the checkpoint has another model:{listed("model", changed)}')
  loss = differences(saved['loss'], public(to_dict(config.loss)))
  fixed = {f'{name}.{field}' for name, term in config.loss.sections.items() for field in term.fixed}
  if found := {name: values for name, values in loss.items() if name in ('terms', 'balance') or name in fixed}:
    raise ConfigError(f'the checkpoint has another loss:{listed("loss", found)}')
  settings = differences(saved['optim'], public(to_dict(config.optim)))
  if 'chain' in settings:
    raise ConfigError(f'the checkpoint has another optimizer:{listed("optim", {"chain": settings["chain"]})}')
  if not same_state:
    raise ConfigError('config.optim: the optimizer state has other arrays than that of the checkpoint:'
                      + listed('optim', settings))


def report_resume(config: Config, meta: dict) -> None:
  """Prints the step that a run resumes from and the config fields that changed."""
  say(f'resuming from step {meta["step"]}')
  for name, (old, new) in differences(public(with_new_fields(meta['config'])), public(to_dict(config))).items():
    say(f'  changed: config.{name}: {old} -> {new}')
  report_rate(config, meta)


def report_rate(config: Config, meta: dict) -> None:
  """Prints the learning rate of the next update by the old and the new schedule, if they differ."""
  try:
    before = build(OptimConfig, meta['config']['optim'])
    old, new = (float(optim.make_schedule(num_steps)(meta['step'])) for optim, num_steps in (
        (before, meta['config']['num_steps']), (config.optim, config.num_steps)))
  except ConfigError:  # the old config names parts that are not loaded now
    return
  if abs(old - new) <= 1e-6 * abs(new):
    return
  say(f'  the learning rate is {new:.3g} now, where the old schedule has {old:.3g}; for a smooth change, set '
      f'--config.optim.rewarm={meta["step"]},{max(1, (config.num_steps - meta["step"]) // 10)}; to keep the old one, '
      f'--config.optim.schedule=constant --config.optim.learning_rate={old:.3g}')


def first_state(program: Program, checkpoints: Checkpoints, mesh: Mesh) -> tuple[TrainState, dict[str, Any]]:
  """(state, meta of its checkpoint): from the newest checkpoint, else from the run to branch from, else fresh and {}.

  A branch does not take over the other run's best metric. Raises UserErrors.
  """
  config = program.config
  check = partial(check_resume, config=config, fingerprint=program.fingerprint, state_key=program.state_key)
  if checkpoints.newest is not None:
    place = place_of(checkpoints.workdir)
    other = f'{place}_2' if is_remote(place) else unused(checkpoints.workdir)
    advice = f'To start a new run, set --workdir={other}; to resume the one in {place}, restore the old values.'
    state, meta = restore(program, checkpoints, partial(
        check, begin=program.stage.begin, end_row=program.stage.end_row, advice=advice))
    checkpoints.set_aside_after(meta['step'])
    report_resume(config, meta)
    return state, meta
  if config.start.whole:
    folder = read_start(config.start.run, config.start.checkpoint) / 'checkpoints'
    if not folder.is_dir():
      raise ConfigError(f'config.start.run: {config.start.run} has no checkpoints; set the workdir of a trained run')
    advice = f'Restore the old values, as a branch goes on with the data, model and optimizer of {config.start.run}.'
    with Checkpoints(folder, config.checkpoint, read_only=True) as theirs:
      state, meta = restore(program, theirs, partial(check, advice=advice),
                            theirs.named(config.start.checkpoint, 'config.start.checkpoint'))
    report_resume(config, meta)
    return state, {name: meta.get(name) for name in ('stream_states', 'epoch')}
  return (with_weights_of(program, mesh) if config.start.run else program.init()), {}


def restore(program: Program, checkpoints: Checkpoints, check: Any, step: int | None = None) -> tuple[TrainState, dict]:
  """The whole state of a checkpoint, and its meta."""
  abstract = program.abstract
  params, (step_done, opt_state), meta = checkpoints.restore(
      abstract.params, (abstract.step, abstract.opt_state), step=step, check=check)
  return TrainState(step_done, *split(params, program.is_trainable), opt_state), meta


def with_weights_of(program: Program, mesh: Mesh) -> TrainState:
  """A fresh state with all weights that the other run has. Raises ConfigError for weights of other shapes."""
  config, fresh = program.config, program.init()
  try:
    folder = read_start(config.start.run, config.start.checkpoint)
    if (importer := importer_of(folder)) is not None:
      importer.check(folder, config.start.check)
    run = load_run(folder, mesh, config.start.checkpoint,
                   flag='config.start.run')
  except (StorageError, ConfigError) as e:
    raise as_start_error(e) from None
  check_tokenizers(config, program.data, run)
  mine, info = by_name(fresh.params), program.info
  exporter = EXPORTERS['packed' if getattr(run.config.model, 'einsum', '') == 'packed' else 'plain']
  other = exporter.restore(config, run.params, fresh.params, info)
  if grown := grow(other, mine, run, config.model, lambda name: by_name(info)[name].axes):
    say(f'weights of {config.start.run}: the vocabulary grows from {run.config.model.vocab_size} to '
        f'{config.model.vocab_size} tokens; the new rows of {", ".join(grown)} are the mean of the old ones')
  wrong = [name for name in mine.keys() & other.keys() if mine[name].shape != other[name].shape]
  if wrong:
    raise ConfigError(f'config.start.run: {config.start.run} has weights of other shapes:\n  ' + '\n  '.join(
        f'{name}: {other[name].shape}, here {mine[name].shape}' for name in sorted(wrong)))
  for what, names in (('not found, so initialized', mine.keys() - other.keys()),
                      ('not used', other.keys() - mine.keys())):
    if names:
      say(f'weights of {config.start.run}: {what}: {", ".join(sorted(names))}')

  def pick(path: Any, leaf: jax.Array) -> jax.Array:
    return jax.device_put(other.get(path_of(path), leaf), leaf.sharding)

  params: Params = jax.tree_util.tree_map_with_path(pick, merge(fresh.trainable, fresh.frozen))
  trainable, frozen = split(params, program.is_trainable)
  # Initialized again, as an optimizer may keep a copy of the weights.
  opt_state = jax.jit(lambda x: program.tx.init(fetched(x)), out_shardings=program.shardings.opt_state)(trainable)
  return TrainState(fresh.step, trainable, frozen, opt_state)
