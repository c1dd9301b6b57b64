"""One objective from one loss or several: what a step descends on, and what an evaluation measures."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.base.batch import Batch, Metrics, Params
from llm_jax.layers.clock import clock_at
from llm_jax.losses.balance import Fixed
from llm_jax.losses.next_token import Distillation, NextToken
from llm_jax.losses.readout import Readout
from llm_jax.losses.term import Look, Term


@dataclasses.dataclass(frozen=True)
class Objective:
  """Losses by name and how they are weighed; hashable. `teacher` is the model whose parameters are `frozen` ones."""

  terms: tuple[tuple[str, Any], ...] = (('next_token', NextToken()),)
  balance: Any = Fixed()
  teacher: Any = None

  @property
  def heads(self) -> tuple[tuple[str, int], ...]:
    """(name, outputs) of the heads that the model has to have."""
    return tuple((name, term.head_dim) for name, term in self.terms if term.head_dim)

  @property
  def num_weights(self) -> int:
    """Numbers that the balance learns."""
    return len(self.terms) if self.balance.learns else 0

  @property
  def reads(self) -> frozenset[str]:
    return frozenset().union(*(term.reads for _, term in self.terms))

  @property
  def row_wise(self) -> bool:
    return all(term.row_wise for _, term in self.terms) and self.balance.row_wise

  @property
  def num_readouts(self) -> int:
    """How often the model reads a batch."""
    return 1 + sum(type(term).other is not Term.other for _, term in self.terms)

  def num_tokens(self, batch: Batch) -> jax.Array:
    """Tokens that the model reads for a batch."""
    others = [term.other(batch) for _, term in self.terms]
    return batch.num_tokens + sum(other.num_tokens for other in others if other is not None)

  @property
  def tells(self) -> bool:
    """Whether `predict` has anything to tell."""
    return any(type(term).predict is not Term.predict for _, term in self.terms)

  def judge(self) -> Objective:
    """What an evaluation measures: no teacher's opinion, but how well its pupil tells the next token."""
    terms = tuple(pair for pair in self.terms if not isinstance(pair[1], Distillation))
    return Objective(terms or Objective.terms)

  def counts(self, batch: Batch) -> tuple[jax.Array, ...]:
    return tuple(jnp.maximum(term.count(batch), 1.0) for _, term in self.terms)

  def train(self, module: Any, batch: Batch, counts: tuple[jax.Array, ...], frozen: Params,
            share: float) -> tuple[jax.Array, Metrics]:
    """(objective, metrics) of a microbatch that is `share` of the batch whose counts these are: both add up.

    The metric `loss` is the sum of what terms log as theirs, by the config's weights, `extra_loss` all the rest of the
    objective. Of several terms each has its own NAME/loss and NAME/weight.
    """
    looks = self._looks(module, batch, frozen, train=True)
    readout = looks[0].readout

    def losses(readout: Readout) -> tuple[jax.Array, jax.Array]:
      pairs = [term.loss(look._replace(readout=readout), count)
               for (_, term), look, count in zip(self.terms, looks, counts, strict=True)]
      weights_I = jnp.array([term.weight for _, term in self.terms])
      objectives, losses = zip(*pairs, strict=True)
      return weights_I * jnp.stack(objectives), weights_I * jnp.stack(losses)

    def norms() -> jax.Array:
      grads_IBTD = jax.jacrev(lambda x_BTD: losses(dataclasses.replace(readout, x_BTD=x_BTD))[0])(readout.x_BTD)
      return jnp.sqrt(jnp.sum(grads_IBTD**2, axis=(1, 2, 3)))

    objectives_I, losses_I = losses(readout)
    first_I = jnp.array([term.first_loss(look) for (_, term), look in zip(self.terms, looks, strict=True)])
    s_I = module.loss_weights if self.num_weights else jnp.zeros(len(self.terms))
    objective, weights_I = self.balance(objectives_I, s_I, share, norms, first_I)
    loss = jnp.sum(losses_I)
    metrics = {'loss': loss, 'extra_loss': objective - loss}
    if len(self.terms) > 1:
      for i, (name, term) in enumerate(self.terms):
        metrics |= {f'{name}/loss': losses_I[i] / term.weight, f'{name}/weight': share * weights_I[i]}
    return objective, metrics

  def score(self, module: Any, batch: Batch, token_bytes: jax.Array) -> dict[str, jax.Array]:
    """Sums over a batch, 'NAME/...' of each term."""
    looks = self._looks(module, batch, None, train=False)
    return {f'{name}/{key}': value for (name, term), look in zip(self.terms, looks, strict=True)
            for key, value in term.score(look, token_bytes).items()}

  def predict(self, module: Any, batch: Batch) -> dict[str, jax.Array]:
    """What terms tell of each document, by name."""
    looks = self._looks(module, batch, None, train=False)
    told = {name: term.predict(look) for (name, term), look in zip(self.terms, looks, strict=True)}
    return {name: x for name, x in told.items() if x is not None}

  def summarize(self, sums: dict[str, Any]) -> dict[str, float]:
    """Results of one term under its own names, of several as NAME/..., and their losses' sum as `loss`."""
    results = {name: term.summarize({key.removeprefix(f'{name}/'): value for key, value in sums.items()
                                     if key.startswith(f'{name}/')}) for name, term in self.terms}
    if len(self.terms) == 1:
      return next(iter(results.values()))
    loss = sum(term.weight * results[name]['loss'] for name, term in self.terms)
    return {'loss': loss, **{f'{name}/{key}': value for name in results for key, value in results[name].items()}}

  def tables(self, sums: dict[str, Any]) -> dict[str, np.ndarray]:
    """Of classification the confusion counts: what was (down) and what it was taken for."""
    return {name: sums[f'{name}/confusion'] for name, _ in self.terms if f'{name}/confusion' in sums}

  def _looks(self, module: Any, batch: Batch, frozen: Params, train: bool) -> list[Look]:
    readout = module.readout(batch, train=train)
    taught = None
    if self.teacher is not None:
      with clock_at(None):  # a teacher is not in training
        taught = jax.lax.stop_gradient(self.teacher.apply({'params': frozen}, batch, method='readout'))
    looks = []
    for name, term in self.terms:
      other = term.other(batch)
      head = module.head_weights(name) if term.head_dim else {}
      looks.append(Look(batch, readout, head, None if other is None else module.readout(other, train=train), taught,
                        module.cfg.operand_dtype if self.heads else None))
    return looks

