"""Groups of parameters by path: their own learning rate and decay, or none at all."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import optax

from llm_jax.base.batch import Metrics, Params
from llm_jax.optim.link import Link, at_least, regular
from llm_jax.optim.masks import is_axes, matrices, path_of


@dataclasses.dataclass(frozen=True)
class Group:
  """Parameters whose path matches a regular expression; of several groups the first that matches counts."""

  pattern: str = ''  # found anywhere in 'blocks/attention/q/w'
  learning_rate: float = 1.0  # factors
  weight_decay: float = 1.0
  frozen: bool = False  # they keep their first values, and have no optimizer state

  def __post_init__(self):
    regular(self.pattern)
    if not self.pattern:
      raise ValueError('pattern must say which parameters; for example blocks/.*/w$')
    at_least(0, learning_rate=self.learning_rate, weight_decay=self.weight_decay)


EVERYTHING_ELSE = Group('.')


def assign(groups: dict[str, Group], axes: Params) -> Params:
  """A tree of the Group that each parameter belongs to. Raises ValueError for a group that has none."""
  found = set()

  def group_of(path: tuple, _: Any) -> Group:
    name = next((name for name, group in groups.items() if re.search(group.pattern, path_of(path))), None)
    found.add(name)
    return EVERYTHING_ELSE if name is None else groups[name]

  assigned = jax.tree_util.tree_map_with_path(group_of, axes, is_leaf=is_axes)
  if empty := groups.keys() - found:
    name = min(empty)
    raise ValueError(f'groups.{name}.pattern: {groups[name].pattern!r} matches no parameter that no group before it '
                     'has; they are: ' + ', '.join(
        path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(axes, is_leaf=is_axes)))
  return assigned


@dataclasses.dataclass(frozen=True)
class Factors(Link):
  """Updates as the groups' factors would have them: what decay lacks is added, and all is scaled."""

  assigned: Params
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


@dataclasses.dataclass(frozen=True)
class Trainable(Link):
  """A link that sees only parameters where `mask` is True."""

  link: Link
  mask: Params

  def make(self, schedule: optax.Schedule, axes: Params) -> optax.GradientTransformation:
    return optax.masked(self.link.make(schedule, self._cut(axes)), self.mask, mask_compatible_extra_args=True)

  def evaluated(self, state: Any, params: Params) -> Params:
    mine = self.link.evaluated(state.inner_state, self._cut(params))
    return jax.tree.map(lambda trained, old, new: new if trained else old, self.mask, params, mine)

  def report(self, state: Any) -> Metrics:
    return self.link.report(state.inner_state)

  def hear(self, state: Any, results: dict[str, float]) -> Any:
    return state._replace(inner_state=self.link.hear(state.inner_state, results))

  def _cut(self, tree: Params) -> Params:
    return jax.tree.map(lambda trained, x: x if trained else optax.MaskedNode(), self.mask, tree)

  @property
  def averages(self) -> bool:
    return self.link.averages

  @property
  def asks(self) -> tuple[str, ...]:
    return self.link.asks


@dataclasses.dataclass(frozen=True)
class Frozen(Link):
  """Updates of zero where `mask` is False."""

  mask: Params

  def make(self, schedule: optax.Schedule, axes: Params) -> optax.GradientTransformation:
    return optax.masked(optax.set_to_zero(), jax.tree.map(lambda trained: not trained, self.mask))


def with_groups(links: list[Link], groups: dict[str, Group], weight_decay: float, axes: Params) -> list[Link]:
  """The links of a chain that treats groups as they ask for."""
  if not groups:
    return links
  assigned = assign(groups, axes)
  at = 1 + next(i for i, link in enumerate(links) if link.place == 'optimizer')
  factors, trainable = Factors(assigned, weight_decay), jax.tree.map(lambda group: not group.frozen, assigned)
  if all(jax.tree.leaves(trainable)):
    return [*links[:at], factors, *links[at:]]
  masked = [Trainable(link, trainable) for link in links]
  return [*masked[:at], factors, *masked[at:], Frozen(trainable)]
