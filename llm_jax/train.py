"""The loop: the only file that knows everybody, read from top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import platform
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import multihost

from llm_jax import __version__
from llm_jax.assemble import (
  Run,
  build_model,
  check_features,
  complete,
  example_batch,
  gather,
  load_teacher,
  make_evaluator,
  samples,
)
from llm_jax.checkpoint import Checkpoints
from llm_jax.config import Config, to_dict
from llm_jax.data import Data, data_fingerprint, open_data, pipeline
from llm_jax.data.examples import Examples
from llm_jax.data.fetch import shown
from llm_jax.devices import peak_flops
from llm_jax.errors import ConfigError, DivergedError, Interrupted, StorageError
from llm_jax.layers.attention import describe_attention
from llm_jax.losses import make_objective
from llm_jax.memory import fit_memory
from llm_jax.metrics import Console, Packed, Throughput, Writer, pack, unpack
from llm_jax.optim import make_optimizer
from llm_jax.profiling import Profiler
from llm_jax.record import Record
from llm_jax.sharding import batch_sharding, local_rows, make_mesh, num_batch_shards, put_batch
from llm_jax.start import branch, check_resume, report_resume, with_weights_of
from llm_jax.step import TrainState, abstract_state, init_state, logical_axes, state_shardings, train_step
from llm_jax.stopping import StopSignal
from llm_jax.types import Batch, Params, as_batch

MAX_SKIPPED = 20  # steps in a row without a finite gradient


def run(config: Config, workdir: Path) -> dict[str, float]:
  """Trains to `num_steps`, going on from what `workdir` holds; returns the last evaluation, 'val/loss' and so on.

  Raises Interrupted after a signal, and UserErrors (see errors.py).
  """
  # 1. Folder and mesh. Everything below is traced under the mesh; one device is a 1x1x1 one.
  mesh = make_mesh(config.mesh)
  with jax.set_mesh(mesh), prepared(workdir), contextlib.ExitStack() as stack:
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
    # Cached, so that a step compiled to see what it needs is not compiled again to run.
    make_step = functools.cache(partial(jit_step, config, mesh, shardings, frozen, model=model, tx=tx,
                                        objective=objective))
    shapes = abstract, abstract_batch(examples, num_rows), frozen
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
    evaluated = jax.jit(tx.evaluated, out_shardings=shardings.params)

    # 4. State: what the folder holds, else fresh.
    checkpoints = stack.enter_context(Checkpoints(workdir / 'checkpoints', config.checkpoint))
    fingerprint = data_fingerprint(config.data, data, num_rows, config.seed)
    if any(theirs != json.loads(json.dumps(fingerprint)) for theirs in gather(fingerprint)):
      raise ConfigError('config.data: the processes do not see the same data; share a cache (config.data.cache_dir), '
                        'or give every host the same files and versions')
    record, validated, stream_states = Record(config.eval), True, None
    if checkpoints.steps():
      params, (step, opt_state), meta = checkpoints.restore(
          abstract.params, (abstract.step, abstract.opt_state),
          check=partial(check_resume, config=config, fingerprint=fingerprint))
      checkpoints.set_aside_after(meta['step'])
      state = TrainState(step, params, opt_state)
      record = Record.from_meta(config.eval, meta)
      validated = meta['validated'] if 'validated' in meta else meta['val_loss'] is not None
      stream_states = meta.get('stream_states')
      report_resume(config, meta)
    elif config.start.whole:
      state, meta = branch(config, abstract, partial(check_resume, config=config, fingerprint=fingerprint))
      stream_states = meta.get('stream_states')
      report_resume(config, meta)
    else:
      state = init(key, example_batch(config))
      if config.start.run:
        state = with_weights_of(config, data, state, tx, mesh)
    begin = int(state.step)
    write_run_files(config, data, workdir)

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
        config.data, data, num_rows, rows, config.seed, begin, stream_states, jax.process_index(),
        jax.process_count())))
    # In one process the step's dispatch puts NumPy rows itself, ten times as fast as arrays can be made here.
    put = as_batch if jax.process_count() == 1 else partial(put_batch, rows=rows, num_rows=num_rows, mesh=mesh)
    stop = stack.enter_context(StopSignal())
    profiler = stack.enter_context(Profiler(config.profile, workdir, begin, console.line))
    skipped_in_a_row, results = 0, dict[str, float]()

    def fetch(step: int, metrics: Packed) -> dict[str, float]:
      """Waits for a step and returns what is to be logged of it: nothing, when it is not due."""
      nonlocal skipped_in_a_row
      values = unpack(metrics)
      throughput.step_done(values['num_tokens'])
      skipped_in_a_row = skipped_in_a_row + 1 if values['skipped'] else 0
      if skipped_in_a_row == 1:
        console.line(f'WARNING: step {step}: the gradient is not finite; the update is skipped')
      if skipped_in_a_row >= MAX_SKIPPED:
        raise DivergedError(f'the gradients of steps {step - MAX_SKIPPED + 1} to {step} were not finite, so none was '
                            'applied; lower config.optim.learning_rate, or look at the data of these steps')
      if step % config.log.every and step not in (1, config.num_steps):
        return {}
      logged = {f'train/{name}': value for name, value in (values | throughput.take()).items()}
      text_loss = values.get('next_token/loss', values['loss'] if config.loss.terms == ('next_token',) else None)
      logged |= text_metrics('train', text_loss, data, config.data.task) | batches.metrics()
      console.step(step, logged, throughput.seconds_per_step)
      return logged

    def validate(step: int) -> dict[str, float]:
      results, _ = evaluator(weights(), data.val, config.eval.max_tokens, lambda: stop.requested)
      results = {f'val/{name}': value for name, value in results.items()}
      console.line(f'step {step}: ' + '  '.join(f'{name} {value:.4f}' for name, value in results.items()
                                                 if name != 'val/tokens'))
      return results

    def weights() -> Params:
      return evaluated(state.opt_state, state.params)

    def due(step: int, every: int) -> bool:
      return step % every == 0 or step == config.num_steps

    def settle(step: int, logged: dict[str, float], stopping: bool) -> bool:
      """Validates, logs, saves and samples what is due at a step; False if a signal cut the validation short."""
      nonlocal state, record, results
      score = None
      if due(step, config.eval.every):
        with contextlib.suppress(Interrupted):
          results = validate(step)
          score, mastered = record.see(step, results)
          logged |= results | {f'capability/{text}': step for text in mastered}
          state = TrainState(state.step, state.params, tx.hear(state.opt_state, results))
          for text in mastered:
            console.line(f'step {step}: {text}, for the first time')
      improved = score is not None and score < record.saved
      kept = dataclasses.replace(record, saved=score if improved and score is not None else record.saved)
      writer.scalars(step, logged)  # on disk before the checkpoint is
      if stopping or stop.requested or record.exhausted or due(step, config.checkpoint.every) or (
          improved and config.checkpoint.keep_best):
        # Together with the step, as Orbax refuses the empty state that some optimizers have.
        saved = checkpoints.save(step, state.params, (state.step, state.opt_state), score=score, meta={
            'config': to_dict(config), 'data': fingerprint, 'stream_states': gather(batches.state()),
            'validated': score is not None, 'record': kept.to_meta(),
            'versions': {'llm_jax': __version__, 'jax': jax.__version__, 'python': platform.python_version()}})
        record = kept if saved else record
      if score is not None:
        for prompt, sample in samples(config, data, model, weights()):
          writer.text(step, f'sample/{prompt or "new document"}', sample)
          console.line('\n'.join('  | ' + line for line in sample.splitlines()))
      return score is not None or not due(step, config.eval.every)

    # 6. The loop. Metrics are fetched one step late: a step and its batch go to the device while the one before runs.
    pending: tuple[int, Packed] | None = None
    if begin and due(begin, config.eval.every) and not validated:
      settle(begin, {}, stopping=False)
    if record.exhausted:
      console.line(f'{config.eval.monitor} has not improved for {record.stale} evaluations; for more, raise '
                   '--config.eval.patience')
    elif begin >= config.num_steps:
      console.line(f'already at step {begin} of {config.num_steps}; for more, raise --config.num_steps')
    profiler.begin_after(begin)
    for step in range(begin + 1, begin + 1 if record.exhausted else config.num_steps + 1):
      start = time.perf_counter()
      features = next(batches)
      throughput.waited(time.perf_counter() - start)
      with jax.profiler.StepTraceAnnotation('train', step_num=step):
        state, metrics = step_fn(state, put(features), frozen)
      if pending is not None:
        writer.scalars(pending[0], fetch(*pending))
      pending = step, metrics
      stopping = stop.reached()
      first = step == begin + 1
      if not (stopping or first or profiler.due(step) or due(step, config.eval.every)
              or due(step, config.checkpoint.every)):
        continue

      # Something comes before the next step: first this one is finished.
      logged, pending = fetch(*pending), None
      profiler.end_after(step)
      if first:
        console.line(f'first step after {time.perf_counter() - start:.1f} s of compiling and running')
      settled = settle(step, logged, stopping)
      if not settled or ((stopping or stop.requested) and step < config.num_steps):
        checkpoints.wait()
        raise Interrupted(f'stopped at step {step} of {config.num_steps}, saved in {workdir}; '
                          'the same command goes on from there')
      if record.exhausted:
        console.line(f'step {step}: {config.eval.monitor} has not improved for {record.stale} evaluations: the run '
                     'ends (config.eval.patience)')
        break
      profiler.begin_after(step)
      throughput.restart()
    checkpoints.wait()
    barrier('end')
    return results


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


def abstract_batch(examples: Examples, num_rows: int) -> Batch:
  """A Batch of `num_rows` rows of the examples' shapes and types."""
  row = examples.make(0, np.random.default_rng(0))
  return as_batch({name: jax.ShapeDtypeStruct((num_rows, *x.shape), x.dtype) for name, x in row.items()})


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


