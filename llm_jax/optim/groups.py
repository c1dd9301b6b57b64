"""Groups of parameters by path and layer, with their own learning rate and decay, or frozen."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llm_jax.base.batch import Params
from llm_jax.base.params import ParamInfo
from llm_jax.base.ranges import Ranged, ranged, within
from llm_jax.base.trees import path_of, split
from llm_jax.optim.link import Link, regular
from llm_jax.optim.masks import matrices


@dataclasses.dataclass(frozen=True)
class Group(Ranged):
  """Settings for parameters whose path matches a regular expression; the first matching group counts.

  After an @ the pattern selects layers of a stack, by one index or a Python slice: blocks/.*@0:4, blocks/mlp@-1. Frozen
  parameters have neither gradients nor optimizer state; single frozen layers of a stack get zero updates and keep both.
  """

  pattern: str = ''  # may match anywhere in a path such as 'blocks/attn/q/w'
  learning_rate: float = within(0, 1000, 1.0)  # factor on the learning rate
  weight_decay: float = within(0, 1000, 1.0)  # factor on the weight decay
  # The learning rate is multiplied by layer_decay^(L - 1 - l) in layer l of a stack of L, and by layer_decay^L, with L
  # of the deepest stack, in embeddings; in other parameters not at all.
  layer_decay: float = ranged(1.0, lambda x: 0 < x <= 1, 'in (0, 1]')
  frozen: bool = False  # keep the initial values

  def __post_init__(self) -> None:
    super().__post_init__()
    if not self.regex:
      raise ValueError('pattern must be set to a regular expression, for example blocks/.*/w$')
    regular(self.regex)
    _ = self.layers  # raises ValueError

  @property
  def regex(self) -> str:
    return self.pattern.partition('@')[0]

  @property
  def layers(self) -> int | slice | None:
    """The selected layers; None: all layers, and parameters without layers."""
    _, at, text = self.pattern.partition('@')
    if not at:
      return None
    if not re.fullmatch(r'-?\d+|(-?\d+)?:(-?\d+)?(:(-?[1-9]\d*)?)?', text):
      raise ValueError(f'pattern {self.pattern!r}: @ must be followed by an index or a slice of layers, as in '
                       f'blocks/.*@3 or blocks/.*@0:4; got {text!r}')
    numbers = [int(number) if number else None for number in text.split(':')]
    return slice(*numbers) if ':' in text else numbers[0]

  def layers_of(self, num_layers: int | None) -> Sequence[int]:
    """Indices of the selected layers; `num_layers` None: the parameter has no layers axis. Raises ValueError."""
    layers = self.layers
    if layers is None:
      return range(num_layers or 1)
    if num_layers is None:
      raise ValueError('has no layers axis; the pattern before @ must match only parameters of a stack, as blocks/.*')
    bounds, most = ([layers], num_layers - 1) if isinstance(layers, int) else ([layers.start, layers.stop], num_layers)
    if not all(-num_layers <= (bound or 0) <= most for bound in bounds):
      raise ValueError(f'has {num_layers} layers, so indices must be from {-num_layers} to {most}')
    chosen = np.arange(num_layers)[layers].reshape(-1).tolist()
    if not chosen:
      raise ValueError(f'has {num_layers} layers, and the slice selects none of them')
    return chosen

  @property
  def decays(self) -> bool:
    """Whether it changes the weight decay."""
    return not self.frozen and self.weight_decay != 1

  @property
  def scales(self) -> bool:
    """Whether it changes updates."""
    return self.decays or (not self.frozen and (self.learning_rate, self.layer_decay) != (1, 1))


PerLayer = float | np.ndarray  # one number, or one per layer of shape [L, 1, ...]


@dataclasses.dataclass(frozen=True)
class Settings:
  """The combined settings of the groups for one parameter."""

  learning_rate: PerLayer
  weight_decay: PerLayer
  trained: bool | np.ndarray


def assign(groups: dict[str, Group], info: Params) -> Params:
  """A tree of Settings. Raises ValueError for a group without parameters, or for layers that do not exist."""
  leaves = jax.tree_util.tree_leaves_with_path(info)
  depth = max((num_layers_of(p) or 0 for _, p in leaves), default=0)
  found = set()

  def settings_of(path: tuple, p: ParamInfo) -> Settings:
    num_layers = num_layers_of(p)
    chosen: dict[int, str] = {}
    for name, group in groups.items():
      if not re.search(group.regex, path_of(path)):
        continue
      try:
        layers = group.layers_of(num_layers)
      except ValueError as e:
        raise ValueError(f'groups.{name}.pattern: {group.pattern!r} matches {path_of(path)}, which {e}') from None
      for layer in set(layers) - chosen.keys():
        chosen[layer] = name
        found.add(name)
    return combined([groups[chosen[i]] if i in chosen else Group('.') for i in range(num_layers or 1)], p, depth)

  assigned = jax.tree_util.tree_map_with_path(settings_of, info)
  if empty := groups.keys() - found:
    name = min(empty)
    raise ValueError(f'groups.{name}.pattern: {groups[name].pattern!r} matches no parameter, except those of earlier '
                     'groups; parameters: ' + ', '.join(path_of(path) for path, _ in leaves))
  return assigned


def num_layers_of(p: ParamInfo) -> int | None:
  return p.shape[0] if p.axes[:1] == ('layers',) else None


def combined(groups: list[Group], p: ParamInfo, depth: int) -> Settings:
  """Settings of a parameter from the group of each of its layers; `depth` counts the layers of the deepest stack."""
  def one_or_each(values: list) -> Any:
    return values[0] if len(set(values)) == 1 else np.array(values).reshape(-1, *(1,) * (len(p.shape) - 1))

  # The number of layers above each of the parameter's layers; above a table, all layers.
  above = range(len(groups))[::-1] if num_layers_of(p) else [depth if p.is_table else 0]
  return Settings(one_or_each([g.learning_rate * g.layer_decay**n for g, n in zip(groups, above, strict=True)]),
                  one_or_each([g.weight_decay for g in groups]), one_or_each([not g.frozen for g in groups]))


@dataclasses.dataclass(frozen=True)
class Factors(Link):
  """Applies the groups' factors to updates: corrects their weight decay, then scales them."""

  assigned: Params
  weight_decay: float  # of the optimizer, already contained in the updates

  def make(self, schedule: optax.Schedule, info: Params) -> optax.GradientTransformation:
    def update(updates: Params, step: jax.Array, params: Params) -> tuple[Params, jax.Array]:
      rate = schedule(step)

      def scaled(u: jax.Array, p: jax.Array, decays: bool, settings: Settings) -> jax.Array:
        lacking = (settings.weight_decay - 1) * self.weight_decay
        if decays and np.any(lacking):
          u = u - jnp.asarray(lacking, u.dtype) * rate * p
        return jnp.asarray(settings.learning_rate, u.dtype) * u

      updates = jax.tree.map(scaled, updates, params, matrices(params), self.assigned)
      return updates, optax.safe_increment(step)

    return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)


