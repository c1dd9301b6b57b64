"""Parts passed from Python: model, optimizer, loss, data and callbacks; resumed exactly, loaded, and their FLOPs."""

import functools

import flax.linen as nn
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import llm_jax
from llm_jax.base.batch import Batch
from llm_jax.base.errors import ConfigError, DataError
from llm_jax.base.trees import split
from llm_jax.config import CheckpointConfig, Config, EvalConfig, LogConfig
from llm_jax.data.config import DataConfig
from llm_jax.models.decoder import Decoder
from llm_jax.models.decoder_config import DecoderConfig
from llm_jax.models.protocol import TokensToLogits
from llm_jax.optim.chain import OptimConfig
from llm_jax.training.flops import count_in, count_matmuls
from llm_jax.training.log import read_metrics
from llm_jax.training.state import init_state, train_step

SEQ_LEN, ROWS, STEPS = 16, 8, 12
TEXTS = [f'cat {i} sat on the mat of sir {i * i}, who saw that it was good' for i in range(200)]


class Bigram(nn.Module):
  """Logits of the next token from the last one."""

  vocab_size: int = 257

  @nn.compact
  def __call__(self, tokens_BT):
    return nn.Dense(self.vocab_size)(nn.relu(nn.Embed(self.vocab_size, 16)(tokens_BT)))


class BigramOf200(nn.Module):
  """Without a field for its number of tokens."""

  @nn.compact
  def __call__(self, tokens_BT):
    return nn.Embed(200, 200)(tokens_BT)


class NnxBigram(nnx.Module):
  def __init__(self, rngs):
    self.embed = nnx.Embed(257, 16, rngs=rngs)
    self.out = nnx.Linear(16, 257, rngs=rngs)

  def __call__(self, tokens_BT):
    return self.out(nnx.relu(self.embed(tokens_BT)))


def squared(logits_BTV, batch):
  """The squared error of the probabilities of targets."""
  p_BTV = jax.nn.softmax(logits_BTV)
  p_BT = jnp.take_along_axis(p_BTV, batch.targets[..., None], axis=-1)[..., 0]
  return (1 - p_BT) ** 2, batch.loss_mask


def ready_batches():
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 16, (5, ROWS, SEQ_LEN + 1)).cumsum(-1) % 257  # steps of 0 to 15
  return [{'tokens': rows[:, :-1], 'targets': rows[:, 1:]} for rows in tokens]


DATA = {
    'texts': lambda: TEXTS,
    'batches': ready_batches,
    'map_dataset': lambda: grain.MapDataset.source(ready_batches()).shuffle(seed=1),
    'iter_dataset': lambda: grain.MapDataset.source(ready_batches()).shuffle(seed=1).repeat().to_iter_dataset(
        grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)),  # by default it reads 500 batches ahead
    'map_dataset_of_texts': lambda: grain.MapDataset.source(TEXTS),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv('LLM_JAX_CACHE', str(tmp_path / 'cache'))


def config():
  return Config(
      num_steps=STEPS, batch_tokens=ROWS * SEQ_LEN, tokens_per_device=SEQ_LEN,
      data=DataConfig(tokenizer='byte', seq_len=SEQ_LEN), optim=OptimConfig(schedule='constant'),
      eval=EvalConfig(every=100, sample_tokens=0), checkpoint=CheckpointConfig(every=4), log=LogConfig(every=1))


def train(workdir, **parts):
  parts = {'model': Bigram(), 'tx': optax.adamw(1e-2)} | parts
  return llm_jax.train(config(), workdir, **parts)


@pytest.mark.parametrize('kind', [
    pytest.param(kind, marks=() if kind in ('texts', 'batches') else pytest.mark.slow) for kind in DATA])
