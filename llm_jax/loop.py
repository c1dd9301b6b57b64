"""The loop: the only file that knows everybody, read from top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import json
import math
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
from llm_jax.assemble import (
  Run,
  abstract_batch,
  build_model,
  check_features,
  check_results,
  complete,
  example_batch,
  gather,
  load_teacher,
  make_evaluator,
  samples,
)
from llm_jax.checkpoint import Checkpoints, latest_step
from llm_jax.config import Config, replace, to_dict
from llm_jax.data import data_fingerprint, open_data, pipeline
from llm_jax.data.corpus import key_of
from llm_jax.devices import peak_flops
from llm_jax.errors import ConfigError, DivergedError, Interrupted, StorageError
from llm_jax.losses import make_objective
from llm_jax.memory import fit_memory
from llm_jax.metrics import Console, Epochs, Packed, Throughput, Writer, pack, unpack
from llm_jax.optim import make_optimizer
from llm_jax.plan import Plan, plan
from llm_jax.profiling import Profiler
from llm_jax.record import Record
from llm_jax.report import describe, text_metrics, write_run_files
from llm_jax.sharding import batch_sharding, local_rows, make_mesh, num_batch_shards, put_batch
from llm_jax.start import branch, check_resume, report_resume, with_weights_of
from llm_jax.status import Goodput, Status, system
from llm_jax.step import TrainState, abstract_state, init_state, logical_axes, state_shardings, train_step
from llm_jax.stopping import StopSignal
from llm_jax.types import Batch, Params, as_batch

MAX_SKIPPED = 20  # steps in a row without a finite gradient


@dataclasses.dataclass(frozen=True)
class Moment:
  """A step of a run that was logged, and what can be asked of the run before it goes on."""

  step: int
  metrics: dict[str, float]  # 'train/loss', and 'val/loss' where it was validated
  validate: Callable[[], dict[str, float]]
  save: Callable[[], None]
  read: Callable[[], Run]  # the model with the weights that it has now
  status: dict[str, Any]


def moments(config: Config, workdir: Path) -> Generator[Moment, None, None]:
  """Trains to `num_steps`, going on from what `workdir` holds, and yields what is logged.

  Each stage is trained like a run that goes on with another config. Raises Interrupted after a signal, and UserErrors
  (see errors.py).
  """
  with prepared(workdir), Status(workdir, config.num_steps) as status:
    for stage in (stages := plan(config)):
      done = stage is not stages[-1] and latest_step(workdir) >= stage.end
      if not done and (yield from stage_moments(stage, workdir, status)):
        break


def stage_moments(stage: Plan, workdir: Path, status: Status) -> Generator[Moment, None, str]:
  """Of one stage; returns why the run is over, if it is."""
  config = stage.config
  # 1. Mesh. Everything below is traced under the mesh; one device is a 1x1x1 one.
  mesh = make_mesh(config.mesh)
  with jax.set_mesh(mesh), contextlib.ExitStack() as stack:
    goodput = Goodput()
    # 2. Data: made by process 0, opened by all.
    config.split_batch(num_batch_shards(mesh))  # an error is better told now
    data = None
    try:
      if jax.process_index() == 0:
        data = open_data(config.data)
    finally:  # also after an error, which the others then meet themselves instead of waiting
      barrier('data')
    data = data or open_data(config.data)
    num_rows = config.rows_per_batch
    rows = local_rows(mesh, num_rows)

    # 3. Model, optimizer, shardings, compiled steps.
    config = complete(config, data)
    if config.num_epochs:
      [rows_of_all] = map(len, pipeline.train_sources(config.data, data).values())
      config = replace(config, num_steps=math.ceil(config.num_epochs * rows_of_all / num_rows), num_epochs=0.0)
      stage = dataclasses.replace(stage, config=config, end=config.num_steps)
    if len(set(gather(config.model.dtype))) > 1:
      raise ConfigError('config.model.dtype: auto means another dtype on each of these machines; set one')
    teacher = load_teacher(config, data, mesh)
    config = with_teacher(config, teacher)
    objective = make_objective(config.loss, teacher and teacher.model)
    frozen = teacher and teacher.params
    model = build_model(config)
    examples = pipeline.open_examples(config.data, data, next(iter(data.val.values())), train=False)
    check_features(config, model, examples)
    tx = make_optimizer(config.optim, config.num_steps, logical_axes(example_batch(config), model=model))
    shardings = state_shardings(example_batch(config), mesh, model=model, tx=tx)
    init = jax.jit(partial(init_state, model=model, tx=tx), out_shardings=shardings)
    key = jax.random.key(config.seed)
    abstract = abstract_state(example_batch(config), shardings, model=model, tx=tx)
    state_key = key_of([[jax.tree_util.keystr(path), leaf.shape] for path, leaf
                        in jax.tree_util.tree_leaves_with_path(abstract.opt_state)])
    # Cached, so that a step compiled to see what it needs is not compiled again to run.
    make_step = functools.cache(partial(jit_step, config, mesh, shardings, frozen, model=model, tx=tx,
                                        objective=objective))
    shapes = abstract, abstract_batch(examples, num_rows), frozen
    check_results(config, data, model, abstract.params, shapes[1], (*config.eval.asks, *tx.asks))
    config = fit_memory(config, num_batch_shards(mesh), workdir,
                        compile_step=lambda num_microbatches: make_step(num_microbatches).lower(*shapes).compile())
    held_rows, num_microbatches = config.split_batch(num_batch_shards(mesh))
    if num_microbatches > 1 and not objective.row_wise:
      raise ConfigError(f'config.tokens_per_device: {config.tokens_per_device} cuts a batch into {num_microbatches}, '
                        f'and config.loss (terms={", ".join(config.loss.terms)}, balance={config.loss.balance}) needs '
                        'all of its rows at once; set '
                        f'{num_rows // num_batch_shards(mesh) * config.data.seq_len} or smaller batches')
    step_fn = make_step(num_microbatches)
    evaluator = make_evaluator(config, data, model, mesh)
    evaluated = jax.jit(tx.evaluated, out_shardings=shardings.params) if tx.averages else lambda _, params: params

    # 4. State: what the folder holds, else fresh.
    checkpoints = stack.enter_context(Checkpoints(workdir / 'checkpoints', config.checkpoint))
    fingerprint = data_fingerprint(config.data, data, num_rows, config.seed)
    if stage.begin:
      fingerprint['first_row'] = stage.rows_at(stage.begin)
    if any(theirs != json.loads(json.dumps(fingerprint)) for theirs in gather(fingerprint)):
      raise ConfigError('config.data: the processes do not see the same data; share a cache (config.data.cache_dir), '
                        'or give every host the same files and versions')
    record, validated, stream_states, epoch_sums = Record(config.eval), True, None, dict[str, float]()
    if checkpoints.steps():
      params, (step, opt_state), meta = checkpoints.restore(
          abstract.params, (abstract.step, abstract.opt_state),
          check=partial(check_resume, config=config, fingerprint=fingerprint, state_key=state_key, begin=stage.begin))
      checkpoints.set_aside_after(meta['step'])
      state = TrainState(step, params, opt_state)
      record = Record.from_meta(config.eval, meta)
      validated = meta['validated'] if 'validated' in meta else meta['val_loss'] is not None
      stream_states, epoch_sums = meta.get('stream_states'), meta.get('epoch', {})
      report_resume(config, meta)
    elif config.start.whole:
      state, meta = branch(config, abstract, partial(check_resume, config=config, fingerprint=fingerprint,
                                                     state_key=state_key))
      stream_states, epoch_sums = meta.get('stream_states'), meta.get('epoch', {})
      report_resume(config, meta)
    else:
      state = init(key, example_batch(config))
      if config.start.run:
        state = with_weights_of(config, data, state, tx, mesh)
    begin = int(state.step)
    validated_at = begin if validated else -1
    status.update(state='training', step=begin, num_steps=config.num_steps, monitor=config.eval.monitor,
                  best=record.best_value, state_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
    of_all = replace(stage.run, model=config.model, loss=config.loss) if config.stages else config
    write_run_files(of_all, data, workdir)

    # 5. Watchers.
    writer = Writer(workdir, begin)
    stack.callback(writer.close)
    console = Console(config.num_steps, begin)
    stack.callback(console.close)
    describe(config, data, state, num_microbatches, held_rows, workdir, console)
    if begin == 0:
      writer.text(0, 'config', json.dumps(to_dict(config), indent=2))
    flops_per_token = config.model.flops_per_token(config.data.seq_len)
    if teacher is not None:  # reads the same tokens, and has no backward pass
      flops_per_token += teacher.config.model.flops_per_token(config.data.seq_len) / 3
    throughput = Throughput(flops_per_token, peak_flops(jax.devices()))
    batches = stack.enter_context(contextlib.closing(pipeline.open_batches(
        config.data, data, num_rows, rows, config.seed, begin, stage.rows_at, stream_states, jax.process_index(),
        jax.process_count())))
    # In one process the step's dispatch puts NumPy rows itself, ten times as fast as arrays can be made here.
    put = as_batch if jax.process_count() == 1 else partial(put_batch, rows=rows, num_rows=num_rows, mesh=mesh)
    stop = stack.enter_context(StopSignal())
    profiler = stack.enter_context(Profiler(config.profile, workdir, begin, console.line))
    epochs = Epochs(lambda step: int(stage.rows_at(step) // batches.rows_per_epoch), epoch_sums)
    skipped_in_a_row = 0
    pending: tuple[int, Packed] | None = None  # a step whose metrics are not fetched yet

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
      logged |= system() | goodput.shares() | epoch
      console.step(step, logged, throughput.seconds_per_step)
      tell(step, logged)
      return logged

    def tell(step: int, logged: dict[str, float]) -> None:
      status.update(step=step, best=record.best_value,
                    seconds_left=(config.num_steps - step) * throughput.seconds_per_step,
                    metrics=(status.values.get('metrics') or {}) | logged)

    def validate(step: int) -> dict[str, float]:
      results, _ = evaluator(weights(), data.val, config.eval.max_tokens, lambda: stop.requested)
      results = {f'val/{name}': value for name, value in results.items()}
      console.line(f'step {step}: ' + '  '.join(f'{name} {value:.4f}' for name, value in results.items()
                                                 if name != 'val/tokens'))
      return results

    def weights() -> Params:
      return evaluated(state.opt_state, state.params)

    def due(step: int, every: int) -> bool:
      return step % every == 0 or step == stage.end

    def save(step: int, score: float | None, kept: Record) -> bool:
      with goodput.of('save'):
        # Together with the step, as Orbax refuses the empty state that some optimizers have.
        return checkpoints.save(step, state.params, (state.step, state.opt_state), score=score, meta={
            'config': to_dict(config), 'data': fingerprint, 'stream_states': gather(batches.state()),
            'validated': validated_at == step, 'record': kept.to_meta(), 'epoch': epochs.sums,
            'state_key': state_key,
            'versions': {'llm_jax': __version__, 'jax': jax.__version__, 'python': platform.python_version()}})

    def moment(step: int, logged: dict[str, float]) -> Moment:
      return Moment(step, logged, lambda: validate(int(state.step)), save_now, read, dict(status.values))

    def save_now() -> None:
      nonlocal pending
      if pending is not None:  # of the step that the state is of
        late, pending = pending, None
        writer.scalars(late[0], fetch(*late))
      save(int(state.step), None, record)
      checkpoints.wait()

    def read() -> Run:
      params = jax.tree.map(jnp.copy, weights())  # as the next step overwrites what it has
      return Run(config, data.tokenizer, model, params, {'step': int(state.step), 'data': fingerprint},
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
      if stopping or stop.requested or record.over or due(step, config.checkpoint.every) or (
          improved and config.checkpoint.keep_best):
        record = kept if save(step, score, kept) else record
      if score is not None:
        for prompt, sample in samples(config, data, model, weights()):
          writer.text(step, f'sample/{prompt or "new document"}', sample)
          console.line('\n'.join('  | ' + line for line in sample.splitlines()))
      return score is not None or not due(step, config.eval.every)

    # 6. The loop. Metrics are fetched one step late: a step and its batch go to the device while the one before runs.
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
        state, metrics = step_fn(state, put(features), frozen)
      before, pending = pending, (step, metrics)
      if before is not None and (logged := fetch(*before)):
        writer.scalars(before[0], logged)
        if 'train/loss' in logged:
          yield moment(before[0], logged)
      stopping = stop.reached()
      first = step == begin + 1
      if not (stopping or first or profiler.due(step) or due(step, config.eval.every)
              or due(step, config.checkpoint.every)):
        continue

      # Something comes before the next step: first this one is finished.
      if first:
        goodput.started()
      logged, pending = {} if pending is None else fetch(*pending), None
      profiler.end_after(step)
      if first:
        console.line(f'first step after {time.perf_counter() - start:.1f} s of compiling and running')
      settled = settle(step, logged, stopping)
      tell(step, logged)
      if 'train/loss' in logged:
        yield moment(step, logged)
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


def jit_step(config: Config, mesh: jax.sharding.Mesh, shardings: TrainState, frozen: Params, num_microbatches: int,
             **parts: Any) -> Any:
  """The jitted (state, batch, frozen) -> (state, Packed metrics); the state is donated."""
  def step(state: TrainState, batch: Batch, frozen: Params) -> tuple[TrainState, Packed]:
    state, metrics = train_step(state, batch, seed=config.seed, num_microbatches=num_microbatches, frozen=frozen,
                                **parts)
    return state, pack(metrics)
  lies = jax.tree.map(lambda x: x.sharding, frozen)
  return jax.jit(step, in_shardings=(shardings, batch_sharding(mesh), lies),
                 out_shardings=(shardings, shardings.step), donate_argnums=0)


def with_teacher(config: Config, teacher: Run | None) -> Config:
  """The config with the width of the teacher's hidden states, and the step that it stands at."""
  if teacher is None:
    return config
  learns = dataclasses.replace(config.loss.distillation, hidden_dim=teacher.config.model.embed_dim,
                               checkpoint=str(teacher.meta['step']))
  return dataclasses.replace(config, loss=dataclasses.replace(config.loss, distillation=learns))


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


def barrier(name: str) -> None:
  """Waits for every process, however long: by the coordinator, as a collective may give up after 30 seconds."""
  multihost.get_barrier_sync_fn()(key=name, timeout_ms=24 * 60 * 60 * 1000)
