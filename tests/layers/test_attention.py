"""All implementations of attention against a float64 reference, and the choice among them."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from llm_jax.base.errors import ConfigError
from llm_jax.base.sharding import MeshConfig, make_mesh
from llm_jax.layers import blocked
from llm_jax.layers.attention import causal_attention
from llm_jax.layers.cache import cached_attention
from llm_jax.layers.kernels import ATTENTION, AttentionCase, choose_attention, describe_attention

SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 3, 3], [1, 1, 1, 1, 1, 1, 0, 0, 0]])
PREFIX = np.array([[1, 1, 0, 1, 0, 0, 0, 1, 1], [1, 1, 1, 1, 0, 0, 0, 0, 0]], bool)


def normal(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def qkv(B, T, N, K, H):
  return normal(0, B, T, N, H), normal(1, B, T, K, H), normal(2, B, T, K, H)


def reference(q, k, v, dy, window=0, segment_ids=None, prefix=None):
  """y, dq, dk, dv in float64 for the gradient dy of y, from the full matrix of weights."""
  (_, T, N, H), K = q.shape, k.shape[2]
  q, k, v, dy = (np.asarray(x, np.float64).swapaxes(1, 2) for x in (q, k, v, dy))
  k, v = (x.repeat(N // K, 1) for x in (k, v))
  back = np.arange(T)[:, None] - np.arange(T)
  seen = np.broadcast_to((back >= 0) & (back < (window or T)), (len(q), T, T))
  seen = seen if prefix is None else seen | prefix[:, None, :]
  seen = seen if segment_ids is None else seen & (segment_ids[:, :, None] == segment_ids[:, None, :])
  e = np.exp(q @ k.swapaxes(2, 3) / np.sqrt(H)) * seen[:, None]
  p = e / e.sum(-1, keepdims=True)
  dp = dy @ v.swapaxes(2, 3)
  ds = p * (dp - (p * dp).sum(-1, keepdims=True)) / np.sqrt(H)
  shared = [x.reshape(len(q), K, N // K, T, H).sum(2) for x in (ds.swapaxes(2, 3) @ q, p.swapaxes(2, 3) @ dy)]
  return [x.swapaxes(1, 2) for x in (p @ v, ds @ k, *shared)]


def with_options(q, k, v, soft_cap, sinks, window):
  """y in float64 with capped scores and sinks, by the equations."""
  T, H = q.shape[1], q.shape[3]
  k, v = (x.repeat(q.shape[2] // x.shape[2], 2) for x in (k, v))
  scores = jnp.einsum('BTNH,BSNH->BNTS', q, k) / H ** 0.5
  if soft_cap is not None:
    scores = soft_cap * jnp.tanh(scores / soft_cap)
  back = jnp.arange(T)[:, None] - jnp.arange(T)[None]
  e = jnp.exp(scores) * ((back >= 0) & (back < (window or T)))[None, None]
  z = e.sum(-1, keepdims=True) + (0 if sinks is None else jnp.exp(sinks)[None, :, None, None])
  return jnp.einsum('BNTS,BSNH->BTNH', e / z, v)


@pytest.mark.parametrize('name', ['xla', 'blocked'])
@pytest.mark.parametrize(('soft_cap', 'sinks', 'window'), [(2.0, False, 0), (None, True, 3), (2.0, True, 0)])
def test_soft_caps_and_sinks_match_the_equations(name, soft_cap, sinks, window, monkeypatch):
  monkeypatch.setattr(blocked, 'BLOCKS', {True: 4, False: 4})
  q, k, v = qkv(2, 9, 4, 2, 6)
  sinks_N = normal(4, 4) if sinks else None

  def loss(attend, q, k, v, sinks_N):
    return jnp.sum(attend(q, k, v, sinks_N) * normal(3, 2, 9, 4, 6))

  def kernel(q, k, v, sinks_N):
    options = {name: x for name, x in (('soft_cap', soft_cap), ('sinks_N', sinks_N)) if x is not None}
    return ATTENTION[name](q, k, v, window, None, None, **options)

  def equations(q, k, v, sinks_N):
    return with_options(q, k, v, soft_cap, sinks_N, window)

  arguments = (0, 1, 2, 3) if sinks else (0, 1, 2)
  got, wanted = (jax.jit(jax.value_and_grad(partial(loss, attend), argnums=arguments))(q, k, v, sinks_N)
                 for attend in (kernel, equations))
  check([got[0], *got[1]], [wanted[0], *wanted[1]], tolerance=1e-4)
  slots = cached_attention(q[:, 5:6], k.swapaxes(1, 2), v.swapaxes(1, 2), positions_BT=jnp.array([[5], [5]]),
                           window=window, **{name: x for name, x in (
                               ('soft_cap', soft_cap), ('sinks_N', sinks_N)) if x is not None})
  np.testing.assert_allclose(slots[:, 0], equations(q, k, v, sinks_N)[:, 5], rtol=1e-4, atol=1e-5)


def test_a_kernel_without_an_option_is_not_chosen():
  case = AttentionCase('gpu', (9, 0), 'bfloat16', 64, 128, scores=('soft_cap',))
  assert choose_attention('auto', case) == 'blocked'
  with pytest.raises(ConfigError, match='attention_soft_cap'):
    choose_attention('cudnn', case)
  assert choose_attention('auto', dataclasses.replace(case, platform='tpu', capability=(0, 0))) == 'splash'


def value_and_grads(attend, q, k, v, dy):
  y, vjp = jax.vjp(attend, q, k, v)
  return [y, *vjp(dy.astype(y.dtype))]


def check(got, expected, tolerance=1e-5):
  for x, y in zip(got, expected, strict=True):
    np.testing.assert_allclose(np.asarray(x, np.float64), y, rtol=tolerance, atol=tolerance * np.abs(y).max())


CASES = [  # heads, kv heads, window, segments, prefix
    (2, 2, 0, None, None), (4, 2, 3, SEGMENTS, None), (4, 1, 0, None, PREFIX), (2, 1, 1, SEGMENTS, PREFIX)]


@pytest.mark.parametrize(('name', 'kept'), [('xla', 0), ('blocked', 0), ('blocked', 9)])
def test_attention_and_gradient_match_the_equations(name, kept, monkeypatch):
  """Nine tokens in blocks of four: the last block is short, and windows mask whole blocks; weights saved or not."""
  monkeypatch.setattr(blocked, 'BLOCKS', {True: 4, False: 4})
  monkeypatch.setattr(blocked, 'KEPT_BYTES', kept * 4)
  inputs = [(*qkv(2, 9, N, K, 6), normal(3, 2, 9, N, 6)) for N, K, *_ in CASES]

  @jax.jit
  def run(inputs):
    return [value_and_grads(lambda q, k, v: ATTENTION[name](q, k, v, *masks), *arrays)  # noqa: B023
            for arrays, (_, _, *masks) in zip(inputs, CASES, strict=True)]

  for got, arrays, (_, _, *masks) in zip(run(inputs), inputs, CASES, strict=True):
    check(got, reference(*arrays, *masks))


@pytest.mark.parametrize('kept', [True, False])
@pytest.mark.parametrize(('T', 'N', 'K', 'H'), [
    (4, 4, 4, 8), (6, 4, 2, 8), (9, 4, 4, 8), (9, 6, 2, 8), (3, 4, 4, 8), (64, 4, 4, 32), (63, 2, 2, 64)])
def test_bfloat16_attention_is_within_rounding(T, N, K, H, kept, monkeypatch):
  """One block or several, with even and odd numbers of rows, which XLA computes with different kernels."""
  monkeypatch.setattr(blocked, 'BLOCKS', {True: 64 if T > 60 else 4})
  monkeypatch.setattr(blocked, 'KEPT_BYTES', 1024 * kept)
  arrays = [jnp.asarray(x, jnp.bfloat16) for x in (*qkv(2, T, N, K, H), normal(3, 2, T, N, H))]
  got = jax.jit(partial(value_and_grads, partial(causal_attention, implementation='blocked')))(*arrays)
  assert all(x.dtype == jnp.bfloat16 for x in got)
  check(got, reference(*arrays), tolerance=2e-2)


def test_a_long_row_has_few_blocks(monkeypatch):
  """Each query is in one block, and each block has at least the keys up to its end."""
  monkeypatch.setattr(blocked, 'BLOCKS', {True: 4, False: 4})
  for T, window in ((1, 0), (4, 0), (9, 3), (1000, 0), (1001, 7)):
    blocks = list(blocked._blocks(T, window, None))
    assert len(blocks) <= blocked.MAX_BLOCKS
    assert [t for queries, _ in blocks for t in range(T)[queries]] == list(range(T))
    for queries, keys in blocks:
      assert keys.stop == queries.stop
      assert keys.start == (max(0, queries.start - window + 1) if window else 0)


def test_all_kernels_agree_on_a_mesh():
  """Rows over data and fsdp, heads over tensor; splash interpreted, at its smallest length."""
  q, k, v = qkv(4, 128, 4, 2, 8)
  dy, segment_ids = normal(3, 4, 128, 4, 8), np.arange(4 * 128).reshape(4, 128) // 50
  expected = reference(q, k, v, dy, 40, segment_ids)
  ways = {'splash': partial(ATTENTION['splash'], interpret=True), 'blocked': ATTENTION['blocked']}

  @jax.jit
  def run(*arrays):
    return {name: value_and_grads(lambda q, k, v: attend(q, k, v, 40, segment_ids, None), *arrays)  # noqa: B023
            for name, attend in ways.items()}

  mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  with jax.set_mesh(mesh):
    rows_and_heads = jax.sharding.NamedSharding(mesh, jax.P(('data', 'fsdp'), None, 'tensor'))
    for got in run(*(jax.device_put(x, rows_and_heads) for x in (q, k, v, dy))).values():
      check(got, expected, tolerance=1e-4)


def lowered(name, platform, B, T, N, K, H, *, window=0, segments=False):
  """StableHLO of the gradient, lowered for a platform that this machine may lack."""
  shapes = [jax.ShapeDtypeStruct((B, T, heads, H), jnp.bfloat16) for heads in (N, K, K)]
  segment_ids = jax.ShapeDtypeStruct((B, T), jnp.int32) if segments else None

  def loss(q, k, v, segment_ids):
    return ATTENTION[name](q, k, v, window, segment_ids, None).astype(jnp.float32).sum()

  return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*shapes, segment_ids).lower(
      lowering_platforms=(platform,)).as_text()


def test_cudnn_needs_no_mask_for_causality_and_window(monkeypatch):
  monkeypatch.setattr(fused_attention_stablehlo, 'check_cudnn_version', lambda: 91400)  # none is here
  text = lowered('cudnn', 'cuda', 2, 46, 4, 2, 64, window=5)
  assert '__cudnn$fmhaSoftmaxBackward' in text
  assert 'CAUSAL' in text
  assert 'sliding_window_length\\22: 5' in text
  assert '46x46' not in text
  assert '46x46' in lowered('cudnn', 'cuda', 2, 46, 4, 2, 64, segments=True)  # the search finds one that is there


@pytest.mark.parametrize('sizes', [(8, 1, 1), (2, 2, 2)])
def test_each_device_runs_cudnn_on_its_own_rows_and_heads(sizes, monkeypatch):
  """The compiler cannot split the kernel, and fails where the mesh axis data has been split before."""
  monkeypatch.setattr(fused_attention_stablehlo, 'check_cudnn_version', lambda: 91400)
  with jax.set_mesh(make_mesh(MeshConfig(*sizes))):
    text = lowered('cudnn', 'cuda', 8, 46, 4, 2, 64)
  rows, heads = 8 // (sizes[0] * sizes[1]), 4 // sizes[2]
  assert '__cudnn$fmhaSoftmaxBackward' in text and 'CustomSPMDPartitioning' not in text
  assert f'tensor<{rows}x46x{heads}x64xbf16>' in text


def test_splash_compiles_to_its_kernel():
  text = lowered('splash', 'tpu', 2, 384, 4, 2, 64, window=200, segments=True)
  assert text.count('tpu_custom_call') >= 3  # forward, dq, dkv
  assert '384x384' not in text


H100 = AttentionCase('gpu', (9, 0), 'bfloat16', head_dim=64, length=1024)
TPU = AttentionCase('tpu', (0, 0), 'bfloat16', head_dim=128, length=1024)


@pytest.mark.parametrize(('case', 'chosen'), [
    (H100, 'cudnn'), (dataclasses.replace(H100, segments=True), 'cudnn'),
    (dataclasses.replace(H100, head_dim=256), 'cudnn'), (dataclasses.replace(H100, dtype='float32'), 'blocked'),
    (dataclasses.replace(H100, capability=(8, 9), head_dim=256), 'blocked'),
    (dataclasses.replace(H100, capability=(7, 5)), 'blocked'), (dataclasses.replace(H100, head_dim=36), 'blocked'),
    (dataclasses.replace(H100, length=1023), 'cudnn'),
    (dataclasses.replace(H100, length=1023, prefix=True), 'blocked'), (TPU, 'splash'),
    (dataclasses.replace(TPU, segments=True), 'splash'), (dataclasses.replace(TPU, prefix=True), 'blocked'),
    (dataclasses.replace(TPU, length=1000), 'blocked'), (dataclasses.replace(H100, platform='cpu'), 'blocked')])
def test_auto_chooses_a_supported_kernel(case, chosen):
  assert choose_attention('auto', case) == chosen
  assert choose_attention('xla', case) == 'xla'


def test_an_unsupported_kernel_reports_alternatives():
  with pytest.raises(ConfigError, match=r"config.model.attention: 'cudnn' .* not float32; set one of auto, xla, block"):
    choose_attention('cudnn', dataclasses.replace(H100, dtype='float32'))
  with pytest.raises(ConfigError, match='it needs a TPU; the length must be a multiple of 128; got 4'):
    causal_attention(*qkv(1, 4, 2, 2, 8), implementation='splash')
  assert describe_attention('auto', 'float32', 64, 8, segments=True, prefix=False) == (
      'blocked (a block of scores at a time, which saves memory)')


@pytest.mark.parametrize('window', [0, 3])
def test_cached_attention_ignores_later_slots(window):
  q, k, v = qkv(1, 8, 4, 2, 6)
  rubbish = np.full((1, 4, 2, 6), 1e9, np.float32)
  k_slots, v_slots = (np.concatenate([x[:, :6], rubbish], 1).swapaxes(1, 2) for x in (k, v))
  got = cached_attention(q[:, 5:6], k_slots, v_slots, positions_BT=jnp.array([[5]]), window=window)
  full = reference(q, k, v, np.zeros_like(q), window)[0]
  np.testing.assert_allclose(got[0, 0], full[0, 5], rtol=1e-4, atol=1e-5)