def test_left_in_the_middle_it_resumes_exactly(kind, tmp_path):
  """Everything from Python at once: model, optimizer, loss, data and a callback."""
  events = []
  parts = {'loss': squared, 'data': DATA[kind](), 'callbacks': lambda event: events.append(event.step)}
  whole = list(train(tmp_path / 'whole', **parts))
  assert events == [metrics['step'] for metrics in whole] == list(range(1, STEPS + 1))
  assert whole[-1]['train/loss'] < whole[0]['train/loss'] < 1
  training = train(tmp_path / 'left', **parts)
  for metrics in training:
    if metrics['step'] == 6:
      break
  list(train(tmp_path / 'left', **parts | {'data': DATA[kind]()}))
  lines, expected = (read_metrics(tmp_path / run / 'metrics.jsonl') for run in ('left', 'whole'))
  for name in ('step', 'train/loss', 'train/grad_norm'):
    assert [line[name] for line in lines] == [line[name] for line in expected], name


def test_it_is_loaded_and_generates_with_the_model_given_again(tmp_path):
  list(train(tmp_path / 'run', data=TEXTS))
  trained = llm_jax.load(tmp_path / 'run', model=Bigram())
  assert isinstance(trained.generate('cat', num_tokens=5, seed=1), str)
  assert trained.validate()['loss'] == pytest.approx(read_metrics(tmp_path / 'run' / 'metrics.jsonl')[-1]['val/loss'])
  with pytest.raises(ConfigError, match=r'Bigram.*pass it again.*model='):
    llm_jax.load(tmp_path / 'run')
  with pytest.raises(ConfigError, match=r'pass it again.*tx='):
    list(llm_jax.train(llm_jax.load_config(tmp_path / 'run' / 'config.json'), tmp_path / 'run', model=Bigram()))
  with pytest.raises(ConfigError, match=r'vocab_size'):
    list(train(tmp_path / 'run', data=TEXTS, model=Bigram(300)))


def test_a_model_with_fewer_logits_than_tokens_is_told_the_number(tmp_path, capsys):
  for model in (Bigram(200), BigramOf200()):
    with pytest.raises(ConfigError, match=r'your model Bigram\w* has logits for 200 tokens, but the data have 257'):
      list(train(tmp_path / 'small', data=TEXTS, model=model))
  next(iter(train(tmp_path / 'large', data=TEXTS, model=Bigram(300))))
  printed = capsys.readouterr().out
  assert 'model: Bigram, passed from Python, logits for 300 tokens' in printed and 'model custom' not in printed
  assert 'tokens of a vocabulary of 257 to train on' in printed


def test_all_texts_of_a_generator_are_data_and_batches_must_be_readable_again(tmp_path):
  train(tmp_path / 'run', data=(text for text in TEXTS))
  assert (tmp_path / 'run' / 'data.jsonl').read_text().count('\n') == len(TEXTS)
  with pytest.raises(DataError, match='generator of batches can be read only once'):
    train(tmp_path / 'other', data=iter(batch for batch in ready_batches()))


class Switched(nn.Module):
  """Takes everything that a plain module may ask for."""

  @nn.compact
  def __call__(self, tokens_BT, segment_ids, positions, train):
    x_BTD = nn.Embed(257, 8)(tokens_BT) + nn.Embed(SEQ_LEN, 8)(positions) + nn.Embed(99, 8)(segment_ids)
    self.sow('losses', 'size', 1e-3 * jnp.mean(x_BTD ** 2))
    self.sow('metrics', 'size', jnp.mean(x_BTD ** 2))
    return nn.Dense(257)(nn.Dropout(0.5, deterministic=not train)(x_BTD))


def test_a_module_takes_the_features_that_it_names_and_sows_losses_and_metrics(tmp_path):
  training = train(tmp_path / 'run', model=Switched(), data=TEXTS)
  lines = list(training)
  assert lines[0]['train/extra_loss'] == pytest.approx(1e-3 * lines[0]['train/size'], rel=1e-4)
  assert training.config.data.mask_documents
  trained = llm_jax.load(tmp_path / 'run', model=Switched())
  assert trained.config.data.mask_documents and isinstance(trained.generate('cat', num_tokens=3), str)


