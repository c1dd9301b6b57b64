"""The training loop: what is due after which step, and a session that is driven step by step."""

import contextlib
import dataclasses
import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from program import write_config

import llm_jax
from llm_jax.base.errors import ConfigError, DivergedError, Interrupted
from llm_jax.base.files import latest_step
from llm_jax.config import CheckpointConfig, Config, EvalConfig, LogConfig
from llm_jax.data.config import DataConfig
from llm_jax.data.pipeline import Batches
from llm_jax.models.decoder_config import DecoderConfig
from llm_jax.optim.chain import as_optimizer
from llm_jax.training.log import Logs, PackedMetrics, read_metrics
from llm_jax.training.loop import due
from llm_jax.training.session import Session
from llm_jax.training.skips import MAX_SKIPPED
from llm_jax.training.state import TrainState
from llm_jax.training.throughput import Goodput, Throughput

CONFIG = Config(
    num_steps=100, batch_tokens=64, tokens_per_device=64, model=DecoderConfig(vocab_size=16, num_layers=1),
    data=DataConfig(seq_len=8), eval=EvalConfig(every=10), checkpoint=CheckpointConfig(every=25),
    log=LogConfig(every=1, histograms_every=8))
DUE = [
    ('an ordinary step', 7, {}, ''),
    ('eval.every', 10, {}, 'evaluate sample settle'),
    ('checkpoint.every', 25, {}, 'save settle'),
    ('both', 50, {}, 'evaluate save sample settle'),
    ('the last step', 100, {}, 'evaluate save sample settle'),
    ('the end of a stage', 7, {'end': 7}, 'save settle'),
    ('the first step of a process', 7, {'first': True}, 'settle'),
    ('a signal', 7, {'stopping': True}, 'save settle'),
    ('a trace begins or ends', 7, {'traced': True}, 'settle'),
    ('log.histograms_every', 8, {}, 'settle'),
    ('eval.every without a validation part', 10, {'has_val': False}, ''),
    ('the last step without a validation part', 100, {'has_val': False}, 'save settle'),
    ('a signal where an evaluation is due', 10, {'stopping': True}, 'evaluate save sample settle'),
]


@pytest.mark.parametrize(('step', 'where', 'names'), [row[1:] for row in DUE], ids=[row[0] for row in DUE])
def test_what_is_due(step, where, names):
  found = due(step, CONFIG, **{'end': 100, 'first': False, 'stopping': False, 'traced': False, 'has_val': True} | where)
  assert {name for name, wanted in found._asdict().items() if wanted} == set(names.split())


class Scalars:
  """The metrics of a step, as they are on a device: reading them is noted."""

  def __init__(self, step, values, happened):
    self.step, self.values, self.happened = step, values, happened

  def __array__(self, dtype=None, copy=None):
    self.happened.append(f'fetch {self.step}')
    return np.asarray(self.values, np.float32)


class Program:
  """A program whose step counts: of step n the loss is n."""

  constants = model = None
  fingerprint, state_key = {'train_tokens': 'abc'}, 'key'
  tx = as_optimizer(optax.identity())
  data = SimpleNamespace(train={}, val={'stdlib': None}, tokenizer=None, encoder_tokenizer=None)
  stage = SimpleNamespace(new_data=False, begin=0, end=CONFIG.num_steps, first_row=lambda step: step,
                          end_row=lambda step: step)

  def __init__(self, happened, skipped=(), losses=(3.0, 2.0, 1.0), config=CONFIG):
    self.happened, self.skipped, self.losses, self.config = happened, skipped, iter(losses), config

  def step(self, state, batch, constants):
    step = int(state.step) + 1
    self.happened.append(f'step {step}')
    values = {'loss': step, 'grad_norm': 1, 'learning_rate': 1, 'num_tokens': 64, 'skipped': step in self.skipped}
    return state.replace(step=jnp.int32(step)), PackedMetrics(
        Scalars(step, list(values.values()), self.happened), tuple(values))

  def weights(self, state):
    return state.trainable

  def evaluator(self, params, stores, max_tokens, interrupted):
    self.happened.append('evaluate')
    if interrupted():
      raise Interrupted
    return {'loss': next(self.losses), 'tokens': 8.0}, {}


