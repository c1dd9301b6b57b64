"""Layers split over the mesh axis `stage` give what one device gives, and send activations alone."""

import contextlib
import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import mesh_config, train_on

from llm_jax.base.batch import Batch
from llm_jax.base.builder import build
from llm_jax.base.errors import ConfigError
from llm_jax.base.sharding import MeshConfig, batch_sharding, make_mesh, use_mesh
from llm_jax.extras.plan.collectives import read_collectives
from llm_jax.layers.attention import AttentionMask, Layer
from llm_jax.layers.pipeline import describe_pipeline, microbatches, num_ticks
from llm_jax.layers.stack import apply_stack
from llm_jax.models.decoder_config import DecoderConfig
from llm_jax.models.registry import make_model
from llm_jax.optim.chain import OptimConfig, make_optimizer
from llm_jax.training.shardings import abstract_params, boxed_params
from llm_jax.training.state import eval_step

CFG = DecoderConfig(vocab_size=64, max_len=16, num_layers=4, embed_dim=32, num_heads=4, num_kv_heads=2, dtype='float32',
                    positions='rope', norm='rms_norm', mlp='swiglu')
TX = make_optimizer(build(OptimConfig, {'learning_rate': 1.0, 'chain': ('sgd',)}), 20)  # so that updates are gradients


def features(n, num_rows=16):
  """Batch n: two documents in each row, with positions of their own, a prefix and padding."""
  rng = np.random.default_rng(n)
  tokens = rng.integers(0, 64, (num_rows, 17), np.int32)
  segments = 1 + (np.arange(16)[None] >= rng.integers(4, 10, (num_rows, 1))).astype(np.int32)
  positions = np.where(segments == 1, np.arange(16), np.arange(16) - np.argmax(segments == 2, axis=1)[:, None])
  mask = np.arange(16)[None] < rng.integers(12, 17, (num_rows, 1))
  return {'tokens': tokens[:, :-1], 'targets': tokens[:, 1:], 'loss_mask': mask.astype(np.float32),
          'segment_ids': (segments * mask).astype(np.int32), 'positions': positions.astype(np.int32),
          'prefix_mask': (positions < 3).astype(np.int32)}


def train(sizes, num_microbatches=1, steps=range(4), state=None, **fields):
  """(metrics of the steps, final state) on a mesh of (data, fsdp, tensor, stage, repeats)."""
  history, state, _ = train_on(sizes[:4], make_model(dataclasses.replace(CFG, **fields)), TX,
                               lambda n: features(steps[0] + n), num_steps=len(steps),
                               num_microbatches=num_microbatches, state=state,
                               mesh_fields={'repeats': sizes[4]} if sizes[4:] else None)
  return history, jax.device_get(state)


def assert_equal_runs(got, expected):
  for a, b in zip(got[0], expected[0], strict=True):
    for name in ('loss', 'grad_norm'):
      assert a[name] == pytest.approx(b[name], abs=1e-5), name
  jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-5), got[1].params, expected[1].params)


# Fields of the model, (data, fsdp, tensor, stage, repeats), microbatches.
CASES = [
    ({'windows': (0, 3), 'prefix_attention': True}, (2, 1, 2, 2), 1),
    ({}, (1, 1, 1, 2), 1), ({}, (1, 1, 1, 2), 8), ({}, (1, 1, 1, 4), 4), ({}, (4, 1, 1, 2), 2), ({}, (2, 1, 1, 4), 1),
    ({}, (1, 4, 1, 2), 2), ({}, (1, 2, 1, 4), 2), ({'num_kv_heads': 4}, (1, 1, 4, 2), 2), ({}, (1, 1, 2, 4), 1),
    ({}, (2, 2, 1, 2), 2), ({}, (1, 2, 2, 2), 2), ({'remat': 'full'}, (2, 2, 1, 2), 1),
    ({'remat': 'save_matmuls', 'windows': (0, 3)}, (1, 2, 2, 2), 1),
    ({'scan_unroll': 2, 'remat': 'save_attention'}, (2, 1, 1, 4), 2),
    ({'remat': 'full'}, (1, 2, 2, 2, 2), 2), ({'remat': 'save_attention', 'num_layers': 8}, (2, 1, 1, 4, 2), 2),
    ({'remat': 'save_matmuls', 'num_layers': 8}, (1, 1, 1, 2, 4), 4),
    ({'remat': 'full', 'num_layers': 8, 'windows': (0, 3)}, (2, 2, 1, 2, 2), 1),
    ({'tie_embeddings': False, 'positions': 'learned', 'use_bias': True, 'norm': 'layer_norm'}, (2, 1, 2, 2), 2),
]


