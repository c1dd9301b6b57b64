"""Filters and controls around an optimizer, groups of parameters, and invalid chains."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chains import RATE, STEPS, by_equation, close, descend, momentum, optimizer, trainable, tree
from program import ROOT

from llm_jax.api import load_config
from llm_jax.base.builder import build
from llm_jax.base.errors import ConfigError
from llm_jax.base.params import ParamInfo
from llm_jax.optim.chain import TRANSFORMS, OptimConfig


def ema(alpha, lamb):
  def rule(memory, g, t):
    memory['m'] = g if t == 1 else alpha * memory['m'] + (1 - alpha) * g
    return g + (lamb(t) if callable(lamb) else lamb) * memory['m']
  return rule


def moving(window, lamb):
  def rule(memory, g, t):
    memory['last'] = [*memory.get('last', []), g][-window:]
    return g + (lamb * np.mean(memory['last'], 0) if len(memory['last']) == window else 0)
  return rule


@pytest.mark.parametrize(('name', 'settings', 'rule'), [
    ('grokfast_ema', {'alpha': 0.7, 'lamb': 3.0}, ema(0.7, 3.0)),
    ('grokfast_ma', {'window': 3, 'lamb': 4.0}, moving(3, 4.0)),
    ('grokfast_ema', {'alpha': 0.7, 'lamb': 3.0, 'phases': [0.0, 1.0, 0.5], 'until': ['2', '5']},
     ema(0.7, lambda t: 0.0 if t <= 2 else 3.0 if t <= 5 else 1.5)),
])
def test_grokfast_matches_its_equations(name, settings, rule):
  got, _ = descend(optimizer('sgd', filters=[name], sgd={'momentum': 0.0}, **{name: settings}))
  close(got, by_equation(rule))


def test_a_phase_ends_when_its_condition_holds():
  tx = optimizer('sgd', filters=['grokfast_ema'], sgd={'momentum': 0.0}, grokfast_ema={
      'phases': [0.0, 1.0, 2.0], 'until': ['val/accuracy > 0.5', 'val/accuracy > 0.9']})
  state = tx.init({'w': jnp.ones(3)})
  at = lambda state: int(tx.report(state)['grokfast_phase'])  # noqa: E731
  for accuracy, phase in ((0.4, 0), (0.6, 1), (0.3, 1), (0.95, 2), (0.1, 2)):
    state = tx.update_from_eval(state, {'val/accuracy': accuracy})
    assert at(state) == phase
  assert at(tx.update_from_eval(tx.init({'w': jnp.ones(3)}), {'val/accuracy': 1.0})) == 2
  with pytest.raises(ConfigError, match=r'config.optim: val/accuracy is not a result.*val/loss'):
    tx.update_from_eval(tx.init({'w': jnp.ones(3)}), {'val/loss': 1.0})


UNITS = {'q': (1,), 'b': (1, 2), 'out': (1, 2), 'embed': (1,)}  # dimensions of a unit in INFO


def agc(p, g, dims, clipping, eps):
  """Equation 3 of arXiv 2102.06171."""
  norm = lambda x: np.sqrt((x * x).sum(dims, keepdims=True))  # noqa: E731
  return g * np.minimum(1, clipping * np.maximum(norm(p), eps) / norm(g))


def test_adaptive_clipping_matches_its_equation_for_each_unit():
  got, _ = descend(optimizer('sgd', filters=['adaptive_grad_clip'], sgd={'momentum': 0.0},
                             adaptive_grad_clip={'clipping': 0.8, 'eps': 0.9}))

  def one(path, p):
    dims = UNITS.get(path[-1].key) or UNITS[path[-2].key]
    for t in range(1, STEPS + 1):
      g = tree(t)
      for key in path:
        g = g[key.key]
      p = p - RATE * agc(p, g, dims, 0.8, 0.9)
    return p

  close(got, jax.tree_util.tree_map_with_path(one, tree(0)))


def test_adaptive_clipping_of_a_plain_matrix_is_optaxs():
  rng = np.random.default_rng(0)
  p, g = (jnp.asarray(rng.standard_normal((5, 3)), jnp.float32) for _ in range(2))
  info = {'w': ParamInfo(('embed', 'mlp'), (5, 3), ('in', 'out'))}
  ours = TRANSFORMS['adaptive_grad_clip'](clipping=0.1).make(None, info)
  got = jax.jit(lambda g, p: ours.update({'w': g}, ours.init({'w': p}), {'w': p})[0])(g, p)
  theirs = optax.adaptive_grad_clip(0.1)
  np.testing.assert_array_equal(got['w'], jax.jit(lambda g, p: theirs.update(g, theirs.init(p), p)[0])(g, p))
  assert (got['w'] != g).all()


def test_l2_adds_decay_to_the_gradient():
  got, _ = descend(optimizer('sgd', filters=['l2'], sgd={'momentum': 0.7}, l2={'weight_decay': 0.3}))

  def one(path, p):
    m = 0.0
    for t in range(1, STEPS + 1):
      g = tree(t)
      for key in path:
        g = g[key.key]
      m = 0.7 * m + g + (0.3 * p if path[-1].key == 'w' else 0)
      p = p - RATE * m
    return p

  close(got, jax.tree_util.tree_map_with_path(one, tree(0)))


# Learning rates that follow what is seen.


def test_updates_shrink_on_a_plateau():
  tx = optimizer('sgd', controls=['reduce_on_plateau'], sgd={'momentum': 0.0},
                 reduce_on_plateau={'factor': 0.5, 'patience': 2})
  state, params = tx.init({'w': jnp.zeros(3)}), {'w': jnp.zeros(3)}
  sizes, update = [], jax.jit(tx.update)
  for loss in (3.0, 2.0, 2.0, 2.5, 1.0, 1.0, 1.0):
    state = tx.update_from_eval(state, {'val/loss': loss})
    updates, state = update({'w': jnp.ones(3)}, state, params, value=9.0, grad=None)
    sizes.append(float(updates['w'][0]) / -RATE)
  np.testing.assert_allclose(sizes, [1, 1, 1, 0.5, 0.5, 0.5, 0.25], rtol=1e-6)


def test_an_increasing_negative_metric_is_no_plateau():
  tx = optimizer('sgd', controls=['reduce_on_plateau'],
                 reduce_on_plateau={'metric': 'val/r2', 'mode': 'max', 'patience': 1})
  state = tx.init({'w': jnp.zeros(3)})
  for value, scale in ((-3.0, 1.0), (-2.0, 1.0), (-1.0, 1.0), (-1.0, 0.5)):
    state = tx.update_from_eval(state, {'val/r2': value})
    assert tx.report(state)['plateau_scale'] == scale


def test_updates_shrink_on_a_plateau_of_train_loss():
  tx = optimizer('sgd', controls=['reduce_on_plateau'], sgd={'momentum': 0.0},
                 reduce_on_plateau={'metric': 'train/loss', 'factor': 0.1, 'patience': 1, 'accumulation_size': 2})
  state, params = tx.init({'w': jnp.zeros(3)}), {'w': jnp.zeros(3)}
  scales, update = [], jax.jit(tx.update)
  for loss in (3.0, 1.0, 1.5, 1.5, 3.0, 1.0):
    _, state = update({'w': jnp.ones(3)}, state, params, value=loss, grad=None)
    scales.append(float(tx.report(state)['plateau_scale']))
  np.testing.assert_allclose(scales, [1, 1, 1, 1, 1, 0.1], rtol=1e-6)
  jax.tree.map(np.testing.assert_array_equal, tx.update_from_eval(state, {}), state)  # asks for nothing


@pytest.mark.slow
def test_noise_scales_updates_down():
  def scale(gradients):
    tx = optimizer('sgd', controls=['noise_adaptive'], sgd={'momentum': 0.0},
                   noise_adaptive={'decay': 0.9, 'target': 0.5, 'power': 1.0, 'min_scale': 0.01})
    state = tx.init({'w': jnp.zeros(1000)})
    for g in gradients:
      updates, state = tx.update({'w': g}, state, {'w': jnp.zeros(1000)}, value=1.0, grad={'w': g})
      np.testing.assert_allclose(updates['w'], -RATE * float(tx.report(state)['noise_scale']) * g, rtol=1e-5)
    return float(tx.report(state)['noise_scale'])

  rng = np.random.default_rng(0)
  noise = [jnp.asarray(rng.standard_normal(1000)) for _ in range(100)]
  assert scale([jnp.ones(1000)] * 100) == 1.0
  # Of independent gradients the mean's energy is the share (1 - b) / (1 + b) of theirs.
  assert scale(noise) == pytest.approx(0.1 / 1.9 / 0.5, rel=0.2)


# Groups of parameters.


@pytest.mark.parametrize('given', ['100,200', '(100,200)', "('100','200')", (100, 200), ['100', '200']])
def test_phases_end_at_the_given_steps(given):
  settings = {'optim.grokfast_ma.phases': (1, 2, 3), 'optim.grokfast_ma.until': given}
  config = load_config(ROOT / 'configs' / 'grokking.py', **settings)
  assert config.optim.sections['grokfast_ma'].ends == [100, 200]


def test_groups_have_their_own_rate_and_decay():
  groups = {'tables': {'pattern': 'embed', 'learning_rate': 0.1, 'weight_decay': 3.0},
            'outs': {'pattern': r'out/w$', 'frozen': True}, 'biases': {'pattern': '/b$', 'learning_rate': 2.0}}
  for name, settings in (('adamw', {'weight_decay': 0.3}), ('sgd', {'momentum': 0.7, 'weight_decay': 0.3}),
                         ('muon', {}), ('soap', {})):
    tx = optimizer(name, groups=groups, controls=['ema'], **{name: settings})
    got, state = descend(tx, groups=groups)
    np.testing.assert_array_equal(got['blocks']['out']['w'], tree(0)['blocks']['out']['w'])
    assert np.abs(got['blocks']['q']['w'] - tree(0)['blocks']['q']['w']).min() > 0
    with jax.enable_x64(True):
      evaluated = jax.device_get(jax.jit(tx.evaluated)(state, trainable(got, groups)))
    assert np.abs(evaluated['embed']['w'] - got['embed']['w']).max() > 0
    assert not [path for path, _ in jax.tree_util.tree_leaves_with_path(state) if "'out'" in jax.tree_util.keystr(path)]
    if name == 'sgd':
      plain = by_equation(momentum(0.7, False), decay=0.3)
      np.testing.assert_allclose(got['blocks']['q']['w'], plain['blocks']['q']['w'], rtol=1e-5)
      moved = by_equation(lambda memory, g, t: 0.1 * momentum(0.7, False)(memory, g, t), decay=0.1 * 0.9)
      np.testing.assert_allclose(got['embed']['w'], moved['embed']['w'], rtol=1e-5)
      moved = by_equation(lambda memory, g, t: 2 * momentum(0.7, False)(memory, g, t))
      np.testing.assert_allclose(got['blocks']['q']['b'], moved['blocks']['q']['b'], rtol=1e-5)


def test_averaging_keeps_frozen_groups():
  groups = {'outs': {'pattern': r'out/w$', 'frozen': True}}
  tx = optimizer('schedule_free', groups=groups)
  got, state = descend(tx, groups=groups)
  with jax.enable_x64(True):
    evaluated = tx.evaluated(state, trainable(got, groups))
  free, _ = descend(optimizer('schedule_free'))
  np.testing.assert_array_equal(got['blocks']['out']['w'], tree(0)['blocks']['out']['w'])
  assert 'out' not in evaluated['blocks']
  np.testing.assert_allclose(got['embed']['w'], free['embed']['w'], rtol=1e-6)


def test_a_group_without_parameters_is_reported():
  with pytest.raises(ConfigError, match=r"groups\.x\.pattern: 'attn' matches no parameter.*blocks/q/w"):
    optimizer('adamw', groups={'x': {'pattern': 'attn'}})


@pytest.mark.parametrize('name', [name for name, cls in TRANSFORMS.items() if any(
    field.name in ('mu_dtype', 'accumulator_dtype') for field in dataclasses.fields(cls))])
def test_moments_can_be_stored_in_bfloat16(name):
  field = 'accumulator_dtype' if name == 'sgd' else 'mu_dtype'
  momentum = {'momentum': 0.9} if name == 'adafactor' else {}
  def sizes(dtype):
    tx = optimizer(name, **{name: {field: dtype, **momentum}})
    params = jax.tree.map(jnp.float32, tree(0))
    state = jax.eval_shape(tx.init, params)
    _, new = jax.eval_shape(lambda p, s: tx.update(p, s, p, value=1.0, grad=p), params, state)
    assert jax.tree.map(lambda x: x.dtype, new) == jax.tree.map(lambda x: x.dtype, state), 'as a step needs it'
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
  num_params = sum(x.size for x in jax.tree.leaves(tree(0)))
  assert sizes('float32') - sizes('bfloat16') >= 2 * num_params - 200


@pytest.mark.parametrize(('values', 'words'), [
    ({'chain': ['clip_by_global_norm']}, ['one optimizer', 'adamw', 'got clip_by_global_norm']),
    ({'chain': ['adamw', 'lion']}, ['one optimizer']),
    ({'chain': ['adamw', 'grokfast_ema']}, ['filters (', 'grokfast_ema', 'and then controls']),
    ({'chain': ['adamw', 'ema', 'reduce_on_plateau']}, ['ema must be the last link']),
    ({'chain': ['schedule_free', 'ema']}, ['one link that averages weights']),
    ({'chain': ['clip_by_global_norm', 'clip_by_global_norm', 'adamw']}, ['twice']),
    ({'groups': {'x': {'pattern': '('}}}, ["'('", 'regular expression']),
    ({'groups': {'x': {}}}, ['pattern must be set']),
    ({'chain': ['grokfast_ema', 'adamw'], 'grokfast_ema': {'phases': [1.0, 2.0]}}, ['until', '1', 'got 0']),
    ({'chain': ['grokfast_ema', 'adamw'], 'grokfast_ema': {'phases': [1.0, 2.0], 'until': ['soon']}},
     ["'soon' is not a condition", 'val/accuracy > 0.5']),
    ({'chain': ['sgd'], 'sgd': {'nesterov': True, 'momentum': 0.0}}, ['nesterov']),
    ({'chain': ['adamw', 'reduce_on_plateau'], 'reduce_on_plateau': {'factor': 1.0}}, ['factor', '1.0']),
    ({'chain': ['muon'], 'muon': {'scale': 'keller'}}, ['muon.scale', 'moonshot', 'jordan']),
    ({'chain': ['schedule_free']}, ['set schedule=constant']),
    ({'chain': ['schedule_free', 'noise_adaptive'], 'schedule': 'constant'}, ['nothing else may scale']),
    ({'chain': ['prodigy']}, ['learning_rate multiplies the estimate', '0.0006']),
    ({'chain': ['prodigy'], 'learning_rate': 1.0, 'groups': {'x': {'pattern': 'b', 'weight_decay': 0.0}}}, ['groups']),
    ({'chain': ['adam'], 'groups': {'x': {'pattern': 'b', 'weight_decay': 0.0}}}, ['x.weight_decay', 'no effect']),
])
def test_invalid_settings_are_reported(values, words):
  with pytest.raises(ConfigError) as e:
    build(OptimConfig, values)
  assert all(word in str(e.value) for word in words), e.value


def test_muon_without_an_rms_names_the_other_scale():
  with pytest.raises(ValueError, match='set scale to jordan'):
    TRANSFORMS['muon'](consistent_rms=None)