def text_metrics(split: str, loss: float | None, data: Data, task: str) -> dict[str, float]:
  """Perplexity, and bits per byte by the split's mean bytes per token, of nats a token."""
  if loss is None:
    return {}
  values = {f'{split}/perplexity': float(np.exp(min(loss, 700.0)))}
  stores = data.train.values()
  if task == 'next_token' and stores and all(store.num_bytes for store in stores):
    num_tokens, num_bytes = sum(len(s.tokens) for s in stores), sum(s.num_bytes for s in stores)
    values[f'{split}/bits_per_byte'] = loss / np.log(2) * num_tokens / num_bytes
  return values


def write_run_files(config: Config, data: Data, workdir: Path) -> None:
  """config.json, which repeats the run, and its tokenizers, without which its tokens mean nothing."""
  if jax.process_index() != 0:
    return
  files = {'config.json': json.dumps(to_dict(config), indent=2)}
  for name, tokenizer in (('tokenizer', data.tokenizer), ('encoder_tokenizer', data.encoder_tokenizer)):
    if tokenizer is not None:
      files[f'{name}.json'] = tokenizer.to_json()
  for name, content in files.items():
    aside = workdir / f'{name}.partial'
    aside.write_text(content)
    os.replace(aside, workdir / name)


def describe(config: Config, data: Data, state: TrainState, num_microbatches: int, held_rows: int, workdir: Path,
             console: Console) -> None:
  devices, seq_len = jax.devices(), config.data.seq_len
  num_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
  num_train, num_val = (sum(len(store.tokens) for store in side.values()) for side in (data.train, data.val))
  amount = 'a stream' if config.data.streaming else f'{num_train / 1e6:.2f} M tokens'
  epochs = config.num_steps * config.batch_tokens / max(1, num_train)
  console.line(f'devices: {len(devices)} x {devices[0].device_kind}, {jax.process_count()} process(es), '
               f'mesh {dict(jax.sharding.get_abstract_mesh().shape)}')
  console.line(f'model: {config.model.name}, {num_params / 1e6:.2f} M parameters, {config.model.num_layers} layers, '
               f'{config.model.embed_dim} wide, vocabulary {config.model.vocab_size}, {config.model.dtype}')
  console.line('attention: ' + describe_attention(
      config.model.attention, config.model.dtype, config.model.H, config.model.positions_of(seq_len),
      segments=config.data.mask_documents, prefix=config.model.prefix_attention))
  console.line(f'data: {", ".join(shown(s.path) for s in config.data.named_sources.values())}: {amount} to train '
               f'on, {num_val / 1e6:.2f} M to validate with'
               + (f'; {config.num_steps} steps are {epochs:.2f} epochs' if num_train else ''))
  console.line(f'batch: {config.batch_tokens} tokens = {num_microbatches} microbatch(es) x {held_rows} row(s) '
               f'x {seq_len} tokens on each of {config.rows_per_batch // num_microbatches // held_rows} device(s)')
  console.line(f'workdir: {workdir}; watch it: tensorboard --logdir {workdir}')


def barrier(name: str) -> None:
  """Waits for every process, however long: by the coordinator, as a collective may give up after 30 seconds."""
  multihost.get_barrier_sync_fn()(key=name, timeout_ms=24 * 60 * 60 * 1000)
