"""A stack equals its blocks in sequence; remat policies change memory and work, not the result."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from llm_jax.layers.attention import AttentionMask, Layer
from llm_jax.layers.kernels import cudnn
from llm_jax.layers.stack import REMAT, apply_stack, init_stack
from llm_jax.models.decoder import Block
from llm_jax.models.decoder_config import DecoderConfig

CFG = DecoderConfig(vocab_size=1, num_layers=4, embed_dim=32, num_heads=4, dtype='float32')
POSITIONS = jnp.tile(jnp.arange(64), (2, 1))


@functools.cache
def stack():
  """Random parameters, without the symmetry of the initialization, and x [2, 64, 32]."""
  rng = np.random.default_rng(0)
  shapes = nn.unbox(jax.eval_shape(init_stack(Block(CFG), CFG.num_layers, CFG.embed_dim), jax.random.key(0)))
  params = jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.3, s.shape), jnp.float32), shapes)
  return params, jnp.asarray(rng.normal(size=(2, 64, CFG.embed_dim)), jnp.float32)


@functools.cache
def gradient(remat, unroll=1, windows=(0,), attention='auto'):
  """The traced value_and_grad of a stack's sum of squares."""
  def loss(params, x):
    block = Block(dataclasses.replace(CFG, attention=attention))
    y, _ = apply_stack(block, params, x, POSITIONS, AttentionMask(), layers=tuple(map(Layer, windows)), unroll=unroll,
                       remat=remat)
    return jnp.mean(y**2)
  return jax.jit(jax.value_and_grad(loss)).trace(*stack())


@functools.cache
def compiled(remat):
  return gradient(remat).lower().compile()


def num_products(remat):
  return gradient(remat).lower().as_text().count('stablehlo.dot_general')


@functools.cache
def compiled_block(window):
  """(params, x) -> x"""
  return jax.jit(lambda params, x: Block(CFG).apply(
      {'params': params}, x, POSITIONS, AttentionMask(), None, Layer(window), False)[0])


@pytest.mark.parametrize(('unroll', 'remat'), [(1, 'none'), (2, 'save_matmuls'), (4, 'full')])
def test_the_stack_equals_its_blocks_in_sequence(unroll, remat):
  """With two alternating windows, so that each iteration of the loop runs two blocks."""
  params, x = stack()
  got, _ = jax.jit(lambda params, x: apply_stack(
      Block(CFG), params, x, POSITIONS, AttentionMask(), layers=(Layer(0), Layer(3)), unroll=unroll,
      remat=remat))(params, x)
  for layer in range(4):
    x = compiled_block((0, 3)[layer % 2])(jax.tree.map(lambda p: np.asarray(p)[layer], params), x)  # noqa: B023
  np.testing.assert_allclose(got, x, rtol=1e-4, atol=1e-4)


def test_layers_have_different_initial_values():
  cfg = dataclasses.replace(CFG, num_layers=2)
  up = nn.unbox(jax.jit(init_stack(Block(cfg), 2, 32))(jax.random.key(0)))['mlp']['up']['w']
  assert not np.allclose(up[0], up[1])


@pytest.mark.parametrize('remat', [name for name in REMAT if name != 'none'])
def test_remat_changes_neither_loss_nor_gradients(remat):
  for got, expected in zip(jax.tree.leaves(compiled(remat)(*stack())), jax.tree.leaves(compiled('none')(*stack())),
                           strict=True):
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * float(jnp.abs(expected).max()))


def test_saving_less_recomputes_more():
  """Also inside the custom gradients of matrices and attention, which JAX's own policies do not see."""
  ladder = ('none', 'save_matmuls', 'save_attention', 'full')
  memory = [compiled(remat).memory_analysis().temp_size_in_bytes for remat in ladder]
  assert memory[0] > memory[1] > memory[2] > memory[3]
  products = [num_products(remat) for remat in ladder]
  assert products[0] == products[1]  # every product's output is there
  assert products[2] == products[1] + 5  # q, k, v and o, and the way up to the feed-forward layer's middle
  assert products[3] == products[2] + 2  # attention's two


@pytest.mark.parametrize('platform', ['cuda', 'tpu'])
def test_offloaded_values_are_in_host_memory(platform):
  def in_host_memory(remat):
    return gradient(remat).lower(lowering_platforms=(platform,)).as_text().count('pinned_host')
  assert in_host_memory('offload') == 3  # the block's input, attention's output and its normaliser
  assert in_host_memory('save_attention') == 0


def test_blocks_of_one_iteration_are_recomputed_in_sequence():
  """Otherwise the compiler would recompute all of them at once and use as much memory as without remat."""
  full = functools.partial(gradient, 'full', attention='xla')  # which has no barriers of its own
  assert 'optimization_barrier' not in full().lower().as_text()  # alone in its turn: the loop is enough
  for shared in (full(unroll=2), full(windows=(0, 3))):
    assert 'optimization_barrier' in shared.lower().as_text()


@pytest.mark.parametrize('remat', ['none', 'full'])
def test_no_weights_are_saved_for_the_backward_pass(remat):
  """With large weights and few tokens, hardly any memory is held between the two passes."""
  cfg = dataclasses.replace(CFG, embed_dim=64)
  params = nn.unbox(jax.eval_shape(init_stack(Block(cfg), 4, 64), jax.random.key(0)))

  def loss(params, x):
    y, _ = apply_stack(Block(cfg), params, x, POSITIONS[:1, :1], AttentionMask(), layers=(Layer(),), remat=remat)
    return jnp.sum(y)

  memory = jax.jit(jax.grad(loss)).lower(params, jax.ShapeDtypeStruct((1, 1, 64), jnp.float32)).compile()
  size = sum(4 * leaf.size for leaf in jax.tree.leaves(params))
  assert memory.memory_analysis().temp_size_in_bytes < size / 2


def test_saved_cudnn_attention_is_not_recomputed(monkeypatch):
  """The kernel is one primitive without named outputs; the test lowers it for a GPU."""
  monkeypatch.setattr(fused_attention_stablehlo, 'check_cudnn_version', lambda: 91400)
  q = jnp.zeros((2, 64, 4, 64), jnp.bfloat16)

  def num_forward(remat):
    attend = REMAT[remat](lambda q: jnp.sum(cudnn(jnp.sin(q), q, q, 0, None, None) ** 2), prevent_cse=False)
    text = jax.jit(jax.value_and_grad(attend)).trace(q).lower(lowering_platforms=('cuda',)).as_text()
    return text.count('__cudnn$fmhaSoftmax(')

  assert [num_forward(remat) for remat in ('none', 'save_attention', 'offload', 'full')] == [1, 1, 1, 2]
