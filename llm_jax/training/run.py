"""The folder of a run: its lock, status.json, config.json, tokenizers and plug-ins."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from llm_jax.base import plugins
from llm_jax.base.builder import to_dict
from llm_jax.base.errors import Interrupted, LostError, StorageError
from llm_jax.base.files import latest_step, writing
from llm_jax.base.lock import lock_run
from llm_jax.base.redaction import public
from llm_jax.base.sharding import describe_mesh
from llm_jax.base.stopping import stopping_at_once
from llm_jax.base.storage import place_of
from llm_jax.base.watchdog import Watchdog
from llm_jax.config import Config, differences, replace
from llm_jax.data.sources.documents import shown
from llm_jax.infer.export import write_config
from llm_jax.layers.pipeline import describe_pipeline, num_stages
from llm_jax.training.console import Console
from llm_jax.training.lost import check_not_lost
from llm_jax.training.manifest import write_run_manifest
from llm_jax.training.program import Program
from llm_jax.training.state import TrainState
from llm_jax.training.status import Status

FEW_STEPS = 20  # training tokens that make an epoch of fewer steps are too few


@contextlib.contextmanager
def open_training(workdir: Path, config: Config) -> Iterator[Status]:
  """Locks the folder, starts the watchdog and yields the Status. A launch that trains no step leaves no folder that it
  has created.

  Raises StorageError.
  """
  index, count = jax.process_index(), jax.process_count()
  with contextlib.ExitStack() as stack:
    created, token = stack.enter_context(lock_run(workdir))
    check_not_lost(workdir)
    status = Status(workdir, config.num_steps)

    def ended() -> str:
      step = latest_step(workdir)
      if created and step < 0 and not status.has_trained and index == 0:  # which knows has_trained
        shutil.rmtree(workdir, ignore_errors=True)
      return 'interrupted before the first step; ' + (
          'nothing was trained' if step < 0 else
          f'{place_of(workdir)} stays at step {step}, and the same command resumes it')

    stack.callback(ended)
    watchdog = stack.enter_context(Watchdog(
        workdir, index, count, token, factor=config.watchdog,
        failed=lambda reason: status.__exit__(LostError, LostError(reason), None)))

    def interrupted() -> str:
      status.__exit__(Interrupted, None, None)
      watchdog.leave('interrupted')
      return ended()

    stack.enter_context(stopping_at_once(interrupted))
    stack.enter_context(status)
    status.check_progress()
    yield status


def write_files(program: Program, workdir: Path, status: Status, begin: int) -> None:
  """Writes config.json, the tokenizers and the plug-ins of a run that has trained a step after `begin`.

  A launch that is refused thus leaves them as they are. Raises StorageError.
  """
  if jax.process_index() != 0:
    return
  config, data = program.config, program.data
  whole = replace(program.stage.run, model=config.model, loss=config.loss) if config.stages else config
  before = config_before(workdir)
  names = write_config(workdir, whole, data.tokenizer, data.encoder_tokenizer)
  with writing(f'--workdir: {workdir}'):
    plugins.write_notes(workdir)
    write_run_manifest(workdir, names)
  status.trained(begin=begin, changed=differences(before, public(to_dict(whole))) if before else {})


def config_before(workdir: Path) -> dict[str, Any]:
  """The contents of a run's config.json; {} without a readable one."""
  path = workdir / 'config.json'
  with contextlib.suppress(OSError, ValueError):
    values = {} if path.is_symlink() else json.loads(path.read_text())
    return public(values) if isinstance(values, dict) else {}
  return {}


def print_summary(program: Program, state: TrainState, workdir: Path, console: Console,
                  further: tuple[str, ...]) -> None:
  """Prints a summary of devices, model, data and batch, `further` lines, and the plug-ins that changed."""
  try:
    changes = plugins.changes(workdir)
  except StorageError as e:
    changes = [f'WARNING: {e}; it is written anew']
  for line in changes:
    console.line(line)
  config, data, devices = program.config, program.data, jax.devices()
  seq_len, held_rows, num_microbatches = config.data.seq_len, program.held_rows, program.num_microbatches
  num_params, num_frozen = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (state.params, state.frozen))
  num_train, num_val = (sum(len(store.tokens) for store in side.values()) for side in (data.train, data.val))
  amount = 'a stream' if config.data.streaming else f'{amount_of(num_train)} tokens'
  epochs = config.num_steps * config.batch_tokens / max(1, num_train)
  console.line(f'devices: {len(devices)} x {devices[0].device_kind}, {jax.process_count()} process(es), '
               f'mesh {describe_mesh(jax.sharding.get_abstract_mesh())}')
  frozen = f', {amount_of(num_frozen)} of them frozen' if num_frozen else ''
  first, *more = config.model.describe(seq_len, config.data.mask_documents)
  for line in (f'{first}, {amount_of(num_params)} parameters{frozen}', *more):
    console.line(line)
  sources = ', '.join(shown(s.path) for s in config.data.named_sources.values())
  if not data.train and not data.streams:
    sources = 'batches passed from Python'
  console.line(f'data: {sources}: {amount} of a vocabulary of {data.vocab_size} to train on, '
               + (f'{amount_of(num_val)} to validate with' if num_val and config.eval.every else 'no validation')
               + (f'; {config.num_steps} steps are {epochs:.2f} epochs' if num_train else ''))
  if warning := too_little_data(config, num_train):
    console.line(f'WARNING: {warning}')
  for line in config.optim.shortened(config.num_steps):
    console.line(f'schedule: {line}')
  console.line(f'batch: {config.batch_tokens} tokens = {num_microbatches} microbatch(es) x {held_rows} row(s) '
               f'x {seq_len} tokens on each of {config.rows_per_batch // num_microbatches // held_rows} device(s)')
  stages = describe_pipeline(num_stages(jax.sharding.get_abstract_mesh()), config.mesh.repeats, num_microbatches)
  for line in (*filter(None, [stages]), *further):
    console.line(line)


def too_little_data(config: Config, num_train: int) -> str:
  """What is wrong with this number of tokens to train on; '' if it suffices, or for another task than next tokens."""
  epochs, steps_per_epoch = config.num_steps * config.batch_tokens / max(1, num_train), num_train / config.batch_tokens
  if steps_per_epoch >= FEW_STEPS or not num_train or epochs < 2 or config.data.task != 'next_token':
    return ''
  return (f'there are only {num_train:,} tokens to train on, and each is seen {epochs:,.0f} times, so the model learns '
          f'them by heart; add data, or set a smaller model and a lower config.num_steps ({math.ceil(steps_per_epoch)} '
          f'step(s) of {config.batch_tokens:,} tokens are one epoch)')


def amount_of(number: int) -> str:
  """A number for people: 2,551 or 124.37 M."""
  return f'{number / 1e6:.2f} M' if number >= 1e6 else f'{number:,}'
