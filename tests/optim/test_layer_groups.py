"""Groups for single layers of a stack: factors, layer-wise decay, frozen layers. A plug-in's link: muP."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from chains import INFO, RATE, by_equation, descend, momentum, optimizer, tree

from llm_jax.base.builder import build
from llm_jax.base.errors import ConfigError
from llm_jax.optim.chain import TRANSFORMS, OptimConfig
from llm_jax.optim.groups import Group, assign
from llm_jax.optim.link import Link

SGD = {'momentum': 0.7, 'weight_decay': 0.3}


def group(pattern, **settings):
  return {'pattern': pattern, **settings}


def rates(groups, name='w', leaf='q'):
  assigned = assign({str(i): Group(**g) for i, g in enumerate(groups)}, INFO)
  return np.broadcast_to(assigned['blocks'][leaf][name].learning_rate, (2, 1, 1, 1)).ravel().tolist()


@pytest.mark.parametrize(('pattern', 'expected'), [
    ('blocks@0', [0.5, 1]), ('blocks@-1', [1, 0.5]), ('blocks@1', [1, 0.5]), ('blocks@:1', [0.5, 1]),
    ('blocks@-1:', [1, 0.5]), ('blocks/.*@0:2', [0.5, 0.5]), ('blocks/q@::2', [0.5, 1]), ('blocks/out@0', [1, 1])])
def test_a_pattern_selects_layers_by_index_and_slice(pattern, expected):
  assert rates([group(pattern, learning_rate=0.5)]) == expected


def test_the_first_matching_group_counts_per_layer():
  assert rates([group('blocks@1', learning_rate=3.0), group('blocks', learning_rate=0.5)]) == [0.5, 3.0]
  assert rates([group('blocks', learning_rate=0.5), group('.', learning_rate=2.0)]) == [0.5, 0.5]


def test_single_layers_have_their_own_rate_and_decay():
  """Each layer changes as in a run whose groups treat the whole stack like this layer."""
  def run(pattern):
    return descend(optimizer('sgd', sgd=SGD, groups={'x': group(pattern, learning_rate=0.1, weight_decay=3.0)}))[0]

  some, all_of, plain = run('blocks@1'), run('blocks'), by_equation(momentum(0.7, False), decay=0.3)
  for name in ('q', 'out'):
    np.testing.assert_allclose(some['blocks'][name]['w'][0], plain['blocks'][name]['w'][0], rtol=1e-6)
    np.testing.assert_allclose(some['blocks'][name]['w'][1], all_of['blocks'][name]['w'][1], rtol=1e-6)
    assert np.abs(some['blocks'][name]['w'][1] - plain['blocks'][name]['w'][1]).min() > 1e-3
  np.testing.assert_allclose(some['embed']['w'], plain['embed']['w'], rtol=1e-6)


def test_layer_decay_lowers_the_rate_towards_the_embedding():
  got, _ = descend(optimizer('sgd', sgd={'momentum': 0.0}, groups={'all': group('.', layer_decay=0.5)}), 1)
  moved = jax.tree.map(lambda new, old, g: (old - new) / (RATE * g), got, tree(0), tree(1))
  for leaf in ('q', 'out'):
    np.testing.assert_allclose(moved['blocks'][leaf]['w'][0], 0.5, rtol=1e-5)
    np.testing.assert_allclose(moved['blocks'][leaf]['w'][1], 1.0, rtol=1e-5)
  np.testing.assert_allclose(moved['embed']['w'], 0.25, rtol=1e-5)


@pytest.mark.parametrize(('name', 'settings', 'controls'), [
    ('adamw', {'weight_decay': 0.3}, []), ('adamw', {}, ['noise_adaptive', 'ema']), ('muon', {}, []),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ('adamw', {}, ['ema']), ('sgd', SGD, []), ('soap', {}, []), ('schedule_free', {}, [])))])
def test_a_frozen_layer_keeps_its_bits_and_affects_no_other(name, settings, controls):
  tx = optimizer(name, controls=controls, groups={'low': group('blocks@0', frozen=True)}, **{name: settings})
  got, state = descend(tx)
  with jax.enable_x64(True):
    evaluated = jax.device_get(jax.jit(tx.evaluated)(state, got))
  for params in (got, evaluated):
    for leaf in jax.tree.leaves(jax.tree.map(lambda new, old: (new[0], old[0]), params['blocks'], tree(0)['blocks']),
                                is_leaf=lambda x: isinstance(x, tuple)):
      np.testing.assert_array_equal(*leaf)
  assert np.abs(got['blocks']['q']['w'][1] - tree(0)['blocks']['q']['w'][1]).min() > 0
  if not controls:  # noise is measured over all trained gradients, and fewer of them are noisier
    free, _ = descend(optimizer(name, **{name: settings}))
    np.testing.assert_allclose(got['blocks']['q']['w'][1], free['blocks']['q']['w'][1], rtol=1e-5)
    np.testing.assert_allclose(got['embed']['w'], free['embed']['w'], rtol=1e-5)


def test_clipping_ignores_gradients_of_frozen_layers():
  def run(**groups):
    return descend(optimizer('sgd', filters=['clip_by_global_norm'], sgd={'momentum': 0.0}, groups=groups), 1)[0]

  got, free = (run(low=group('blocks@0', frozen=True)), run())
  norm = optax.tree.norm(tree(1))
  left = optax.tree.norm({'blocks': jax.tree.map(lambda g: g[1], tree(1)['blocks']), 'embed': tree(1)['embed']})
  move = lambda params: np.asarray(params['embed']['w'] - tree(0)['embed']['w'])  # noqa: E731
  np.testing.assert_allclose(move(got), move(free) * float(norm / left), rtol=1e-5)


def test_a_frozen_stack_has_no_optimizer_state():
  groups = {'all': group('blocks/q@0:2', frozen=True)}
  _, state = descend(optimizer('adamw', groups=groups), 1, groups)
  assert not [path for path, _ in jax.tree_util.tree_leaves_with_path(state) if "'q'" in jax.tree_util.keystr(path)]


@pytest.mark.parametrize(('pattern', 'words'), [
    ('blocks@2', ["groups.x.pattern: 'blocks@2' matches blocks/", '2 layers', '-2 to 1']),
    ('blocks@0:3', ['2 layers', '-2 to 2']), ('blocks@-3:', ['2 layers']), ('blocks@1:1', ['selects none']),
    ('.@0', ['embed/w', 'no layers axis', 'blocks/.*']), ('attn@0', ['matches no parameter', 'blocks/q/w'])])
def test_missing_layers_are_reported(pattern, words):
  with pytest.raises(ConfigError) as e:
    optimizer('adamw', groups={'x': group(pattern, learning_rate=0.5)})
  assert all(word in str(e.value) for word in words), e.value


@pytest.mark.parametrize(('settings', 'words'), [
    ({'pattern': 'blocks@'}, ['@ must be followed by', 'blocks/.*@0:4', "got ''"]),
    ({'pattern': 'blocks@a'}, ["got 'a'"]),
    ({'pattern': 'blocks@0:4:0'}, ["got '0:4:0'"]), ({'pattern': '@0'}, ['pattern must be set']),
    ({'pattern': '(@0'}, ["'('", 'regular expression']),
    ({'pattern': '.', 'layer_decay': 0.0}, ['layer_decay', '(0, 1]'])])
def test_invalid_patterns_are_reported(settings, words):
  with pytest.raises(ConfigError) as e:
    build(OptimConfig, {'groups': {'x': settings}})
  assert all(word in str(e.value) for word in words), e.value


def test_layer_decay_excludes_schedule_free():
  with pytest.raises(ConfigError, match='the factors of groups'):
    optimizer('schedule_free', groups={'x': group('.', layer_decay=0.5)})


# A plug-in's link has what it needs in `info`.


@dataclasses.dataclass(frozen=True)
class MuP(Link):
  """Divides the updates of hidden matrices by their fan-in (arXiv 2203.03466, table 8)."""

  base_fan_in: int = 1
  place = 'control'

  def make(self, schedule, info):
    scale = jax.tree.map(lambda p: self.base_fan_in / p.fan_in if p.is_hidden_matrix else 1.0, info)
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u, s: u * s, updates, scale))


def test_a_plugin_link_can_scale_by_fan_in():
  plain = optimizer('sgd', sgd={'momentum': 0.0})
  links = (*plain.links, MuP())
  tx = optax.chain(*(link.make(plain.schedule, INFO) for link in links))
  updates = jax.jit(lambda grads, params: tx.update(grads, tx.init(params), params)[0])(tree(1), tree(0))
  expected = {'q': 6, 'out': 2 * 4}
  for leaf, fan_in in expected.items():
    np.testing.assert_allclose(updates['blocks'][leaf]['w'], -RATE * tree(1)['blocks'][leaf]['w'] / fan_in, rtol=1e-6)
  np.testing.assert_allclose(updates['embed']['w'], -RATE * tree(1)['embed']['w'], rtol=1e-6)
  np.testing.assert_allclose(updates['blocks']['q']['b'], -RATE * tree(1)['blocks']['q']['b'], rtol=1e-6)


@pytest.mark.parametrize('name', TRANSFORMS)
def test_all_links_accept_param_info_of_a_stack(name):
  tx = optax.with_extra_args_support(TRANSFORMS[name]().make(optax.constant_schedule(1e-3), INFO))
  params, grads = (jax.tree.map(lambda x: x.astype(np.float32), tree(seed)) for seed in (0, 1))
  updates = jax.eval_shape(
      lambda params, grads: tx.update(grads, tx.init(params), params, value=1.0, grad=grads)[0], params, grads)
  assert jax.tree.map(lambda x: x.shape, updates) == jax.tree.map(np.shape, params)