class Checkpoints:
  """Notes what would be written; `saves` holds what it kept."""

  def __init__(self, happened):
    self.happened, self.saves, self.full, self.newest = happened, {}, False, None

  def save(self, step, params, opt_state, meta):
    if self.full or step in self.saves:
      return False
    self.happened.append(f'save {step}')
    self.saves[step] = [None, json.loads(json.dumps(meta))]
    return True

  def record(self, step, score, since, results):
    if step in self.saves:
      self.saves[step][0] = score
    return step in self.saves

  def wait(self):
    self.happened.append('wait')
    return True


def open_session(**options):
  """(a session on a Program of this file, what happened in it)."""
  happened = []
  writer = SimpleNamespace(
      scalars=lambda step, values: happened.append(f'write {step}') if values else None, text=lambda *_: None)
  console = SimpleNamespace(step=lambda *_: None, metrics=lambda *_: None, saving=lambda *_: None,
                            results=lambda *_: None, line=lambda text: happened.append(text),
                            progress=lambda name: contextlib.nullcontext())
  status = SimpleNamespace(values={}, system=lambda step: {}, update=lambda **values: None)
  state = TrainState(jnp.int32(0), {'w': jnp.zeros(2)}, {}, optax.EmptyState())
  batches = Batches(iter([{'tokens': np.zeros((1, 8))}] * 100))
  stop = SimpleNamespace(requested=False, reached=lambda: stop.requested)
  session = Session(Program(happened, **options), state, {}, batches, Checkpoints(happened),
                    Logs(writer, console, status, Goodput()), Throughput(1.0, None),
                    stop, lambda features: features)
  return session, happened


def test_metrics_are_fetched_one_step_late():
  session, happened = open_session()
  for _ in range(3):
    session.advance()
  assert happened == ['step 1', 'step 2', 'fetch 1', 'write 1', 'step 3', 'fetch 2', 'write 2']


def test_settling_fetches_the_step_in_flight_once():
  session, happened = open_session()
  session.advance()
  session.settle()
  session.settle()
  assert happened == ['step 1', 'fetch 1'] and session.logged['train/loss'] == 1
  session.advance()
  assert happened[2:] == ['step 2'], 'nothing is left to fetch'


def test_metrics_are_written_before_the_checkpoint_of_their_step():
  for save in (Session.save, Session.save_now):
    session, happened = open_session()
    session.advance()
    session.settle()
    save(session)
    assert happened.index('write 1') < happened.index('save 1')


def test_the_best_counts_as_saved_only_once_a_checkpoint_was_written():
  session, _ = open_session(losses=(3.0, 2.0))
  session.advance()
  session.settle()
  session.evaluate()
  assert session.improved and session.best.saved == float('inf')
  session.checkpoints.full = True
  session.save()
  assert session.improved and session.best.saved == float('inf')
  session.checkpoints.full = False
  session.save()
  assert not session.improved and session.best.saved == 3.0
  score, meta = session.checkpoints.saves[1]
  assert score == 3.0 and meta['best']['saved'] == 3.0 and meta['evaluated']


def test_an_evaluation_that_a_signal_cuts_short_leaves_no_score():
  session, _ = open_session()
  session.advance()
  session.settle()
  session.stop.requested = True
  session.evaluate()
  assert session.score is None and not session.improved and session.best.stale == 0
  session.save()
  score, meta = session.checkpoints.saves[1]
  assert score is None and not meta['evaluated'], 'a resumed run evaluates the step again'


def test_a_score_belongs_to_one_step():
  session, _ = open_session()
  session.advance()
  session.settle()
  session.evaluate()
  session.advance()
  assert session.score is None and not session.improved


def test_many_skipped_steps_in_a_row_raise_diverged_error():
  skipped = {1, 2, *range(4, 4 + MAX_SKIPPED)}  # step 3 ends the first row
  session, happened = open_session(skipped=skipped)
  with pytest.raises(DivergedError, match=f'steps 4 to {3 + MAX_SKIPPED} were not applied'):
    while session.step < 50:
      session.advance()
  assert session.step == 4 + MAX_SKIPPED, 'metrics are one step late'
  assert len([line for line in happened if 'WARNING' in line]) == 2, 'once for each row of skipped steps'


def test_no_checkpoint_is_written_while_steps_are_skipped():
  session, happened = open_session(skipped={2, 3})
  for step, late in ((1, False), (2, True), (3, True), (4, False)):
    session.advance()
    session.settle()
    session.save()
    assert (session.step, session.skips.late) == (step, late)
  assert [line for line in happened if line.startswith('save ')] == ['save 1', 'save 4']
  assert sum('is not saved' in line for line in happened) == 1


