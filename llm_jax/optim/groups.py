"""Groups of parameters by path: their own learning rate and decay, or none at all."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import jax
import optax

from llm_jax.base.batch import Params
from llm_jax.base.trees import path_of
from llm_jax.optim.link import Link, at_least, regular
from llm_jax.optim.masks import is_axes, matrices


@dataclasses.dataclass(frozen=True)
class Group:
  """Parameters whose path matches a regular expression; of several groups the first that matches counts."""

  pattern: str = ''  # found anywhere in 'blocks/attention/q/w'
  learning_rate: float = 1.0  # factors
  weight_decay: float = 1.0
  frozen: bool = False  # they keep their initial values, and have neither gradients nor optimizer state

  def __post_init__(self):
    regular(self.pattern)
    if not self.pattern:
      raise ValueError('pattern must say which parameters; for example blocks/.*/w$')
    at_least(0, learning_rate=self.learning_rate, weight_decay=self.weight_decay)


EVERYTHING_ELSE = Group('.')


def group_of(groups: dict[str, Group], path: tuple) -> str | None:
  """The name of the group that a parameter belongs to."""
  return next((name for name, group in groups.items() if re.search(group.pattern, path_of(path))), None)


def trainable_paths(groups: dict[str, Group]) -> Callable[[tuple], bool]:
  """A function of a parameter's path: whether no frozen group holds it."""
  def is_trainable(path: tuple) -> bool:
    name = group_of(groups, path)
    return name is None or not groups[name].frozen

  return is_trainable


def check_groups(groups: dict[str, Group], axes: Params) -> None:
  """Raises ValueError for a group without parameters; `axes` is the tree of all parameters' logical axes."""
  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(axes, is_leaf=is_axes)]
  found = {group_of(groups, path) for path in paths}
  if empty := groups.keys() - found:
    name = min(empty)
    raise ValueError(f'groups.{name}.pattern: {groups[name].pattern!r} matches no parameter that no group before it '
                     'has; they are: ' + ', '.join(map(path_of, paths)))
  if not any(map(trainable_paths(groups), paths)):
    raise ValueError('groups: every parameter is frozen; leave one group out')


@dataclasses.dataclass(frozen=True)
class Factors(Link):
  """Scales updates by the groups' factors, after adding the decay that a group has more than the optimizer's."""

  assigned: Params  # a tree of the Group of each parameter
  weight_decay: float  # the optimizer's, which is in the updates already

  def make(self, schedule: optax.Schedule, axes: Params) -> optax.GradientTransformation:
    links = []
    for factor in sorted({group.weight_decay for group in jax.tree.leaves(self.assigned)} - {1.0}):
      lacking = (factor - 1) * self.weight_decay
      mask = jax.tree.map(lambda group: group.weight_decay == factor, self.assigned)  # noqa: B023
      links.append(optax.add_decayed_weights(
          lambda n, lacking=lacking: -lacking * schedule(n),
          lambda params, mask=mask: jax.tree.map(lambda m, p: m and p, mask, matrices(params))))
    scale = jax.tree.map(lambda group: group.learning_rate, self.assigned)
    scaled = optax.stateless(lambda updates, _: jax.tree.map(lambda u, s: s * u, updates, scale))
    return optax.chain(*links, scaled)


def with_groups(links: list[Link], groups: dict[str, Group], weight_decay: float, axes: Params) -> list[Link]:
  """The links of a chain that scales groups by their factors; `axes` is the tree of trainable parameters' axes."""
  if all(group.frozen for group in groups.values()):
    return links

  def assigned(path: tuple, _: tuple) -> Group:
    name = group_of(groups, path)
    return EVERYTHING_ELSE if name is None else groups[name]

  factors = Factors(jax.tree_util.tree_map_with_path(assigned, axes, is_leaf=is_axes), weight_decay)
  at = 1 + next(i for i, link in enumerate(links) if link.place == 'optimizer')
  return [*links[:at], factors, *links[at:]]