def trainable_paths(groups: dict[str, Group], info: Params) -> Callable[[tuple], bool]:
  """A function from a parameter's path to whether any of its layers is trained. Raises ValueError, as `assign`."""
  if not groups:
    return lambda path: True
  trained = {path: bool(np.any(s.trained)) for path, s in jax.tree_util.tree_leaves_with_path(assign(groups, info))}
  if not any(trained.values()):
    raise ValueError('groups: all parameters are frozen; leave some out')
  return trained.__getitem__


@dataclasses.dataclass(frozen=True)
class FrozenLayers(Link):
  """The last link of a chain with single frozen layers: `masked` sets their updates to zero."""

  def make(self, schedule: optax.Schedule, info: Params) -> optax.GradientTransformation:
    return optax.identity()


def masked(tx: optax.GradientTransformation, trained: Params) -> optax.GradientTransformationExtraArgs:
  """The transformation of gradients that are zero in single frozen layers; `trained` None: there are none."""
  tx = optax.with_extra_args_support(tx)
  if trained is None:
    return tx

  def zeroed(updates: Params) -> Params:
    return keep_frozen(trained, updates, optax.tree.zeros_like(updates))

  def update(updates: Params, state: Any, params: Params = None, **extra: Any) -> tuple[Params, Any]:
    if extra.get('grad') is not None:
      extra['grad'] = zeroed(extra['grad'])
    return tx.update(zeroed(updates), state, params, **extra)

  return optax.GradientTransformationExtraArgs(tx.init, update)


def keep_frozen(trained: Params, new: Params, old: Params) -> Params:
  """`new`, but `old` in frozen layers. Leaves of `trained`: True or booleans [L, 1, ...]; None: all are trained."""
  if trained is None:
    return new
  return jax.tree.map(lambda m, x, y: x if isinstance(m, bool) else jnp.where(m, x, y), trained, new, old)


def with_groups(links: list[Link], groups: dict[str, Group], weight_decay: float,
                info: Params) -> tuple[list[Link], Params]:
  """(the links with one that applies the groups' factors, `trained` if single layers are frozen).

  `info` is a tree of ParamInfo of all parameters.
  """
  if not groups:
    return links, None
  assigned, _ = split(assign(groups, info), trainable_paths(groups, info))
  at = 1 + next(i for i, link in enumerate(links) if link.place == 'optimizer')
  links = [*links[:at], Factors(assigned, weight_decay), *links[at:]]
  trained = jax.tree.map(lambda settings: settings.trained, assigned)
  if all(np.all(m) for m in jax.tree.leaves(trained)):
    return links, None
  return [*links, FrozenLayers()], trained
