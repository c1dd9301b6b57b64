"""Attention over rows whose length is sharded: by gathered keys, by a ring, and by each kernel."""

import os
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from llm_jax.base.errors import ConfigError
from llm_jax.base.registry import NoSettings, register
from llm_jax.base.sharding import MeshConfig, make_mesh, use_mesh
from llm_jax.layers import context, kernels, tiles
from llm_jax.layers.attention import causal_attention
from llm_jax.layers.kernels import AttentionCase, choose_attention


@pytest.fixture(autouse=True)
def several_tiles(monkeypatch):
  monkeypatch.setattr(context, 'TILE', 4)


def inputs(T=48, B=2, N=4, K=2, H=8, documents=True):
  seed = int.from_bytes(os.urandom(2), 'big')
  print('seed', seed)
  rng = np.random.default_rng(seed)
  def normal(*shape):
    return rng.standard_normal(shape).astype(np.float32)
  segments = np.cumsum(rng.random((B, T)) < 0.1, axis=1).astype(np.int32) if documents else None
  return (normal(B, T, N, H), normal(B, T, K, H), normal(B, T, K, H), normal(N)), segments, normal(B, T, N, H)


def with_gradients(arrays, segments, dy, implementation, sinks=False, prefix=None, **options):
  """(y, gradients of q, k, v and sinks)."""
  def f(q, k, v, sinks_N):
    scores = options | ({'sinks_N': sinks_N} if sinks else {})
    y = causal_attention(q, k, v, segment_ids_BT=segments, prefix_BT=prefix, implementation=implementation, **scores)
    return (y * dy).sum(), y

  (_, y), grads = jax.jit(jax.value_and_grad(f, (0, 1, 2, 3), has_aux=True))(*arrays)
  return [np.asarray(x) for x in (y, *grads)]


def on_mesh(sizes, by, *args, **options):
  config = MeshConfig(**{'data': 1, **sizes}, context_attention=by)
  with use_mesh(make_mesh(config, jax.devices()[:int(np.prod(list(sizes.values())))]), config):
    return with_gradients(*args, **options)


def check(found, expected, tolerance=1e-5):
  for x, wanted in zip(found, expected, strict=True):
    np.testing.assert_allclose(x, wanted, atol=tolerance * max(1, np.abs(wanted).max()))


@pytest.mark.parametrize('options', [{}, {'window': 7}, {'soft_cap': 2.0}, {'sinks': True}],
                         ids=['plain', 'window', 'soft cap', 'sinks'])
@pytest.mark.parametrize('by', ['all_gather', 'ring'])
@pytest.mark.parametrize('sizes', [{'context': 3}, {'data': 2, 'context': 2, 'tensor': 2}],
                         ids=['context 3', 'data, context, tensor'])
def test_equals_attention_on_one_device_with_documents_and_grouped_heads(sizes, by, options):
  args = inputs()
  check(on_mesh(sizes, by, *args, 'blocked', **options), with_gradients(*args, 'xla', **options))


@pytest.mark.parametrize('prefix', [False, True])
def test_equals_attention_on_one_device_with_a_mask(prefix):
  arrays, segments, dy = inputs()
  flags = np.broadcast_to(np.arange(48) % 12 < 5, segments.shape) if prefix else None
  check(on_mesh({'context': 4}, 'all_gather', arrays, segments, dy, 'xla', prefix=flags),
        with_gradients(arrays, segments, dy, 'xla', prefix=flags))


@pytest.mark.parametrize('window', [0, 130])
def test_splash_equals_attention_on_one_device(window, monkeypatch):
  """In Pallas' interpreter, as there is no TPU here."""
  monkeypatch.setattr(context, 'splash_kernel', partial(kernels.splash_kernel, interpret=True))
  monkeypatch.setattr(kernels, 'why_not', lambda name, case: '')
  args = inputs(T=512, B=1, N=2, K=1, H=128)
  check(on_mesh({'context': 2}, 'all_gather', *args, 'splash', window=window),
        with_gradients(*args, 'xla', window=window), tolerance=1e-4)


def test_splash_inside_a_region_that_splits_another_axis_by_hand(monkeypatch):
  """As training does with replicas, and a pipeline with stages."""
  monkeypatch.setattr(context, 'splash_kernel', partial(kernels.splash_kernel, interpret=True))
  monkeypatch.setattr(kernels, 'why_not', lambda name, case: '')
  arrays, segments, _ = inputs(T=512, N=2, K=1, H=128)
  config = MeshConfig(data=2, context=2)

  def attend(q, k, v, segments):
    return causal_attention(q, k, v, segment_ids_BT=segments, implementation='splash')

  with use_mesh(make_mesh(config, jax.devices()[:4]), config):
    found = jax.jit(jax.shard_map(attend, in_specs=(P('data'),) * 4, out_specs=P('data'), axis_names={'data'},
                                  check_vma=False))(*arrays[:3], segments)
  expected = causal_attention(*arrays[:3], segment_ids_BT=segments, implementation='xla')
  check([found], [expected], tolerance=1e-4)