def test_a_run_with_a_loss_of_ones_own_generates_and_is_evaluated(tmp_path):
  list(train(tmp_path / 'run', data=TEXTS, loss=squared))
  trained = llm_jax.load(tmp_path / 'run', model=Bigram(), loss=squared)
  assert isinstance(trained.generate('cat', num_tokens=5), str)
  assert 0 < trained.validate()['loss'] < 1


def test_an_nnx_module_is_trained_through_flaxs_bridge(tmp_path):
  model = nnx.bridge.to_linen(NnxBigram)
  lines = list(train(tmp_path / 'run', model=model, data=TEXTS))
  assert lines[-1]['train/loss'] < lines[0]['train/loss']
  assert isinstance(llm_jax.load(tmp_path / 'run', model=model).generate('cat', num_tokens=3), str)


SHAPE = {'vocab_size': 64, 'max_len': 64, 'num_layers': 3, 'embed_dim': 32, 'num_heads': 2, 'dtype': 'float32'}


def decoder(**fields):
  cfg = DecoderConfig(**SHAPE | fields)
  tokens = jnp.zeros((2, 64), jnp.int32)
  return Decoder(cfg), Batch(tokens=tokens, targets=tokens, loss_mask=jnp.ones((2, 64)))


@pytest.mark.parametrize('fields', [{}, {'mlp': 'swiglu', 'num_kv_heads': 1}, {'tie_embeddings': False}])
def test_counted_flops_are_those_of_the_decoders_formula(fields):
  """Within 10%, once the formula counts attention as XLA computes it: over all keys, also the masked half."""
  model, batch = decoder(attention='xla', **fields)
  params = jax.eval_shape(model.init, jax.random.key(0), batch)['params']
  counted = 3 * count_matmuls(model, nn.unbox(params), batch) / batch.tokens.size
  cfg = model.cfg
  masked = 12 * cfg.num_layers * batch.tokens.shape[1] / 2 * cfg.num_heads * cfg.H
  assert counted == pytest.approx(cfg.flops_per_token(64) + masked, rel=0.1)


def test_a_plain_modules_flops_are_counted():
  model, (_, batch) = TokensToLogits(Bigram(), None), decoder()
  params = jax.eval_shape(model.init, jax.random.key(0), batch)['params']
  assert count_matmuls(model, params, batch) == 2 * batch.tokens.size * 16 * 257


def step_flops(is_trainable):
  """FLOPs of matrix products that a training step keeps once XLA drops what nothing needs."""
  model, batch = decoder(attention='xla')
  tx = optax.sgd(0.1)
  state = jax.eval_shape(functools.partial(init_state, model=model, tx=tx, is_trainable=is_trainable),
                         jax.random.key(0), batch)
  closed = jax.make_jaxpr(functools.partial(train_step, model=model, tx=tx, seed=0))(state, batch)
  jaxpr, _ = jax.interpreters.partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
  share = sum(x.size for x in jax.tree.leaves(state.trainable)) / sum(x.size for x in jax.tree.leaves(state.params))
  return count_in(jaxpr), share


def test_frozen_parameters_cost_no_gradient():
  whole, share = step_flops(lambda path: True)
  assert share == 1
  few, share = step_flops(lambda path: 'attn' in jax.tree_util.keystr(path) and "'q'" in jax.tree_util.keystr(path))
  assert share < 0.1
  model, batch = decoder(attention='xla')
  params = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), batch)['params'])
  forward = count_matmuls(model, params, batch)
  _, frozen = split(params, lambda path: 'attn' in jax.tree_util.keystr(path) and "'q'" in jax.tree_util.keystr(path))
  weights = 2 * batch.tokens.size * sum(x.size for path, x in jax.tree_util.tree_leaves_with_path(frozen)
                                        if 'blocks' in jax.tree_util.keystr(path) and x.ndim > 2)
  assert whole == pytest.approx(3 * forward, rel=0.05)
  assert few < whole - 0.95 * weights, 'no gradient of a frozen matrix is computed'
