"""Session: a training in progress, with the state of one stage and the operations between its steps."""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax import __version__
from llm_jax.base.activity import ACTIVITY
from llm_jax.base.batch import Batch, Params
from llm_jax.base.builder import to_dict
from llm_jax.base.errors import ConfigError, Interrupted
from llm_jax.base.multihost import gather
from llm_jax.base.redaction import public
from llm_jax.base.stopping import StopSignal
from llm_jax.config import Config
from llm_jax.data.pipeline import Batches
from llm_jax.infer.load import Loaded
from llm_jax.infer.text import samples
from llm_jax.training.best import Best
from llm_jax.training.checkpoint import Checkpoints
from llm_jax.training.event import Event
from llm_jax.training.log import Epochs, Logs, PackedMetrics, text_metrics, unpack_metrics
from llm_jax.training.program import Program
from llm_jax.training.skips import Skips
from llm_jax.training.state import TrainState
from llm_jax.training.throughput import Throughput


class Session:
  """The operations of a training, one per method; loop.py calls them in order.

  Metrics are fetched one step late, so that the device computes a step while the host logs the one before.
  """

  def __init__(self, program: Program, state: TrainState, meta: dict[str, Any], batches: Batches,
               checkpoints: Checkpoints, logs: Logs, throughput: Throughput, stop: StopSignal,
               put: Callable[[dict[str, Any]], Batch]):
    self.program, self.state = program, state
    self.batches, self.checkpoints, self.throughput, self.stop, self._put = batches, checkpoints, throughput, stop, put
    self.writer, self.console, self.status, self.goodput = logs
    self.step = self.begin = int(state.step)
    stage = program.stage
    self.best = Best.from_meta(self.config.eval, meta, other_data=stage.new_data and self.begin == stage.begin)
    self.evaluated_at = self.begin if meta.get('evaluated', True) else -1
    self.score: float | None = None  # of this step's evaluation
    self.results = dict[str, float]()  # of this step's evaluation
    self.pending: tuple[int, PackedMetrics] | None = None  # a step whose metrics have not been fetched
    self.logged: dict[str, float] = {}  # metrics of the fetched step, until its event is yielded
    self._logged_step, self._unwritten = self.begin, dict[str, float]()
    self.skips = Skips(self.console.line)
    self.step_started = time.perf_counter()
    self._epochs = Epochs(lambda step: int(stage.first_row(step) // batches.rows_per_epoch), meta.get('epoch') or {})

  @property
  def config(self) -> Config:
    return self.program.config

  @property
  def weights(self) -> Params:
    """The parameters to evaluate, sample from and export."""
    return self.program.weights(self.state)

  def advance(self) -> None:
    """Dispatches the next step, then fetches and writes the metrics of the step before."""
    self.step_started = start = time.perf_counter()
    with ACTIVITY.during('data'):
      features = next(self.batches)
    waited = time.perf_counter() - start
    self.throughput.waited(waited)
    self.goodput.add('data', waited)
    previous, self.step, self.score = self.pending, self.step + 1, None
    ACTIVITY.begin_step(self.step, waited)
    with jax.profiler.StepTraceAnnotation('train', step_num=self.step):
      self.batch = self._put(features)
      self.state, metrics = self.program.step(self.state, self.batch, self.program.constants)
    self.pending = self.step, metrics
    if previous is not None:
      self._fetch(*previous)
      self._write()

  def settle(self) -> None:
    """Waits for the current step and fetches its metrics."""
    pending, self.pending = self.pending, None
    if pending is not None:
      self._fetch(*pending)

  def evaluate(self) -> None:
    """Evaluates this step, unless a signal interrupts it, and updates the best metric and the optimizer."""
    with contextlib.suppress(Interrupted), self.goodput.of('evaluation'):
      results = self.measure()
      reached = self.apply(results)
      best = self.best.best_value  # None if no result was finite
      self._log(results | {f'capability/{text}': float(self.step) for text in reached} | self.best.retention(results)
                | ({} if best is None else {f'best/{self.config.eval.monitor}': best}))
      self._write()
      self._record()
      for text in reached:
        self.console.line(f'step {self.step}: {text} reached for the first time')

  def apply(self, results: dict[str, float]) -> list[str]:
    """Updates best metric and optimizer by results of this step; returns capabilities reached for the first time."""
    self.score, reached = self.best.update(self.step, results)
    self.results, self.evaluated_at = results, self.step
    opt_state = self.program.tx.update_from_eval(self.state.opt_state, results)
    self.state = dataclasses.replace(self.state, opt_state=opt_state)
    return reached

  def catch_up(self) -> None:
    """Evaluates the step that the run resumes from, or takes over the results that were recorded for it."""
    known = self.checkpoints.results(self.step)
    if known is not None:
      self.apply(known)
      self._record()
    else:
      self.evaluate()
      self.sample()

  def measure(self) -> dict[str, float]:
    """The results of an evaluation of the current weights. Raises Interrupted after a signal, ConfigError without a
    validation part."""
    evaluation = self.config.eval
    if not self.program.data.val:
      raise ConfigError('the run has no validation part, so there is nothing to evaluate on; ready batches have none')
    results, _ = self.program.evaluator(self.weights, self.program.data.val, evaluation.max_tokens,
                                        self.stop.reached)
    results = {f'val/{name}': value for name, value in results.items()}
    self.console.results(self.step, results)
    return results

  @property
  def improved(self) -> bool:
    """Whether this step's score is better than that of all checkpoints."""
    return self.score is not None and self.score < self.best.saved

  def save(self) -> None:
    """Writes the metrics, then starts a checkpoint of this step, with its score if it was evaluated before."""
    with self.goodput.of('save'), self.console.progress('saving'):
      self._save()

  def wait(self) -> None:
    """Waits until the newest checkpoint is complete on disk; saves this step again if that failed."""
    with self.goodput.of('save'):
      saved = self.checkpoints.wait()
    while not saved:
      self.save()
      saved = self.checkpoints.wait()
    self.status.update(saved=self.checkpoints.newest)

  def save_now(self) -> None:
    """Saves between two steps and waits until the checkpoint is complete on disk."""
    self.settle()
    self._save()
    self.wait()

  def sample(self) -> None:
    """Generates and logs a sample for each of config.eval.prompts, if this step was evaluated."""
    if self.score is None:
      return
    with self.console.progress('sampling'), ACTIVITY.during('evaluation'):
      written = samples(self.config, self.program.data, self.program.model, self.weights, self.stop.reached)
    for prompt, sample in written:
      self.writer.text(self.step, f'sample/{prompt or "new document"}', sample)
      self.console.sample(self.step, prompt, sample)

  def report(self, at_once: bool = True) -> None:
    """Updates status.json."""
    self.status.update(at_once=at_once, step=self._logged_step, best=self.best.best_value,
                       saved=self.checkpoints.newest,
                       goodput=self.goodput.shares(),
                       seconds_left=0.0 if self.best.over else self.throughput.seconds_left(self._logged_step),
                       metrics=(self.status.values.get('metrics') or {}) | self.logged)

  def events(self, callbacks: tuple[Callable[[Event], Any], ...]) -> Iterator[Event]:
    """Passes the event of the logged step, if there is one, to the callbacks and yields it."""
    start, counted = time.perf_counter(), self.goodput.counted
    self._write()
    logged, self.logged = self.logged, {}
    if 'train/loss' in logged:
      event = Event(self._logged_step, logged, self)
      with ACTIVITY.during('callback'):
        for callback in callbacks:
          callback(event)
      with ACTIVITY.during('caller'):
        yield event
    self.throughput.away(time.perf_counter() - start)
    self.goodput.add_rest('caller', start, counted)  # the caller may have saved or evaluated

  def read(self) -> Loaded:
    """The model with a copy of its current weights."""
    data, params = self.program.data, jax.tree.map(jnp.copy, self.weights)  # the next step overwrites the originals
    meta = {'step': self.step, 'data': self.program.fingerprint}
    return Loaded(self.config, data.tokenizer, data.encoder_tokenizer, self.program.model, params, meta)

  def _fetch(self, step: int, metrics: PackedMetrics) -> None:
    """Waits for a step; logs its metrics if due, and the means of an epoch that ends with it."""
    with ACTIVITY.waiting():
      values, config = unpack_metrics(metrics), self.config
    self.throughput.step_done(values['num_tokens'])
    self.skips.add(step, values)
    self._logged_step = step
    self.console.step(step)
    epoch = self._epochs.add(step, values)
    if step % config.log.every and step not in (1, self.program.stage.end):
      self._log(epoch)
      return
    values |= {'skipped': self.skips.take()} | self.throughput.take()
    logged = {f'train/{name}': value for name, value in values.items()}
    text_loss = values.get('next_token/loss', values['loss'] if config.loss.terms == ('next_token',) else None)
    logged |= text_metrics('train', text_loss, self.program.data, config.data.task) | self.batches.metrics()
    self._log(logged | self.status.system(step) | self.goodput.shares() | epoch)
    self.console.metrics(step, self.logged, self.throughput.seconds_left(step))
    self.report(at_once=False)

  def _log(self, values: dict[str, float]) -> None:
    self.logged |= values
    self._unwritten |= values

  def _write(self) -> None:
    """Writes the logged metrics; called before saving, so that they are on disk before a checkpoint of their step."""
    self.writer.scalars(self._logged_step, self._unwritten)
    self._unwritten = {}

  def _record(self) -> None:
    """Stores the results of this step's evaluation with its checkpoint, if it has both."""
    if self.score is not None and self.checkpoints.record(self.step, self.score, self.best.since, self.results):
      self.best = dataclasses.replace(self.best, saved=min(self.best.saved, self.score))

  def _save(self) -> None:
    self._write()
    best = self.best if self.score is None else dataclasses.replace(self.best, saved=min(self.best.saved, self.score))
    # The step is saved with the optimizer's state, as some optimizers have an empty state, which Orbax rejects.
    state = self.state
    if not self.skips.allow_save(self.step, self.program.stage.end):
      return
    saves = self.checkpoints.save(
        self.step, state.params, (state.step, state.opt_state), meta={
            'config': public(to_dict(self.config)), 'data': self.program.fingerprint,
            'position': {'rows': self.program.stage.end_row(self.step)},
            'stream_states': gather(self.batches.state()), 'evaluated': self.evaluated_at == self.step,
            'best': best.to_meta(), 'epoch': self._epochs.sums, 'state_key': self.program.state_key,
            'versions': {'llm_jax': __version__, 'jax': jax.__version__, 'python': platform.python_version()}})
    if saves:
      self.console.saving(self.step, self.config.eval.monitor, best.best_value)
      self._record()
