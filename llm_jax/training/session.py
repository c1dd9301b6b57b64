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
from llm_jax.training.log import Epochs, Logs, PackedMetrics, text_metrics, unpack_metrics
from llm_jax.training.program import Program
from llm_jax.training.skips import Skips
from llm_jax.training.state import TrainState
from llm_jax.training.throughput import Throughput


@dataclasses.dataclass(frozen=True)
class Event:
  """A logged step, and operations on the run before it continues."""

  step: int
  metrics: dict[str, float]  # 'train/loss', and 'val/loss' if the step was evaluated
  session: Session

  def validate(self) -> dict[str, float]:
    """Evaluates the current weights on the validation part: {'val/loss': ...}."""
    return self.session.measure()

  def save(self) -> None:
    """Writes a checkpoint now and waits until it is complete on disk."""
    self.session.save_now()

  def read(self) -> Loaded:
    """The model with a copy of its current weights."""
    return self.session.read()

  def status(self) -> dict[str, Any]:
    return dict(self.session.status.values)

  def stop(self) -> None:
    """Saves and ends the run after this step, as a signal does; it can be resumed."""
    self.session.stop.requested = True


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
    self.pending: tuple[int, PackedMetrics] | None = None  # a step whose metrics have not been fetched
    self.logged: dict[str, float] = {}  # metrics of the fetched step, until its event is yielded
    self._logged_step, self._unwritten = self.begin, dict[str, float]()
    self.skips = Skips(self.console.line)
    self.step_started = time.perf_counter()
    self._epochs = Epochs(lambda step: int(stage.rows_at(step) // batches.rows_per_epoch), meta.get('epoch') or {})

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
    features = next(self.batches)
    self.throughput.waited(time.perf_counter() - start)
    self.goodput.add('data', time.perf_counter() - start)
    previous, self.step, self.score = self.pending, self.step + 1, None
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
      self.score, reached = self.best.update(self.step, results)
      self.evaluated_at = self.step
      best = self.best.best_value  # None if no result was finite
      self._log(results | {f'capability/{text}': float(self.step) for text in reached} | self.best.retention(results)
                | ({} if best is None else {f'best/{self.config.eval.monitor}': best}))
      opt_state = self.program.tx.update_from_eval(self.state.opt_state, results)
      self.state = dataclasses.replace(self.state, opt_state=opt_state)
      for text in reached:
        self.console.line(f'step {self.step}: {text} reached for the first time')

  def measure(self) -> dict[str, float]:
    """The results of an evaluation of the current weights. Raises Interrupted after a signal, ConfigError without a
    validation part."""
    evaluation = self.config.eval
    if not self.program.data.val:
      raise ConfigError('the run has no validation part, so there is nothing to evaluate on; ready batches have none')
    results, _ = self.program.evaluator(self.weights, self.program.data.val, evaluation.max_tokens,
                                        lambda: self.stop.requested)
    results = {f'val/{name}': value for name, value in results.items()}
    self.console.results(self.step, results)
    return results

  @property
  def improved(self) -> bool:
    """Whether this step's score is better than that of all checkpoints."""
    return self.score is not None and self.score < self.best.saved

  def save(self) -> None:
    """Writes the metrics, then starts a checkpoint of this step."""
    self._write()
    best = self.best if self.score is None else dataclasses.replace(self.best, saved=min(self.best.saved, self.score))
    with self.goodput.of('save'), self.console.progress('saving'):
      if self._save(self.score, best):
        self.best = best

  def save_now(self) -> None:
    """Saves between two steps and waits until the checkpoint is complete on disk."""
    self.settle()
    self._write()
    self._save(None, self.best)
    self.checkpoints.wait()

  def sample(self) -> None:
    """Generates and logs a sample for each of config.eval.prompts, if this step was evaluated."""
    if self.score is None:
      return
    with self.console.progress('sampling'):
      written = samples(self.config, self.program.data, self.program.model, self.weights)
    for prompt, sample in written:
      self.writer.text(self.step, f'sample/{prompt or "new document"}', sample)
      self.console.sample(self.step, prompt, sample)

  def report(self, at_once: bool = True) -> None:
    """Updates status.json."""
    self.status.update(at_once=at_once, step=self._logged_step, best=self.best.best_value,
                       seconds_left=0.0 if self.best.over else self.throughput.seconds_left(self._logged_step),
                       metrics=(self.status.values.get('metrics') or {}) | self.logged)

  def events(self, callbacks: tuple[Callable[[Event], Any], ...]) -> Iterator[Event]:
    """Passes the event of the logged step, if there is one, to the callbacks and yields it."""
    start = time.perf_counter()
    self._write()
    logged, self.logged = self.logged, {}
    if 'train/loss' in logged:
      event = Event(self._logged_step, logged, self)
      for callback in callbacks:
        callback(event)
      yield event
    self.throughput.away(time.perf_counter() - start)
    self.goodput.add('caller', time.perf_counter() - start)

  def read(self) -> Loaded:
    """The model with a copy of its current weights."""
    data, params = self.program.data, jax.tree.map(jnp.copy, self.weights)  # the next step overwrites the originals
    meta = {'step': self.step, 'data': self.program.fingerprint}
    return Loaded(self.config, data.tokenizer, data.encoder_tokenizer, self.program.model, params, meta)

  def _fetch(self, step: int, metrics: PackedMetrics) -> None:
    """Waits for a step; logs its metrics if due, and the means of an epoch that ends with it."""
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
    self._log(logged | self.status.system() | self.goodput.shares() | epoch)
    self.console.metrics(step, self.logged, self.throughput.seconds_left(step))
    self.report(at_once=False)

  def _log(self, values: dict[str, float]) -> None:
    self.logged |= values
    self._unwritten |= values

  def _write(self) -> None:
    """Writes the logged metrics; called before saving, so that they are on disk before a checkpoint of their step."""
    self.writer.scalars(self._logged_step, self._unwritten)
    self._unwritten = {}

  def _save(self, score: float | None, best: Best) -> bool:
    # The step is saved with the optimizer's state, as some optimizers have an empty state, which Orbax rejects.
    state = self.state
    arrays = {'params': state.params, 'opt_state': state.opt_state}
    if not self.skips.allow_save(self.step, self.program.stage.end, arrays):
      return False
    saves = self.checkpoints.save(
        self.step, state.params, (state.step, state.opt_state), score=score, since=best.since, meta={
            'config': public(to_dict(self.config)), 'data': self.program.fingerprint,
            'stream_states': gather(self.batches.state()), 'evaluated': self.evaluated_at == self.step,
            'best': best.to_meta(), 'epoch': self._epochs.sums, 'state_key': self.program.state_key,
            'versions': {'llm_jax': __version__, 'jax': jax.__version__, 'python': platform.python_version()}})
    if saves:
      self.console.saving(self.step, self.config.eval.monitor, best.best_value)
    return saves