@pytest.mark.parametrize('skipped', [{2}, {1, 2}])
def test_a_skipped_last_step_is_saved_unless_the_one_before_was_skipped_too(skipped):
  session, happened = open_session(skipped=skipped)
  session.program.stage = SimpleNamespace(**vars(session.program.stage) | {'end': 2})
  for _ in range(2):
    session.advance()
    session.settle()
  if len(skipped) == 1:
    session.save()
    assert 'save 2' in happened and not session.skips.late
  else:
    with pytest.raises(DivergedError, match='the updates of the last 2 steps, up to step 2, were not applied'):
      session.save()


def test_skipped_steps_are_counted_between_logged_steps():
  session, _ = open_session(skipped={1, 2, 4}, config=dataclasses.replace(CONFIG, log=LogConfig(every=3)))
  found = []
  for _ in range(6):
    session.advance()
    session.settle()
    found += [(event.step, event.metrics['train/skipped']) for event in session.events(())]
  assert found == [(1, 1), (3, 1), (6, 1)]


def test_callbacks_get_each_step_once():
  session, _ = open_session()
  called, yielded = [], []
  for _ in range(3):
    session.advance()
    for _ in range(2):
      yielded += session.events((called.append,))
  session.settle()
  yielded += session.events((called.append,))
  assert called == yielded and [event.step for event in called] == [1, 2, 3]
  assert [event.metrics['train/loss'] for event in called] == [1, 2, 3]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('loop')
  write_config(folder)
  return folder


def tiny(folder, **settings):
  return llm_jax.load_config(folder / 'tiny.py', **{
      'num_steps': 8, 'eval.every': 4, 'eval.sample_tokens': 0, 'checkpoint.every': 100, 'log.every': 1,
      'checkpoint.keep_best': 0, 'model.num_layers': 1, 'model.scan_unroll': 1, 'batch_tokens': 256} | settings)


def test_stopping_saves_the_run_and_raises_interrupted(folder):
  """At the first step of a process, at an evaluated one (both are finished when their event comes), and in flight."""
  workdir, seen = folder / 'stopped', []
  for step, saved in ((1, 1), (4, 4), (6, 7)):
    def stop(event, step=step):
      seen.append(event.step)
      if event.step == step:
        event.stop()

    with pytest.raises(Interrupted, match=f'stopped at step {saved} of 8'):
      list(llm_jax.train(tiny(folder), workdir, callbacks=stop))
    assert latest_step(workdir) == saved
    assert json.loads((workdir / 'status.json').read_text())['state'] == 'stopped'
  seen += [metrics['step'] for metrics in llm_jax.train(tiny(folder), workdir)]
  assert seen == list(range(1, 9)) and latest_step(workdir) == 8
  assert [line['step'] for line in read_metrics(workdir / 'metrics.jsonl')] == seen


@pytest.mark.slow
def test_a_run_that_is_stopped_at_its_last_step_lacks_its_evaluation_alone(folder):
  def stop(event):
    if event.step == 7:  # its event comes while step 8 runs
      event.stop()

  with pytest.raises(Interrupted, match=r'at step 8 of 8, saved in .*; repeat the command to evaluate that step'):
    list(llm_jax.train(tiny(folder), folder / 'last', callbacks=stop))
  assert not list(llm_jax.train(tiny(folder), folder / 'last')), 'no step is trained again'
  assert 'val/loss' in read_metrics(folder / 'last' / 'metrics.jsonl')[-1]
  assert json.loads((folder / 'last' / 'status.json').read_text())['state'] == 'finished'
  list(llm_jax.train(tiny(folder, **{'eval.every': 0}), folder / 'unevaluated', callbacks=stop))  # it is complete


@pytest.mark.slow
def test_a_run_without_a_validation_part_is_not_evaluated(folder):
  """Neither at its last step nor when the finished run is started again."""
  tokens = np.tile(np.arange(32, dtype=np.int32), (8, 1))
  batches = [{'tokens': tokens, 'targets': np.roll(tokens, -1, 1)}] * 4
  config = tiny(folder, **{'model.vocab_size': 64, 'num_steps': 4})
  for expected in ([1, 2, 3, 4], []):
    seen = []
    for metrics in (training := llm_jax.train(config, folder / 'batches', data=batches)):
      seen.append(metrics['step'])
      with pytest.raises(ConfigError, match='no validation part'):
        training.validate()
    assert seen == expected
