"""Objective: combines one or more losses for training steps and evaluations."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.base.batch import Batch, Metrics, Params
from llm_jax.losses.balance import Balance
from llm_jax.losses.next_token import NextToken
from llm_jax.losses.readout import Readout
from llm_jax.losses.term import Term, TermInputs


@dataclasses.dataclass(frozen=True)
class Objective:
  """Losses by name and their balance. Hashable."""

  terms: tuple[tuple[str, Any], ...] = (('next_token', NextToken()),)
  balance: Any = Balance()
  functions: tuple[tuple[str, Any], ...] = ()  # of Constants, by term
  metrics: tuple[tuple[str, Any], ...] = ()  # functions of METRICS, for evaluations

  @property
  def heads(self) -> tuple[tuple[str, int], ...]:
    """(name, number of outputs) of the heads that the model needs."""
    return tuple((name, term.head_dim) for name, term in self.terms if term.head_dim)

  @property
  def num_weights(self) -> int:
    """The number of parameters that the balance trains."""
    return len(self.terms) if self.balance.learns else 0

  @property
  def reads(self) -> frozenset[str]:
    return frozenset().union(*(term.reads for _, term in self.terms))

  @property
  def row_wise(self) -> bool:
    return all(term.row_wise for _, term in self.terms) and self.balance.row_wise

  @property
  def num_readouts(self) -> int:
    """The number of forward passes per batch."""
    return 1 + sum(type(term).other is not Term.other for _, term in self.terms)

  def num_tokens(self, batch: Batch) -> jax.Array:
    """The number of input tokens of all forward passes over a batch."""
    others = [term.other(batch) for _, term in self.terms]
    return batch.num_tokens + sum(other.num_tokens for other in others if other is not None)

  @property
  def has_predictions(self) -> bool:
    """Whether any term has predictions."""
    return any(type(term).predict is not Term.predict for _, term in self.terms)

  def eval_objective(self) -> Objective:
    """The objective of the terms that evaluations compute; next_token if there are none."""
    terms = tuple(pair for pair in self.terms if pair[1].evaluated)
    return Objective(terms or Objective.terms, metrics=self.metrics)

  def counts(self, batch: Batch) -> tuple[jax.Array, ...]:
    return tuple(jnp.maximum(term.count(batch), 1.0) for _, term in self.terms)

  def train(self, module: Any, batch: Batch, counts: tuple[jax.Array, ...], constants: Params,
            share: float) -> tuple[jax.Array, Metrics]:
    """(objective, metrics) of a microbatch that is `share` of a batch with these `counts`; both sum to the batch's.

    `constants` has the arrays of Constants by term. The metric `loss` is the weighted sum of the terms' logged losses,
    `extra_loss` the rest of the objective. With several terms, each also logs NAME/loss and NAME/weight.
    """
    all_inputs = self._inputs(module, batch, constants, train=True)
    readout = all_inputs[0].readout

    def losses(readout: Readout) -> tuple[jax.Array, jax.Array]:
      pairs = [term.loss(inputs._replace(readout=readout), count)
               for (_, term), inputs, count in zip(self.terms, all_inputs, counts, strict=True)]
      weights_I = jnp.array([term.weight for _, term in self.terms])
      objectives, losses = zip(*pairs, strict=True)
      return weights_I * jnp.stack(objectives), weights_I * jnp.stack(losses)

    def norms() -> jax.Array:
      grads_IBTD = jax.jacrev(lambda x_BTD: losses(dataclasses.replace(readout, x_BTD=x_BTD))[0])(readout.x_BTD)
      return jnp.sqrt(jnp.sum(grads_IBTD**2, axis=(1, 2, 3)))

    objectives_I, losses_I = losses(readout)
    initial_I = jnp.array([term.initial_loss(inputs) for (_, term), inputs in zip(self.terms, all_inputs, strict=True)])
    s_I = module.loss_weights if self.num_weights else jnp.zeros(len(self.terms))
    objective, weights_I = self.balance(objectives_I, s_I, share, norms, initial_I)
    loss = jnp.sum(losses_I)
    metrics = {'loss': loss, 'extra_loss': objective - loss}
    if len(self.terms) > 1:
      for i, (name, term) in enumerate(self.terms):
        metrics |= {f'{name}/loss': losses_I[i] / term.weight, f'{name}/weight': share * weights_I[i]}
    return objective, metrics

  def score(self, module: Any, batch: Batch, token_bytes: jax.Array) -> dict[str, jax.Array]:
    """Sums over a batch, named NAME/... for each term and metric."""
    all_inputs = self._inputs(module, batch, None, train=False)
    sums = {f'{name}/{key}': value for (name, term), inputs in zip(self.terms, all_inputs, strict=True)
            for key, value in term.score(inputs, token_bytes).items()}
    for name, metric in self.metrics:
      values, weights = metric(all_inputs[0].readout.logits(), batch)
      sums |= {f'{name}/sum': jnp.sum(values * weights), f'{name}/count': jnp.sum(weights)}
    return sums

  def predict(self, module: Any, batch: Batch) -> dict[str, jax.Array]:
    """The predictions for each document, by term."""
    all_inputs = self._inputs(module, batch, None, train=False)
    predictions = {name: term.predict(inputs) for (name, term), inputs in zip(self.terms, all_inputs, strict=True)}
    return {name: x for name, x in predictions.items() if x is not None}

  def summarize(self, sums: dict[str, Any]) -> dict[str, float]:
    """Results by name; with several terms as NAME/..., and `loss` is the weighted sum of their losses."""
    results = {name: term.summarize({key.removeprefix(f'{name}/'): value for key, value in sums.items()
                                     if key.startswith(f'{name}/')}) for name, term in self.terms}
    metrics = {name: sums[f'{name}/sum'] / max(sums[f'{name}/count'], 1e-30) for name, _ in self.metrics}
    if len(self.terms) == 1:
      return next(iter(results.values())) | metrics
    loss = sum(term.weight * results[name]['loss'] for name, term in self.terms)
    named = {f'{name}/{key}': value for name in results for key, value in results[name].items()}
    return {'loss': loss} | named | metrics

  def tables(self, sums: dict[str, Any]) -> dict[str, np.ndarray]:
    """Confusion counts of classification: true classes in rows, predicted classes in columns."""
    return {name: sums[f'{name}/confusion'] for name, _ in self.terms if f'{name}/confusion' in sums}

  def _inputs(self, module: Any, batch: Batch, constants: Params, train: bool) -> list[TermInputs]:
    readout, functions = module.readout(batch, train=train), dict(self.functions) if train else {}
    dtype, all_inputs = module.cfg.operand_dtype if self.heads else None, []
    for name, term in self.terms:
      other = term.other(batch)
      all_inputs.append(TermInputs(
          batch, readout, head=module.head_weights(name) if term.head_dim else {},
          other=None if other is None else module.readout(other, train=train),
          constant=functions[name](constants[name], batch) if name in functions else None, dtype=dtype))
    return all_inputs