@pytest.mark.parametrize('num_devices', range(1, 9))
def test_each_query_visits_each_key_before_it_once_and_devices_have_equal_work(num_devices):
  """By gathered keys, and by a ring, counted in blocks."""
  M = 3
  last = 2 * num_devices * M - 1
  totals = set()
  for device in range(num_devices):
    rank = min(2 * device, 2 * num_devices - 1 - 2 * device)
    def blocks_of(rank):
      return [*range(rank * M, rank * M + M), *range(last + 1 - rank * M - M, last + 1 - rank * M)]

    def visits(route, keys, own, m):
      steps = range(int(route.num_tiles(m)))
      pairs = [tuple(int(x) for x in route.visit(jnp.int32(m), jnp.int32(s))) for s in steps]
      return [((own[m], own[2 * M - 1 - m])[i], keys[j]) for i, j in pairs]

    own = blocks_of(rank)
    gathered = [v for m in range(M) for v in visits(context.visit_all(rank, M, last + 1), range(last + 1), own, m)]
    ring = [v for m in range(M) for v in visits(context.visit_all(0, M, 2 * M), own, own, m)]
    for i in range(1, num_devices):
      other = (device - i) % num_devices
      other_rank = min(2 * other, 2 * num_devices - 1 - 2 * other)
      route = context.visit_share(rank, jnp.int32(other_rank), M)
      shared = [v for m in range(M) for v in visits(route, blocks_of(other_rank), own, m)]
      assert len(shared) == 2 * M * M  # the same at each step of the ring
      ring += shared
    needed = sorted((q, k) for q in own for k in range(q + 1))
    assert sorted(gathered) == needed
    assert sorted(ring) == needed
    totals.add(len(gathered))
  assert len(totals) == 1


def test_a_window_visits_only_the_blocks_that_it_reaches():
  route = context.visit_all(jnp.int32(1), 3, 12, reach=2)
  assert [int(route.num_tiles(m)) for m in range(3)] == [4, 4, 4]
  visits = [tuple(map(int, route.visit(jnp.int32(2), jnp.int32(s)))) for s in range(4)]
  assert visits == [(0, 5), (0, 4), (1, 6), (1, 5)]


def test_a_ring_passes_keys_on_and_gathers_none():
  arrays = inputs()[0]
  config = MeshConfig(data=1, context=4, context_attention='ring')
  with use_mesh(make_mesh(config, jax.devices()[:4]), config):
    text = jax.jit(lambda q, k, v: causal_attention(q, k, v, implementation='blocked')).lower(
        *arrays[:3]).compile().as_text()
  assert 'all-gather' not in text
  assert 'collective-permute' in text


CPU = AttentionCase('cpu', (0, 0), 'bfloat16', 128, 1024, context=4)
GPU, TPU = (AttentionCase(*p, 'bfloat16', 128, 1024, context=4) for p in (('gpu', (9, 0)), ('tpu', (0, 0))))


@pytest.mark.parametrize(('case', 'chosen'), [(CPU, 'blocked'), (GPU, 'cudnn'), (TPU, 'splash')])
def test_auto_chooses_a_kernel_for_each_platform(case, chosen):
  assert choose_attention('auto', case) == chosen


def test_auto_avoids_what_a_sharded_length_does_not_support():
  assert choose_attention('auto', replace(CPU, prefix=True)) == 'xla'
  assert choose_attention('auto', replace(GPU, length=2**18)) == 'blocked'  # a mask of 24 GiB for each row
  assert choose_attention('auto', replace(TPU, length=256)) == 'blocked'  # 64 tokens on a device
  for case in (GPU, TPU):
    assert choose_attention('auto', replace(case, ring=True)) == 'blocked'
  with pytest.raises(ConfigError, match=r'mesh\.context_attention=ring needs blocked; .*set one of auto, blocked'):
    choose_attention('splash', replace(TPU, ring=True))


def test_a_ring_supports_no_prefix():
  with pytest.raises(ConfigError, match=r'none can be used here: blocked: with mesh\.context it does not'):
    choose_attention('auto', replace(CPU, ring=True, prefix=True))
  with pytest.raises(ConfigError, match=r'mesh\.context_attention=ring needs blocked; set one'):
    choose_attention('xla', replace(CPU, ring=True))


def test_attention_of_a_plugin_attends_to_whole_rows(monkeypatch):
  monkeypatch.setattr(kernels.ATTENTION, '_entries', dict(kernels.ATTENTION._entries))  # for this test alone
  register(kernels.ATTENTION, 'own', partial(kernels.xla), NoSettings)
  args = inputs()
  check(on_mesh({'fsdp': 2, 'context': 4}, 'all_gather', *args, 'own'), with_gradients(*args, 'xla'))


def test_sums_of_no_keys_leave_no_trace():
  """A tile whose keys are all masked, first of all, must not count."""
  rng = np.random.default_rng(0)
  q, k, v = (rng.standard_normal((1, 2, 1, 1, 1, 4, 8)).astype(np.float32) for _ in range(3))
  queries = tiles.Queries(jnp.asarray(q), jnp.array([[4, 8]]), None)
  keys = tiles.Keys(jnp.asarray(k[0, :, 0]), jnp.asarray(v[0, :, 0]), jnp.array([100, 0]), None)
  route = tiles.Route(lambda m, s: (s // 2, s % 2), lambda m: 4)
  sums = tiles.add_tiles(tiles.no_sums(queries, None), queries, keys, route, tiles.Scoring())
  y, _ = tiles.finish(sums)
  scores = np.einsum('iBKGCH,BKSH->iBKGCS', q[0], k[0, 1, 0])
  p = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
  np.testing.assert_allclose(y[0], np.einsum('iBKGCS,BKSH->iBKGCH', p, v[0, 1, 0]), rtol=1e-5)
