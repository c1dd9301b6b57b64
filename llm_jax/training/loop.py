"""The loop: the only file that knows everybody, read from top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import platform
import time
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import multihost

from llm_jax import __version__
from llm_jax.base.batch import Params, as_batch
from llm_jax.base.devices import peak_flops
from llm_jax.base.errors import DivergedError, Interrupted, StorageError
from llm_jax.base.profiling import Profiler
from llm_jax.base.sharding import make_mesh, put_batch
from llm_jax.base.stopping import StopSignal
from llm_jax.config import Config, replace, to_dict
from llm_jax.data import pipeline
from llm_jax.infer.load import Run, gather, samples
from llm_jax.training.best import Record
from llm_jax.training.checkpoint import Checkpoints, latest_step
from llm_jax.training.log import Console, Epochs, Packed, Throughput, Writer, unpack
from llm_jax.training.program import barrier, make_parts
from llm_jax.training.report import describe, text_metrics, write_run_files
from llm_jax.training.resume import first_state
from llm_jax.training.stages import Plan, plan
from llm_jax.training.state import TrainState
from llm_jax.training.status import Goodput, Status

MAX_SKIPPED = 20  # steps in a row without a finite gradient


@dataclasses.dataclass(frozen=True)
class Moment:
  """A step of a run that was logged, and what can be asked of the run before it goes on."""

  step: int
  metrics: dict[str, float]  # 'train/loss', and 'val/loss' where it was validated
  validate: Callable[[], dict[str, float]]
  save: Callable[[], None]
  read: Callable[[], Run]  # the model with the weights that it has now
  status: Callable[[], dict[str, Any]]


def moments(config: Config, workdir: Path) -> Generator[Moment, None, None]:
  """Trains to `num_steps`, going on from what `workdir` holds, and yields what is logged.

  Each stage is trained like a run that goes on with another config. Raises Interrupted after a signal, and UserErrors
  (see errors.py).
  """
  goodput = Goodput()
  with prepared(workdir), Status(workdir, config.num_steps) as status:
    for stage in (stages := plan(config)):
      done = stage is not stages[-1] and latest_step(workdir) >= stage.end
      if not done and (yield from stage_moments(stage, workdir, status, goodput)):
        break


def stage_moments(stage: Plan, workdir: Path, status: Status, goodput: Goodput) -> Generator[Moment, None, str]:
  """Of one stage; returns why the run is over, if it is."""
  mesh = make_mesh(stage.config.mesh)
  with jax.set_mesh(mesh), contextlib.ExitStack() as stack:  # everything is traced under it; one device is 1x1x1
    goodput.starting()

    # 1. Parts, and the state: what the folder holds, else fresh.
    parts = make_parts(stage, workdir, mesh)
    stage, config, data, model, tx = parts.stage, parts.config, parts.data, parts.model, parts.tx
    checkpoints = stack.enter_context(Checkpoints(workdir / 'checkpoints', config.checkpoint))
    state, meta = first_state(parts, checkpoints, mesh)
    begin = int(state.step)
    record = Record.from_meta(config.eval, meta, other_data=stage.new_data and begin == stage.begin)
    validated = meta.get('validated', meta.get('val_loss', 0.0) is not None)
    validated_at = begin if validated else -1
    status.update(state='training', step=begin, num_steps=config.num_steps, monitor=config.eval.monitor,
                  best=record.best_value, state_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
    of_all = replace(stage.run, model=config.model, loss=config.loss) if config.stages else config
    write_run_files(of_all, data, workdir)

    # 2. Watchers.
    writer = Writer(workdir, begin)
    stack.callback(writer.close)
    console = Console(config.num_steps, begin)
    stack.callback(console.close)
    describe(config, data, state, parts.num_microbatches, parts.held_rows, workdir, console)
    if begin == 0:
      writer.text(0, 'config', json.dumps(to_dict(config), indent=2))
    flops_per_token = config.model.flops_per_token(config.data.seq_len)
    if parts.teacher is not None:  # reads the same tokens, and has no backward pass
      flops_per_token += parts.teacher.config.model.flops_per_token(config.data.seq_len) / 3
    throughput = Throughput(flops_per_token, peak_flops(jax.devices()))
    batches = stack.enter_context(contextlib.closing(pipeline.open_batches(
        config.data, data, config.rows_per_batch, parts.rows, config.seed, begin, stage.rows_at,
        meta.get('stream_states'), jax.process_index(), jax.process_count())))
    # In one process the step's dispatch puts NumPy rows itself, ten times as fast as arrays can be made here.
    put = as_batch if jax.process_count() == 1 else partial(
        put_batch, rows=parts.rows, num_rows=config.rows_per_batch, mesh=mesh)
    stop = stack.enter_context(StopSignal())
    profiler = stack.enter_context(Profiler(config.profile, workdir, begin, console.line))
    epochs = Epochs(lambda step: int(stage.rows_at(step) // batches.rows_per_epoch), meta.get('epoch') or {})
    skipped_in_a_row = 0
    pending: tuple[int, Packed] | None = None  # a step whose metrics are not fetched yet
    early: dict[str, float] = {}  # those of it that the caller's `save` has fetched, and written

    def fetch(step: int, metrics: Packed) -> dict[str, float]:
      """Waits for a step and returns what is to be logged of it: nothing, when it is not due and ends no epoch."""
      nonlocal skipped_in_a_row
      values = unpack(metrics)
      throughput.step_done(values['num_tokens'])
      skipped_in_a_row = skipped_in_a_row + 1 if values['skipped'] else 0
      if skipped_in_a_row == 1:
        console.line(f'WARNING: step {step}: the gradient is not finite; the update is skipped')
      if skipped_in_a_row >= MAX_SKIPPED:
        raise DivergedError(f'the gradients of steps {step - MAX_SKIPPED + 1} to {step} were not finite, so none was '
                            'applied; lower config.optim.learning_rate, or look at the data of these steps')
      epoch = epochs.add(step, values)
      if step % config.log.every and step not in (1, stage.end):
        return epoch
      logged = {f'train/{name}': value for name, value in (values | throughput.take()).items()}
      text_loss = values.get('next_token/loss', values['loss'] if config.loss.terms == ('next_token',) else None)
      logged |= text_metrics('train', text_loss, data, config.data.task) | batches.metrics()
      logged |= status.system() | goodput.shares() | epoch
      console.step(step, logged, throughput.seconds_per_step)
      tell(step, logged, at_once=False)
      return logged

    def tell(step: int, logged: dict[str, float], at_once: bool) -> None:
      left = 0 if record.over else config.num_steps - step
      seconds_left = None if throughput.seconds_per_step is None else left * throughput.seconds_per_step
      status.update(at_once=at_once, step=step, best=record.best_value, seconds_left=seconds_left,
                    metrics=(status.values.get('metrics') or {}) | logged)

    def validate(step: int) -> dict[str, float]:
      results, _ = parts.evaluator(weights(), data.val, config.eval.max_tokens, lambda: stop.requested)
      results = {f'val/{name}': value for name, value in results.items()}
      console.line(f'step {step}: ' + '  '.join(f'{name} {value:.4f}' for name, value in results.items()
                                                 if name != 'val/tokens'))
      return results

    def weights() -> Params:
      return parts.evaluated(state.opt_state, state.params)

    def due(step: int, every: int) -> bool:
      return step % every == 0 or step == config.num_steps

    def save(step: int, score: float | None, kept: Record) -> bool:
      # Together with the step, as Orbax refuses the empty state that some optimizers have.
      return checkpoints.save(step, state.params, (state.step, state.opt_state), score=score, since=kept.since, meta={
          'config': to_dict(config), 'data': parts.fingerprint, 'stream_states': gather(batches.state()),
          'validated': validated_at == step, 'record': kept.to_meta(), 'epoch': epochs.sums,
          'state_key': parts.state_key,
          'versions': {'llm_jax': __version__, 'jax': jax.__version__, 'python': platform.python_version()}})

    def moment(step: int, logged: dict[str, float]) -> Iterator[Moment]:
      """Gives a step that was logged to the caller, who may take his time."""
      begin = time.perf_counter()
      if 'train/loss' in logged:
        yield Moment(step, logged, lambda: validate(int(state.step)), save_now, read, lambda: dict(status.values))
      throughput.away(time.perf_counter() - begin)
      goodput.add('caller', time.perf_counter() - begin)

    def save_now() -> None:
      nonlocal pending, early
      if pending is not None:  # of the step that the state is of
        (late, metrics), pending = pending, None
        early = fetch(late, metrics)
        writer.scalars(late, early)
      save(int(state.step), None, record)
      checkpoints.wait()

    def read() -> Run:
      params = jax.tree.map(jnp.copy, weights())  # as the next step overwrites what it has
      return Run(config, data.tokenizer, model, params, {'step': int(state.step), 'data': parts.fingerprint},
                 data.encoder_tokenizer)

    def settle(step: int, logged: dict[str, float], stopping: bool) -> bool:
      """Validates, logs, saves and samples what is due at a step; False if a signal cut the validation short."""
      nonlocal state, record, validated_at
      score = None
      if due(step, config.eval.every):
        with contextlib.suppress(Interrupted), goodput.of('evaluation'):
          results = validate(step)
          score, mastered = record.see(step, results)
          validated_at = step
          logged |= results | {f'capability/{text}': step for text in mastered}
          state = TrainState(state.step, state.params, tx.hear(state.opt_state, results))
          for text in mastered:
            console.line(f'step {step}: {text}, for the first time')
      improved = score is not None and score < record.saved
      kept = dataclasses.replace(record, saved=score if improved and score is not None else record.saved)
      writer.scalars(step, logged)  # on disk before the checkpoint is
      if (stopping or stop.requested or record.over or step == stage.end or due(step, config.checkpoint.every)
          or (improved and config.checkpoint.keep_best)):
        with goodput.of('save'):
          record = kept if save(step, score, kept) else record
      if score is not None:
        for prompt, sample in samples(config, data, model, weights()):
          writer.text(step, f'sample/{prompt or "new document"}', sample)
          console.line('\n'.join('  | ' + line for line in sample.splitlines()))
      return score is not None or not due(step, config.eval.every)

    # 3. The loop. Metrics are fetched one step late: a step and its batch go to the device while the one before runs.
    if begin and due(begin, config.eval.every) and not validated:
      settle(begin, {}, stopping=False)
    if record.over:
      console.line(f'{record.over}: the run is over; for more, raise what ended it')
    elif begin >= stage.end:
      console.line(f'already at step {begin} of {config.num_steps}; for more, raise --config.num_steps')
    profiler.begin_after(begin)
    for step in range(begin + 1, begin + 1 if record.over else stage.end + 1):
      start = time.perf_counter()
      features = next(batches)
      throughput.waited(time.perf_counter() - start)
      goodput.add('data', time.perf_counter() - start)
      with jax.profiler.StepTraceAnnotation('train', step_num=step):
        state, metrics = parts.step(state, put(features), parts.frozen)
      before, pending, early = pending, (step, metrics), {}
      if before is not None and (logged := fetch(*before)):
        writer.scalars(before[0], logged)
        yield from moment(before[0], logged)
      stopping = stop.reached()
      first = step == begin + 1
      if not (stopping or first or profiler.due(step) or due(step, config.eval.every)
              or due(step, config.checkpoint.every) or step == stage.end):
        yield from moment(step, early)
        continue

      # Something comes before the next step: first this one is finished.
      if first:
        goodput.started()
      logged, pending = {} if pending is None else fetch(*pending), None
      profiler.end_after(step)
      if first:
        console.line(f'first step after {time.perf_counter() - start:.1f} s of compiling and running')
      settled = settle(step, logged, stopping)
      tell(step, logged, at_once=True)
      yield from moment(step, early | logged)
      if not settled or ((stopping or stop.requested) and step < config.num_steps):
        checkpoints.wait()
        raise Interrupted(f'stopped at step {step} of {config.num_steps}, saved in {workdir}; '
                          'the same command goes on from there')
      if record.over:
        console.line(f'step {step}: {record.over}: the run ends')
        break
      profiler.begin_after(step)
      throughput.restart()
    checkpoints.wait()
    barrier('end')
    return record.over


@contextlib.contextmanager
def prepared(workdir: Path) -> Iterator[None]:
  """Makes the folder and holds its lock, one run at a time. Raises StorageError."""
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    lock = open(workdir / '.lock', 'a')  # noqa: SIM115
  except OSError as e:
    raise StorageError(f'--workdir: {workdir} cannot be written: {e.strerror}') from None
  with lock:
    taken = False
    if jax.process_index() == 0:
      try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        taken = True
      except OSError:
        pass  # a file system without locks
    if multihost.broadcast_one_to_all(taken):  # all processes leave, or none
      raise StorageError(f'--workdir: another run is training in {workdir}; name another one, or stop it')
    yield
