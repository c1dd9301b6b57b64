"""Rules: which tensor of a published model holds which parameter, and in which layout; read in both directions.

A rule is written with one letter per dimension: Rule('layers.{l}.q_proj.weight', 'blocks/attn/q/w', 'D N H', '(N H) D')
says that the parameter [L, D, N, H] holds, for each layer l, the transposed and merged tensor [N H, D].
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from llm_jax.base.errors import StorageError

Shape = tuple[int, ...]


class Rule(NamedTuple):
  """A tensor of a published model, and the parameters that it holds, one after the other along `axis`."""

  theirs: str  # {l}: the layer
  ours: str | tuple[str, ...]  # paths of parameters, stacked along layers where `theirs` has {l}
  our_dims: str  # of a parameter in one layer
  their_dims: str  # the same letters, with parentheses around merged dimensions
  axis: int = 0

  @property
  def paths(self) -> tuple[str, ...]:
    return (self.ours,) if isinstance(self.ours, str) else self.ours

  @property
  def stacked(self) -> bool:
    return '{l}' in self.theirs

  @property
  def is_bytes(self) -> bool:
    """Whether the tensor is uint8, and not numbers in the precision of the folder."""
    return False

  def shapes(self, sizes: Mapping[str, Shape], vocab_size: int) -> list[Shape]:
    """The shape of each part of the tensor. `sizes` are the shapes of parameters in one layer, by path."""
    own = [self._sizes(sizes[path], vocab_size) for path in self.paths]
    return [tuple(math.prod(part[d] for d in group) for group in letters(self.their_dims)) for part in own]

  def shape(self, sizes: Mapping[str, Shape], vocab_size: int) -> Shape:
    """The shape of the tensor."""
    parts = self.shapes(sizes, vocab_size)
    whole = list(parts[0])
    whole[self.axis] = sum(part[self.axis] for part in parts)
    return tuple(whole)

  def write(self, arrays: Sequence[np.ndarray], vocab_size: int) -> np.ndarray:
    """The tensor from the parameters of one layer. Of tables padded to a multiple, the padding is left out."""
    mine, groups = self.our_dims.split(), letters(self.their_dims)
    parts = []
    for array in arrays:
      cut = array[tuple(slice(vocab_size if d == 'V' else None) for d in mine)]
      order = [mine.index(d) for group in groups for d in group]
      sizes = dict(zip(mine, cut.shape, strict=True))
      parts.append(cut.transpose(order).reshape([math.prod(sizes[d] for d in group) for group in groups]))
    # In row-major order, as safetensors writes the memory of an array as it lies.
    return np.ascontiguousarray(np.concatenate(parts, self.axis))

  def read(self, tensor: np.ndarray, sizes: Mapping[str, Shape], vocab_size: int) -> Iterator[tuple[str, np.ndarray]]:
    """(path, parameter in one layer) of what the tensor holds. Tables are padded with zeros."""
    groups, mine = letters(self.their_dims), self.our_dims.split()
    order = [d for group in groups for d in group]
    ends = np.cumsum([part[self.axis] for part in self.shapes(sizes, vocab_size)])
    for path, piece in zip(self.paths, np.split(tensor, ends[:-1], self.axis), strict=True):
      own = self._sizes(sizes[path], vocab_size)
      array = piece.reshape([own[d] for d in order]).transpose([order.index(d) for d in mine])
      missing = [(0, size - have) for size, have in zip(sizes[path], array.shape, strict=True)]
      yield path, np.pad(array, missing) if any(after for _, after in missing) else array

  def _sizes(self, shape: Shape, vocab_size: int) -> dict[str, int]:
    return {d: vocab_size if d == 'V' else size for d, size in zip(self.our_dims.split(), shape, strict=True)}


def letters(dims: str) -> list[list[str]]:
  """'(N H) D' as [['N', 'H'], ['D']]."""
  return [(merged or single).split() for merged, single in re.findall(r'\(([^)]*)\)|(\S+)', dims)]


def tensor_names(rules: Sequence[Rule], num_layers: int) -> Iterator[tuple[str, Rule, int]]:
  """(name, rule, layer) of each tensor; layer -1: it belongs to none."""
  for rule in rules:
    for layer in range(num_layers) if rule.stacked else [-1]:
      yield rule.theirs.format(l=layer), rule, layer


def check_complete(rules: Sequence[Rule], paths: Sequence[str]) -> None:
  """Raises StorageError unless the rules hold each parameter once."""
  held = [path for rule in rules for path in rule.paths]
  if wrong := sorted(set(paths) ^ set(held)):
    raise StorageError(f'the model has other parameters than the family: {", ".join(wrong)}')


# The parts that most families share, with their usual names in a layer.

def attention_rules(prefix: str, *, qkv_bias: bool, out_bias: bool, qk_norm: bool = False) -> list[Rule]:
  """Separate projections q_proj, k_proj, v_proj and o_proj."""
  rules = []
  for name in 'qkv':
    rules.append(Rule(f'{prefix}.{name}_proj.weight', f'blocks/attn/{name}/w', 'D N H', '(N H) D'))
    if qkv_bias:
      rules.append(Rule(f'{prefix}.{name}_proj.bias', f'blocks/attn/{name}/b', 'N H', '(N H)'))
  rules.append(Rule(f'{prefix}.o_proj.weight', 'blocks/attn/o/w', 'N H D', 'D (N H)'))
  if out_bias:
    rules.append(Rule(f'{prefix}.o_proj.bias', 'blocks/attn/o/b', 'D', 'D'))
  if qk_norm:
    rules += [Rule(f'{prefix}.{name}_norm.weight', f'blocks/attn/{name}_norm/scale', 'H', 'H') for name in 'qk']
  return rules


def mlp_rules(prefix: str, names: Mapping[str, str], bias: bool) -> list[Rule]:
  """Matrices by our name: {'up': 'up_proj', ...}."""
  rules = []
  for ours, theirs in names.items():
    dims, turned = ('F D', 'D F') if ours == 'down' else ('D F', 'F D')
    rules.append(Rule(f'{prefix}.{theirs}.weight', f'blocks/mlp/{ours}/w', dims, turned))
    if bias:
      rules.append(Rule(f'{prefix}.{theirs}.bias', f'blocks/mlp/{ours}/b', dims[-1], dims[-1]))
  return rules


def norm_rules(names: Mapping[str, str], bias: bool = False) -> list[Rule]:
  """Norms by our path: {'blocks/attn_norm': 'model.layers.{l}.input_layernorm', ...}."""
  kinds = [('weight', 'scale'), *([('bias', 'b')] if bias else [])]
  return [Rule(f'{theirs}.{kind}', f'{ours}/{own}', 'D', 'D') for ours, theirs in names.items() for kind, own in kinds]


def table_rules(embed: str, head: str, tied: bool) -> list[Rule]:
  """The embedding, and the readout if it is not tied to it."""
  rules = [Rule(embed, 'embed/w', 'V D', 'V D')]
  return rules if tied else [*rules, Rule(head, 'head/w', 'D V', 'V D')]
