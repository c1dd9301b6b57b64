"""Matrices with batch dimensions, such as experts: products, gradients, copies, optimizers."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax.base.params import ParamInfo
from llm_jax.extras.bitnet import BitEinsum, BitNet, PackedEinsum, pack, weight_codes
from llm_jax.extras.lowbit import LowBitEinsum
from llm_jax.extras.soap import Soap
from llm_jax.layers.attention import AttentionMask, Layer
from llm_jax.layers.boxes import info_of
from llm_jax.layers.linear import Einsum, weight
from llm_jax.layers.mlp import MLP, gelu
from llm_jax.layers.product import mixed_einsum
from llm_jax.layers.stack import apply_stack, init_stack, stack_experts
from llm_jax.optim.masks import check_declared, matrix_dims
from llm_jax.optim.matrices import as_matrices, from_matrices
from llm_jax.optim.muon import Muon

NORMAL = nn.initializers.normal(1.0)
EQUATIONS = [('EBCD,EDF->EBCF', (3, 2, 5, 8), (3, 8, 4)), ('EBCNH,ENHD->EBCD', (3, 2, 5, 2, 4), (3, 2, 4, 8)),
             ('BTED,EDF->BTEF', (2, 5, 3, 8), (3, 8, 4)), ('BTED,DEF->BTEF', (2, 5, 3, 8), (8, 3, 4)),
             ('SEBD,SEDF->SEBF', (2, 3, 5, 8), (2, 3, 8, 4))]


def normal(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(('eqn', 'x_shape', 'w_shape'), EQUATIONS)
def test_batched_products_match_einsum_and_gradients(eqn, x_shape, w_shape, dtype):
  """Operands rounded to `dtype` forward and backward, sums in float32."""
  x, w = normal(0, *x_shape), normal(1, *w_shape)
  y, vjp = jax.vjp(jax.jit(lambda x, w: mixed_einsum(eqn, dtype, x, w)), x, w)
  rounded = [a.astype(dtype).astype(jnp.float32) for a in (x, w)]
  expected_y, expected_vjp = jax.vjp(lambda x, w: jnp.einsum(eqn, x, w), *rounded)
  dy = normal(2, *y.shape).astype(dtype).astype(jnp.float32)
  for got, expected in zip((y, *vjp(dy)), (expected_y, *expected_vjp(dy)), strict=True):
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_plain_matrices_keep_the_products_over_one_dimension():
  """Equal to the bit: only batch dimensions bypass the shortcuts for CPU kernels."""
  x, w, dy = normal(0, 2, 5, 2, 4), normal(1, 2, 4, 8), normal(2, 2, 5, 8)
  y, vjp = jax.vjp(lambda x, w: mixed_einsum('BTNH,NHD->BTD', jnp.float32, x, w), x, w)
  _, dw = vjp(dy)
  np.testing.assert_array_equal(y, jnp.einsum('BTN,ND->BTD', x.reshape(2, 5, 8), w.reshape(8, 8)))
  np.testing.assert_array_equal(dw, jnp.einsum('TNH,TD->NHD', x.reshape(-1, 2, 4), dy.reshape(-1, 8)))


@pytest.mark.parametrize(('eqn', 'x_shape', 'w_shape'), EQUATIONS[:3])
@pytest.mark.parametrize('kind', [Einsum, BitEinsum, LowBitEinsum])
def test_expert_matrices_compute_like_single_matrices(kind, eqn, x_shape, w_shape):
  """Including biases and the scales of quantized matrices."""
  sizes = np.array([1.0, 5.0, 0.1], np.float32).reshape(3, *(1,) * (len(w_shape) - 1))
  x, w, b = normal(0, *x_shape), sizes * normal(1, *w_shape), normal(2, 3, w_shape[-1])
  matrix = kind(w_shape, ('experts', *('head_dim',) * (len(w_shape) - 1)), NORMAL, jnp.float32, bias_dims=1)
  got = jax.jit(matrix.apply, static_argnums=1)({'params': {'w': w, 'b': b}}, eqn, x)
  axis = eqn.index('E')
  alone = jax.jit(dataclasses.replace(matrix, shape=w_shape[1:], axes=matrix.axes[1:]).apply, static_argnums=1)
  for e in range(3):
    expected = alone({'params': {'w': w[e], 'b': b[e]}}, eqn.replace('E', ''), np.take(x, e, axis))
    of_expert = np.take(np.asarray(got), e, eqn.split('->')[1].index('E'))
    np.testing.assert_allclose(of_expert, expected, rtol=1e-5, atol=1e-5)


def test_packed_experts_compute_the_same():
  x, w = normal(0, 3, 2, 5, 8), normal(1, 3, 8, 4) * jnp.array([1.0, 5.0, 0.1]).reshape(3, 1, 1)
  kinds = [kind((3, 8, 4), ('experts', 'embed', 'mlp'), NORMAL, jnp.float32, bitnet=BitNet())
           for kind in (BitEinsum, PackedEinsum)]
  codes, scale = jax.vmap(lambda m: weight_codes(m, '1.58'))(w)
  params = {'packed': jax.vmap(pack)(codes), 'scale': scale}
  boxed = jax.eval_shape(lambda x: kinds[1].init(jax.random.key(0), EQUATIONS[0][0], x), x)
  shapes = jax.tree.map(jnp.shape, nn.unbox(boxed))
  assert shapes['params'] == jax.tree.map(jnp.shape, params)
  np.testing.assert_allclose(kinds[1].apply({'params': params}, EQUATIONS[0][0], x),
                             kinds[0].apply({'params': {'w': w}}, EQUATIONS[0][0], x), rtol=1e-5, atol=1e-5)
  with pytest.raises(ValueError, match='batch dimensions first, then inputs'):
    kinds[1].init(jax.random.key(0), 'BTD,FDG->BTFG', normal(0, 1, 1, 8))


# A block of experts in a stack: once with a batch dimension in its matrices, once as a vmapped MLP.


class Experts(nn.Module):
  """Sends every token to all three experts."""

  vmapped: bool = False

  @nn.compact
  def __call__(self, x_BTD, positions_BT, context, cache, layer, train):
    x_EBTD = jnp.broadcast_to(x_BTD, (3, *x_BTD.shape))

    def einsum(**fields):
      return Einsum(**{'initializer': NORMAL, 'dtype': jnp.bfloat16} | fields)

    if self.vmapped:
      mlp = stack_experts(MLP, 3)(8, 16, einsum, NORMAL, activation=gelu, name='mlp')
      return x_BTD + mlp(x_EBTD).sum(0), cache
    up = einsum(shape=(3, 8, 16), axes=('experts', 'embed', 'mlp'), name='up')
    down = einsum(shape=(3, 16, 8), axes=('experts', 'mlp', 'embed'), name='down')
    return x_BTD + down('EBTF,EFD->EBTD', up('EBTD,EDF->EBTF', x_EBTD)).sum(0), cache


def init(vmapped):
  return jax.jit(init_stack(Experts(vmapped), 2, 8))(jax.random.key(0))


@pytest.mark.parametrize('vmapped', [False, True])
def test_experts_read_the_copies_of_their_weights(vmapped):
  """A stack computes the same bits with and without copies, and casts no weight inside the loop."""
  params, x = nn.unbox(init(vmapped)), normal(0, 2, 5, 8)
  block, positions = Experts(vmapped), jnp.zeros((2, 5), jnp.int32)

  def run(params, dtype):
    return apply_stack(block, params, x, positions, AttentionMask(), layers=(Layer(),), dtype=dtype)[0]

  np.testing.assert_array_equal(run(params, jnp.bfloat16), run(params, jnp.float32))
  for dtype, casts in ((jnp.bfloat16, 0), (jnp.float32, 2)):
    [scan] = [e for e in jax.make_jaxpr(lambda p: run(p, dtype))(params).eqns if e.primitive.name == 'scan']  # noqa: B023
    assert str(scan.params['jaxpr']).count('bf16[3,8,16] = convert') + str(
        scan.params['jaxpr']).count('bf16[3,16,8] = convert') == casts


@pytest.mark.parametrize('vmapped', [False, True])
def test_experts_in_a_stack_have_their_param_info(vmapped):
  info = jax.tree.map(info_of, init(vmapped), is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata))
  info = info['mlp'] if vmapped else info
  for name, axes in (('up', ('layers', 'experts', 'embed', 'mlp')), ('down', ('layers', 'experts', 'mlp', 'embed'))):
    p = info[name]['w']
    assert (p.axes, p.batch, p.inputs, p.outputs) == (axes, (0, 1), (2,), (3,))
    assert (p.fan_in, p.fan_out) == ((8, 16) if name == 'up' else (16, 8))


def info_of_einsum(eqn, x_shape, w_shape, axes, **fields):
  matrix = Einsum(w_shape, axes, NORMAL, jnp.float32, **fields)
  stacked = nn.vmap(Einsum, variable_axes={'params': 0}, split_rngs={'params': True}, axis_size=2, in_axes=(None, None),
                    metadata_params={nn.PARTITION_NAME: 'layers'})(**{f.name: getattr(matrix, f.name) for f in
                    dataclasses.fields(matrix) if f.name not in ('parent', 'name')})
  boxed = jax.eval_shape(lambda key, x: stacked.init(key, eqn, x), jax.random.key(0), jnp.zeros(x_shape))['params']
  return jax.tree.map(info_of, boxed, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata))


@pytest.mark.parametrize(('eqn', 'x_shape', 'w_shape', 'axes', 'dims'), [
    ('BTD,DNH->BTNH', (1, 1, 8), (8, 2, 5), ('embed', 'heads', 'head_dim'), ((0,), (1,), (2, 3))),
    ('BTNH,NHD->BTD', (1, 1, 2, 5), (2, 5, 8), ('heads', 'head_dim', 'embed'), ((0,), (1, 2), (3,))),
    ('BTPE,PED->BTD', (1, 1, 2, 5), (2, 5, 8), ('patch', 'byte_embed', 'embed'), ((0,), (1, 2), (3,))),
    ('BTD,FD->BTF', (1, 1, 8), (4, 8), ('mlp', 'embed'), ((0,), (2,), (1,))),
    ('BTF,DF->BTD', (1, 1, 4), (8, 4), ('embed', 'mlp'), ((0,), (2,), (1,))),
    ('BTA,AC->BTC', (1, 1, 4), (4, 4), ('gate', 'gates'), ((0,), (1,), (2,))),
    ('EBD,EDF->EBF', (3, 1, 8), (3, 8, 4), ('experts', 'embed', 'mlp'), ((0, 1), (2,), (3,)))])
def test_fan_in_and_fan_out_come_from_the_equation(eqn, x_shape, w_shape, axes, dims):
  """For any names and order of the axes."""
  info = info_of_einsum(eqn, x_shape, w_shape, axes, bias_dims=1)
  p = info['w']
  assert (p.batch, p.inputs, p.outputs) == dims and p.axes == ('layers', *axes)
  assert matrix_dims(info) == {'w': (p.inputs, p.outputs), 'b': None}
  check_declared(info)  # biases of stacks have two dimensions or more, and declare that none of them is summed over
  x = normal(0, *p.shape)
  np.testing.assert_array_equal(from_matrices(as_matrices(x, matrix_dims(info)['w']), x, matrix_dims(info)['w']), x)


class Adapter(nn.Module):
  """A plug-in's matrix, with or without roles."""

  roles: tuple[str, ...] = ()

  @nn.compact
  def __call__(self, x):
    return x @ weight(self, 'down', NORMAL, (8, 2), ('embed', 'mlp'), self.roles)