@pytest.mark.slow
@pytest.mark.parametrize('fields, sizes, num_microbatches', CASES, ids=str)
def test_a_mesh_with_stages_equals_one_device(fields, sizes, num_microbatches):
  assert_equal_runs(train(sizes, num_microbatches, **fields), train((1, 1, 1), **fields))


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_stages():
  """Parameters and optimizer state have the layers of the model in order, wherever they are."""
  first, state = train((1, 2, 1, 4), steps=range(2))
  last, state = train((2, 1, 1, 2), 2, steps=range(2, 4), state=state)
  assert_equal_runs((first + last, state), train((1, 1, 1)))


@pytest.mark.slow
def test_evaluation_on_a_mesh_with_stages_equals_one_device():
  model, batch, found = make_model(CFG), Batch(**features(0)), []
  for sizes in ((1, 1, 1), (2, 1, 1, 4)):
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[:int(np.prod(sizes))])
    with jax.set_mesh(mesh):
      shardings = jax.tree.map(lambda x: x.sharding, abstract_params(boxed_params(batch, model=model), mesh))
      params = jax.jit(lambda: nn.unbox(model.init(jax.random.key(0), batch)['params']), out_shardings=shardings)()
      found.append(jax.jit(partial(eval_step, model=model, token_bytes=np.ones(64, np.int32)))(
          params, jax.device_put(batch, batch_sharding(mesh))))
  for name, value in found[0].items():
    np.testing.assert_allclose(found[1][name], value, rtol=1e-6)


class Sower(nn.Module):
  """A block that sows means, and reads a context of numbers [B] and vectors [B, T, D]."""

  @nn.compact
  def __call__(self, x, positions, context, cache, layer, train):
    w = self.param('w', nn.initializers.ones, (1, 1, 8))
    self.sow('losses', 'mean', jnp.mean(x))
    self.sow('metrics', 'rows', jnp.mean(context[0] * positions[:, 0]))
    return x * w + jnp.mean(context[1], axis=1, keepdims=True), cache


@contextlib.contextmanager
def on_mesh(sizes, number, **fields):
  shape = mesh_config(sizes, **fields)
  with use_mesh(make_mesh(shape, jax.devices()[:int(np.prod(shape.sizes))]), shape), microbatches(number):
    yield


def test_context_and_sown_values_pass_through_stages():
  """Arrays of the context stay with their rows and have gradients; values sown are means over microbatches."""
  rng, found = np.random.default_rng(0), []
  x, read = (jnp.asarray(rng.normal(size=(16, 4, 8)), jnp.float32) for _ in range(2))
  positions, params = jnp.tile(jnp.arange(16)[:, None], (1, 4)), {'w': jnp.asarray(rng.normal(1, 0.1, (4, 1, 1, 8)))}

  def loss(params, x, read):
    y, sown = apply_stack(Sower(), params, x, positions, (jnp.arange(16.0), read), layers=(Layer(),))
    return jnp.sum(y**2) + jnp.sum(sown['losses']['mean'][0]), (y, sown)

  for sizes, repeats in (((1, 1, 1), 1), ((2, 1, 1, 4), 1), ((2, 1, 1, 2), 2)):
    with on_mesh(sizes, 2, repeats=repeats):
      found.append(jax.device_get(jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(params, x, read)))
  for other in found[1:]:
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), other, found[0])


class Dropper(nn.Module):
  @nn.compact
  def __call__(self, x, positions, context, cache, layer, train):
    return x + nn.Dropout(0.5, deterministic=not train)(self.param('w', nn.initializers.ones, (1, 1, 8)) + 0 * x), cache


