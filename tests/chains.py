"""A small tree of stacked parameters, chains over it, and plain NumPy descent to compare them with."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llm_jax.base.builder import build
from llm_jax.base.params import ParamInfo
from llm_jax.base.trees import merge, split
from llm_jax.optim.chain import OptimConfig, make_optimizer
from llm_jax.optim.groups import Group, trainable_paths

RATE, STEPS = 0.05, 7
INFO = {'blocks': {'q': {'w': ParamInfo(('layers', 'embed', 'heads', 'head_dim'), (2, 6, 2, 4),
                                        ('batch', 'in', 'out', 'out')),
                         'b': ParamInfo(('layers', 'heads', 'head_dim'), (2, 2, 4), ('batch', 'out', 'out'))},
                   'out': {'w': ParamInfo(('layers', 'heads', 'head_dim', 'embed'), (2, 2, 4, 6),
                                          ('batch', 'in', 'in', 'out'))}},
        'embed': {'w': ParamInfo(('vocab', 'embed'), (5, 6), ('row', 'out'))}}


def tree(seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda info: rng.standard_normal(info.shape), INFO)


def optimizer(name, filters=(), controls=(), groups=None, learning_rate=RATE, **settings):
  return make_optimizer(build(OptimConfig, {
      'learning_rate': learning_rate, 'schedule': 'constant', 'chain': [*filters, name, *controls],
      'groups': groups or {}, **{link: values for link, values in settings.items()}}), 100, INFO)


def descend(tx, steps=STEPS, groups=None):
  """All parameters after `steps` steps of gradients tree(1), tree(2), ..., and the state."""
  with jax.enable_x64(True):
    is_trainable = trainable_paths({name: Group(**group) for name, group in (groups or {}).items()}, INFO)
    params, frozen = split(tree(0), is_trainable)

    @jax.jit  # one program instead of one for each operation
    def step(params, state, grads):
      updates, state = tx.update(grads, state, params, value=1.0, grad=grads)
      return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    for t in range(1, steps + 1):
      params, state = step(params, state, split(tree(t), is_trainable)[0])
    return jax.device_get(merge(params, frozen)), state


def by_equation(rule, steps=STEPS, decay=0.0):
  """The parameters by `rule(memory, g, t) -> direction`, applied to each array; decay on matrices and tables only."""
  return descended(rule, lambda path, p, u: p - RATE * (u + (decay * p if path[-1].key == 'w' else 0)), steps)


def descended(rule, change, steps=STEPS):
  """The parameters by `rule`, each update u and p turned into the next p by change(path, p, u)."""
  def one(path, p):
    memory = {}
    for t in range(1, steps + 1):
      g = tree(t)
      for key in path:
        g = g[key.key]
      p = change(path, p, rule(memory, g, t))
    return p
  return jax.tree_util.tree_map_with_path(one, tree(0))


def close(got, expected, rtol=1e-6):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol), got, expected)


def mean(memory, name, value, decay):
  memory[name] = decay * memory.get(name, 0.0) + (1 - decay) * value
  return memory[name]


def momentum(beta, nesterov):
  def rule(memory, g, t):
    memory['m'] = beta * memory.get('m', 0.0) + g
    return g + beta * memory['m'] if nesterov else memory['m']
  return rule


def trainable(params, groups):
  """The parameters that are in no frozen group."""
  return split(jax.tree.map(jnp.asarray, params), trainable_paths({n: Group(**g) for n, g in groups.items()}, INFO))[0]