def plugin(roles=()):
  boxed = jax.eval_shape(Adapter(roles).init, jax.random.key(0), jnp.zeros((1, 8)))['params']
  return jax.tree.map(info_of, boxed, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata))


@pytest.mark.parametrize('link', [Muon(), Soap()])
def test_muon_and_soap_reject_undeclared_matrices(link):
  rate = optax.constant_schedule(0.1)
  with pytest.raises(ValueError, match=r'(?s)fan-in.*down \(8, 2\) with axes \(embed, mlp\).*roles='):
    link.make(rate, plugin())
  with pytest.raises(ValueError, match=r'kernel \(4, 4\) with axes \(None, None\)'):  # of a plain Flax module
    link.make(rate, {'kernel': info_of(jnp.zeros((4, 4)))})
  link.make(rate, plugin(('in', 'out')))
  link.make(rate, {'scale': ParamInfo(('layers', 'norm'), (2, 8)), 'gain': ParamInfo(('layers', 'mlp'), (2, 8)),
                   'table': ParamInfo(('positions', 'embed'), (4, 8)), 'per_expert': ParamInfo(
                       ('layers', 'experts', 'mlp'), (2, 3, 8))})


@pytest.mark.parametrize('link', [Muon(beta=0.9), Soap(precondition_every=2)])
def test_experts_are_optimized_like_single_matrices(link):
  """Layers and experts, tall and wide, of different scales."""
  shapes = {'up': (2, 3, 8, 16), 'down': (2, 3, 16, 8)}
  roles = ('batch', 'batch', 'in', 'out')
  axes = {'up': ('layers', 'experts', 'embed', 'mlp'), 'down': ('layers', 'experts', 'mlp', 'embed')}
  info = {name: {'w': ParamInfo(axes[name], shapes[name], roles)} for name in shapes}
  scale = np.float32(10) ** np.arange(6, dtype=np.float32).reshape(2, 3, 1, 1)
  grads = [{name: {'w': scale * normal(10 * t + i, *shapes[name])} for i, name in enumerate(shapes)} for t in range(4)]

  def run(info, pick):
    tx = link.make(optax.constant_schedule(0.1), info)
    params = jax.tree.map(jnp.ones_like, pick(grads[0]))
    state = tx.init(params)

    @jax.jit
    def step(params, state, g):
      updates, state = tx.update(g, state, params)
      return optax.apply_updates(params, updates), state

    for g in grads:
      params, state = step(params, state, pick(g))
    return params

  together = run(info, lambda tree: tree)
  for place in ((0, 0), (0, 2), (1, 1)):
    own = jax.tree.map(lambda p: ParamInfo(p.axes[2:], p.shape[2:], p.roles[2:]), info)
    alone = run(own, lambda tree: jax.tree.map(lambda x: x[place], tree))  # noqa: B023
    jax.tree.map(lambda got, expected: np.testing.assert_allclose(got[place], expected, rtol=2e-3, atol=2e-3),  # noqa: B023
                 together, alone)