@pytest.mark.parametrize('repeats', [1, 2])
def test_each_layer_and_microbatch_drops_other_values(repeats):
  with on_mesh((1, 1, 1, 2), 4, repeats=repeats):
    y, _ = jax.jit(lambda key: apply_stack(
        Dropper(), {'w': jnp.ones((4, 1, 1, 8))}, jnp.zeros((16, 8, 8)), jnp.zeros((16, 8), jnp.int32), AttentionMask(),
        layers=(Layer(),), dropout_key=key, train=True))(jax.random.key(0))
  assert set(np.unique(y)) == {0, 2, 4, 6, 8}
  assert len(set(map(bytes, np.asarray(y)))) == 16


@pytest.mark.parametrize('fields, sizes, message', [
    ({'num_layers': 3}, (1, 1, 1, 2), '3 layers do not divide over 2 stages'),
    ({'num_layers': 6, 'windows': (0, 3)}, (1, 1, 1, 2), '6 layers of 2 kinds in turn do not divide over 2 stages'),
    ({'num_layers': 6}, (1, 1, 1, 2, 2), 'do not divide over 2 stages x 2 repeats; .* multiple of 4')])
def test_layers_that_stages_cannot_share(fields, sizes, message):
  with pytest.raises(ConfigError, match=message):
    train(sizes, steps=range(1), **fields)


class Layerless(nn.Module):
  cfg = CFG

  @nn.compact
  def __call__(self, tokens):
    return nn.Dense(64)(nn.one_hot(tokens, 64))


def test_a_model_without_layers_has_no_stages():
  mesh = make_mesh(MeshConfig(stage=2), jax.devices())
  boxed = jax.eval_shape(Layerless().init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))['params']
  with pytest.raises(ConfigError, match='no layers that stages can share'):
    abstract_params(boxed, mesh)


def sent_by(repeats, num_microbatches=2, stages=2):
  """(bytes that permutes over stages send, bytes of a microbatch, the other collectives over stages by shape)."""
  model, batch = make_model(dataclasses.replace(CFG, remat='full')), Batch(**features(0))
  shape = MeshConfig(data=2, fsdp=2, stage=stages, repeats=repeats)
  mesh = make_mesh(shape)
  with use_mesh(mesh, shape):
    abstract = abstract_params(boxed_params(batch, model=model), mesh)

    def loss(params, batch):
      with microbatches(num_microbatches):
        return jnp.sum(model.apply({'params': params}, batch)[..., 0] ** 2)

    held = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(mesh)), batch)
    text = jax.jit(jax.grad(loss)).lower(abstract, held).compile().as_text()
  found = [each for each in read_collectives(text, dict(mesh.shape)) if 'stage' in each.axes and each.dtype == 'f32']
  permuted = sum(each.wire_bytes * each.executions for each in found if each.kind == 'collective-permute')
  return permuted, 4 * CFG.embed_dim * 16 * 16 // mesh.size // num_microbatches, [
      each for each in found if each.kind in ('all-gather', 'all-to-all')]


LAYER = CFG.embed_dim * CFG.F  # the elements of the largest matrix


def test_stages_send_activations_alone():
  """Each tick sends a microbatch on, one in and one out; forward, and in reverse. Weights stay in their stage."""
  permuted, microbatch, others = sent_by(repeats=1)
  assert permuted == pytest.approx(6 * num_ticks(2, 1, 2) * microbatch)
  assert not [each for each in others if np.prod(each.shape) >= LAYER / 2]


@pytest.mark.slow
def test_with_repeats_stages_exchange_weights_once():
  _, _, others = sent_by(repeats=2)
  large = [each for each in others if np.prod(each.shape) >= LAYER / 2]
  assert large and {(each.kind, each.executions) for each in large} == {('all-to-all', 1)}


@pytest.mark.parametrize('stages, repeats, number, text', [
    (1, 1, 4, ''), (4, 1, 1, 'pipeline: 4 microbatches through 4 stages, which are idle for 42.9% of their time'),
    (4, 2, 4, 'pipeline: 16 microbatches through 4 stages, 2 times, which are idle for 8.6% of their time')])
def test_the_share_of_time_that_stages_are_idle_is_said(stages, repeats, number, text):
  assert describe_pipeline(stages, repeats, number) == text
