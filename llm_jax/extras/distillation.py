"""Distillation: a loss that matches the logits or hidden states of a trained run, the teacher."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llm_jax.base.batch import Batch, Params
from llm_jax.base.errors import ConfigError, StorageError
from llm_jax.base.ranges import at_least, positive
from llm_jax.base.registry import register
from llm_jax.base.storage import read_workdir
from llm_jax.config import Config
from llm_jax.data.open import Data
from llm_jax.infer.load import Loaded, load_run, tokenizers_of
from llm_jax.layers.clock import clock_at
from llm_jax.losses.config import LOSSES
from llm_jax.losses.readout import Readout, num_chunks
from llm_jax.losses.term import Constants, Term, TermInputs, affine


@dataclasses.dataclass(frozen=True)
class Distillation(Term):
  """Distillation from a trained run, the teacher: from its logits (arXiv 1503.02531) and its last hidden states.

  Hidden states are compared by mean squared error, after a matrix that is trained with the student (arXiv 1412.6550).
  """

  teacher: str = ''  # the workdir of a run
  checkpoint: str = 'best'  # of the teacher: best, latest or a step
  temperature: float = positive(2.0)  # by which the logits of both are divided
  logits: float = at_least(0, 1.0)  # weight of the logits' part
  hidden: float = at_least(0, 0.0)  # weight of the hidden states' part
  hidden_dim: int | None = None  # the teacher's width; None: read from its config
  evaluated: ClassVar[bool] = False
  fixed: ClassVar[tuple[str, ...]] = ('hidden', 'hidden_dim', 'checkpoint')

  def __post_init__(self):
    super().__post_init__()
    if not self.logits + self.hidden:
      raise ValueError('logits and hidden must not both be 0')
    if not self.logits and self.temperature != Distillation.temperature:
      raise ValueError(f'temperature {self.temperature} applies to logits, whose weight is 0: it would have no effect')

  def check(self, loss: Any) -> None:
    if not self.logits and len(loss.terms) < 2:
      raise ValueError('distillation.hidden alone does not train the readout; add next_token to terms, or set '
                       'distillation.logits')
    if not self.teacher:
      raise ValueError('distillation.teacher must be set to the workdir of a trained run')

  def constants(self, config: Config, data: Data, mesh: Mesh) -> Constants:
    """The teacher's weights. It has no backward pass, so a forward pass counts for all of its FLOPs."""
    teacher = load_teacher(self, config, data, mesh)
    flops = (teacher.config.model.flops_per_token(config.data.seq_len) or 0.0) / 3
    term = dataclasses.replace(self, hidden_dim=teacher.config.model.embed_dim, checkpoint=str(teacher.meta['step']))
    return Constants(teacher.params, functools.partial(teacher_readout, teacher.model), flops, term)

  @property
  def head_dim(self) -> int:
    return (self.hidden_dim or 0) if self.hidden else 0

  @property
  def writes(self) -> bool:
    return self.logits > 0

  def count(self, batch: Batch) -> jax.Array:
    return jnp.sum(batch.loss_mask)

  def loss(self, inputs: TermInputs, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    teacher, weights_BT, loss = inputs.constant, inputs.batch.loss_mask / count, jnp.zeros(())
    if self.logits:
      loss += self.logits * divergence(inputs.readout, teacher, weights_BT, self.temperature)
    if self.hidden:
      squares_BT = jnp.mean((affine(inputs, inputs.readout.x_BTD) - jax.lax.stop_gradient(teacher.x_BTD))**2, axis=-1)
      loss += self.hidden * jnp.sum(squares_BT * weights_BT)
    return loss, loss

  def initial_loss(self, inputs: TermInputs) -> float:
    return self.logits * math.log(inputs.readout.num_logits) + self.hidden


def teacher_readout(model: Any, params: Params, batch: Batch) -> Readout:
  """The teacher's readout for a batch, without gradient."""
  with clock_at(None):  # a teacher is not in training
    return jax.lax.stop_gradient(model.apply({'params': params}, batch, method='readout'))


def divergence(readout: Readout, teacher: Readout, weights_BT: jax.Array, temperature: float) -> jax.Array:
  """The weighted sum of temperature^2 * KL(teacher || student) in nats, with logits divided by the temperature.

  Hinton et al., arXiv 1503.02531. The teacher has no gradient.
  """
  def nats(w, x_BCD, teacher_w, teacher_x_BCD, weights_BC):
    both = teacher.project(teacher_w, teacher_x_BCD), readout.project(w, x_BCD)
    V = min(logits.shape[-1] for logits in both)  # they may have different paddings of one vocabulary
    log_p_BCV, log_q_BCV = (jax.nn.log_softmax(logits[..., :V] / temperature) for logits in both)
    return temperature**2 * jnp.sum(jnp.sum(jnp.exp(log_p_BCV) * (log_p_BCV - log_q_BCV), axis=-1) * weights_BC)

  mesh: Any = jax.sharding.get_abstract_mesh()
  T, logits = readout.x_BTD.shape[1], jax.eval_shape(readout.project, readout.w, readout.x_BTD)
  least = num_chunks(T, 2 * 4 * logits.size / max(1, mesh.size))
  M = next(n for n in range(least, T + 1) if T % n == 0)

  def cut(x_BT):
    return jnp.moveaxis(x_BT.reshape(x_BT.shape[0], M, T // M, *x_BT.shape[2:]), 1, 0)

  @jax.checkpoint  # keeps no logits
  def body(total, xs):
    x_BCD, teacher_x_BCD, weights_BC = xs
    return total + nats(readout.w, x_BCD, *jax.lax.stop_gradient((teacher.w, teacher_x_BCD)), weights_BC), None

  return jax.lax.scan(body, jnp.zeros(()), (cut(readout.x_BTD), cut(teacher.x_BTD), cut(weights_BT)),
                      unroll=M == 1)[0]


def load_teacher(settings: Distillation, config: Config, data: Data, mesh: Mesh) -> Loaded:
  """The teacher's run. Raises UserErrors if it cannot be read or does not fit the data."""
  path = 'config.loss.distillation.teacher'
  try:
    teacher = load_run(read_workdir(settings.teacher, str(settings.checkpoint)), mesh, settings.checkpoint,
                       flag='config.loss.distillation.teacher')
  except StorageError as e:
    raise ConfigError(str(e).replace('--workdir', path)) from None
  except ConfigError as e:
    raise ConfigError(str(e).replace('--checkpoint', 'config.loss.distillation.checkpoint')) from None
  ours, theirs = tokenizers_of(data), tokenizers_of(teacher)
  if ours != theirs or (config.model.vocab_size != teacher.config.model.vocab_size):
    with_encoder = ' (and encoder_tokenizer to its encoder_tokenizer.json)' if ours[1:] != theirs[1:] else ''
    raise ConfigError(f'{path}: {settings.teacher} was trained with another tokenizer or vocabulary; set '
                      f'config.data.tokenizer to its tokenizer.json{with_encoder}, and config.model.vocab_size to '
                      f'{teacher.config.model.vocab_size}')
  if missing := teacher.model.needs - ({'encoder_tokens'} if config.data.task_settings.encodes else set()):
    raise ConfigError(f'{path}: {settings.teacher} needs {", ".join(sorted(missing))}, which config.data.task='
                      f'{config.data.task} does not provide; set another teacher or task')
  if teacher.config.model.max_len < config.data.seq_len:
    raise ConfigError(f'{path}: {settings.teacher} reads rows of up to {teacher.config.model.max_len} tokens, but '
                      f'config.data.seq_len is {config.data.seq_len}; set it to {teacher.config.model.max_len} or less')
  return teacher


register(LOSSES, 'distillation', Distillation)
