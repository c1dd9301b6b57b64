"""What must not depend on the machine: checks of a run's own model and optimizer on the devices that are here.

They use the run's weights in float32, rows of random tokens, and no dropout, so that only rounding may differ. Nothing
is written but one checkpoint in a temporary folder.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
import types
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llm_jax.base.batch import as_batch
from llm_jax.base.errors import ConfigError
from llm_jax.base.fields import DTYPES
from llm_jax.base.sharding import (
  MeshConfig,
  batch_sharding,
  describe_mesh,
  local_rows,
  make_mesh,
  num_batch_shards,
  put_batch,
)
from llm_jax.base.trees import leaf_name, split
from llm_jax.config import CheckpointConfig, Config
from llm_jax.data.open import open_data, open_examples
from llm_jax.data.pipeline import example_batch, stack
from llm_jax.data.rows.examples import make_examples
from llm_jax.data.rows.tasks import Features
from llm_jax.infer.load import Loaded
from llm_jax.infer.mesh import parse_mesh_sizes
from llm_jax.layers.kernels import ATTENTION, AttentionCase, local_device, why_not
from llm_jax.losses.config import make_objective
from llm_jax.models.registry import make_model
from llm_jax.optim.chain import as_optimizer, make_optimizer
from llm_jax.optim.groups import trainable_paths
from llm_jax.training.checkpoint import Checkpoints
from llm_jax.training.shardings import abstract_state, boxed_params, param_info, shardings_of
from llm_jax.training.state import TrainState, train_step

STEPS, LENGTH, MICROBATCHES = 3, 128, (1, 2, 4)
LOSS, LOGITS = 1e-4, 1e-3  # the largest differences, relative to the largest value: of losses, of logits and attention
ROUNDED = 0.03  # ... of matrices or attention in fewer bits, where a difference in the last bit is rounded to a step


class Finding(NamedTuple):
  """The result of a check."""

  name: str
  difference: float | None  # the largest; None: the check was left out, or failed with an error
  limit: float
  note: str = ''
  error: bool = False

  @property
  def passed(self) -> bool:
    return not self.error and (self.difference is None or self.difference <= self.limit)  # NaN does not pass

  @property
  def result(self) -> str:
    return 'DIFFERENCE' if not self.passed else 'left out' if self.difference is None else 'OK'


@dataclasses.dataclass(frozen=True)
class Setup:
  """A run's parts, changed so that results can be compared."""

  config: Config
  run: Loaded
  model: Any
  objective: Any
  limit: float  # of losses

  @property
  def rounds(self) -> bool:
    """Whether matrix products are computed in fewer bits."""
    return getattr(self.config.model, 'einsum', 'full') != 'full'

  @property
  def length(self) -> int:
    """Tokens of the rows: few, but all that a row has for models that need whole rows."""
    seq_len = self.config.data.seq_len
    return min(seq_len, LENGTH) if getattr(self.model, 'cache_grows', False) else seq_len


def set_up(run: Loaded) -> Setup:
  """The run's model in float32, without dropout, with the attention of the device; its loss as it is evaluated."""
  wanted = dict.fromkeys(DTYPES, 'float32') | {'dropout': 0.0, 'attention': 'auto'}
  changed: Any = {name: value for name, value in wanted.items() if hasattr(run.config.model, name)}
  config = dataclasses.replace(run.config, model=dataclasses.replace(run.config.model, **changed))
  whole = make_objective(config.loss)
  module = getattr(run.model, 'module', None) if config.model.name == 'custom' else None
  model = make_model(config.model, whole.heads, whole.num_weights, module)
  setup = Setup(config, run, model, whole.eval_objective(), LOSS)
  return dataclasses.replace(setup, limit=ROUNDED if setup.rounds else LOSS)


def parse_mesh(text: str) -> MeshConfig:
  """'data=2,fsdp=2' as a MeshConfig; axes that are not named have one device. Raises ConfigError."""
  config = parse_mesh_sizes(text, data=1)
  if (needed := math.prod(config.sizes)) > len(jax.local_devices()) or needed < 1:
    raise ConfigError(f'--mesh: {text} needs {needed} devices, but there are {len(jax.local_devices())} here; set '
                      'smaller sizes, without -1')
  return config


def check_run_on(run: Loaded, mesh_config: MeshConfig | None) -> Iterator[Finding]:
  """The findings, each as soon as it is known. Raises UserErrors."""
  devices = jax.local_devices()
  config = mesh_config or MeshConfig(data=len(devices))
  single = make_mesh(MeshConfig(1, 1, 1), devices[:1])
  mesh = make_mesh(config, devices[:int(np.prod(config.sizes))])
  setup = set_up(run)
  with jax.default_matmul_precision('highest'):
    yield from check_steps_on(setup, single, mesh)
    with jax.set_mesh(single):
      yield guarded('cached decoding and the full forward pass', setup.limit, partial(check_decoding, setup))
      yield from check_kernels(setup)


def guarded(name: str, limit: float, check: Any) -> Finding:
  """What check() returns: a difference, or why it is left out; an error of it counts as a difference."""
  try:
    found = check()
  except Exception as e:  # whatever a kernel, a plug-in or a compiler raises
    return Finding(name, None, limit, f'{type(e).__name__}: {(str(e).splitlines() or [""])[0]}', error=True)
  return Finding(name, None, limit, found) if isinstance(found, str) else Finding(name, float(found), limit)


# Training steps.

def check_steps_on(setup: Setup, single: Mesh, mesh: Mesh) -> Iterator[Finding]:
  """The checks of training steps: another mesh, other microbatches, and a save."""
  names = ('one device and the mesh', 'microbatches', 'save and resume')
  if getattr(setup.config.model, 'einsum', '') == 'packed':
    yield from (Finding(name, None, setup.limit, 'packed matrices are only for inference') for name in names)
    return
  num_rows = num_batch_shards(mesh) * max(MICROBATCHES)
  features = make_rows(setup, num_rows)
  one = Steps(setup, single, features)
  expected = one.losses(1)
  many = one if mesh.size == 1 else Steps(setup, mesh, features)
  if mesh.size == 1:
    yield Finding(names[0], None, setup.limit, 'there is one device, or --mesh names one')
  else:
    yield guarded(f'{names[0]} {describe_mesh(mesh)}', setup.limit, lambda: relative(expected, many.losses(1)))
  counts = MICROBATCHES[1:]
  if not setup.objective.row_wise:
    yield Finding(names[1], None, setup.limit, 'the loss needs the whole batch')
  else:
    yield guarded(f'1, {" and ".join(map(str, counts))} {names[1]}', setup.limit,
                  lambda: max(relative(expected, many.losses(n)) for n in counts))
  yield guarded(f'{names[2]}, bit for bit', 0.0, many.check_resume)


class Steps:
  """Training steps of a run's weights on one mesh."""

  def __init__(self, setup: Setup, mesh: Mesh, features: Features):
    self.setup, self.mesh = setup, mesh
    with jax.set_mesh(mesh):
      boxed = boxed_params(example_batch(setup.config.data), model=setup.model)
      info = param_info(boxed)
      is_trainable = trainable_paths(setup.config.optim.groups, info)
      self.tx = as_optimizer(make_optimizer(setup.config.optim, setup.config.num_steps, info))
      self.abstract = abstract_state(boxed, mesh, tx=self.tx, is_trainable=is_trainable)
      self.shardings = shardings_of(self.abstract)
      num_rows = len(features['tokens'])
      self.batch = put_batch(features, local_rows(mesh, num_rows), num_rows, mesh)
      trainable, frozen = jax.device_put(split(setup.run.params, is_trainable),
                                         (self.shardings.trainable, self.shardings.frozen))
      opt_state = jax.jit(self.tx.init, out_shardings=self.shardings.opt_state)(trainable)
      step = jax.device_put(jnp.zeros((), jnp.int32), self.shardings.step)
      self.first = TrainState(step, trainable, frozen, opt_state)

  def step(self, num_microbatches: int) -> Any:
    setup = self.setup
    return jax.jit(partial(train_step, model=setup.model, tx=self.tx, seed=0, num_microbatches=num_microbatches,
                           objective=setup.objective), in_shardings=(self.shardings, batch_sharding(self.mesh)),
                   out_shardings=(self.shardings, self.shardings.step))

  def losses(self, num_microbatches: int) -> list[float]:
    """The loss of each of the first steps."""
    with jax.set_mesh(self.mesh):
      step, state, found = self.step(num_microbatches), self.first, []
      for _ in range(STEPS):
        state, metrics = step(state, self.batch)
        found.append(float(metrics['loss']))
    return found

  def check_resume(self) -> float:
    """The number of arrays that differ after two steps, if the state is saved and restored after the first."""
    with jax.set_mesh(self.mesh), tempfile.TemporaryDirectory() as folder:
      step = self.step(1)
      state, _ = step(self.first, self.batch)
      with Checkpoints(Path(folder) / 'checkpoints', CheckpointConfig()) as checkpoints:
        checkpoints.save(1, state.params, (state.step, state.opt_state), {'step': 1})
        checkpoints.wait()
        kept = (self.abstract.step, self.abstract.opt_state)
        params, (count, opt_state), _ = checkpoints.restore(self.abstract.params, kept)
      trainable, frozen = split(params, lambda path: leaf_name(path) in self.trained_paths)
      resumed, _ = step(TrainState(count, trainable, frozen, opt_state), self.batch)
      expected, _ = step(state, self.batch)
      pairs = zip(jax.tree.leaves(expected), jax.tree.leaves(resumed), strict=True)
      return float(sum(np.asarray(a).tobytes() != np.asarray(b).tobytes() for a, b in pairs))

  @property
  def trained_paths(self) -> set[str]:
    return {leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(self.first.trainable)}


def make_rows(setup: Setup, num_rows: int) -> Features:
  """Rows of random tokens as the run's task makes them; of the run's own data for tasks that need more than answers.

  Raises UserErrors.
  """
  data, rng = setup.config.data, np.random.default_rng(0)
  task, tokenizer, rows = data.task_settings, setup.run.tokenizer, np.arange(num_rows)
  if task.needs not in ('text', 'answers'):
    opened = open_data(data)
    examples = open_examples(data, opened, next(iter((opened.val or opened.train).values())), train=False)
  else:
    eot = next(iter(data.named_sources.values())).eot_id
    bos, eos = (eot, eot) if tokenizer is None else (tokenizer.bos_id, tokenizer.eos_id)
    size = setup.config.model.vocab_size - task.num_sentinels if tokenizer is None else len(tokenizer.token_bytes)
    length = setup.length
    lengths = rng.integers(length // 2 + 2, max(length // 2 + 3, length), 4 * num_rows)
    tokens = rng.integers(0, min(size, data_size(setup, size)), int(lengths.sum()))
    starts = np.cumsum(lengths) - lengths
    if bos is not None:
      tokens[starts] = bos
    store: Any = types.SimpleNamespace(tokens=tokens.astype(np.int32), starts=starts, labels=None,
                                       answers=lengths // 2 if task.needs == 'answers' else None)
    examples = make_examples(
        store, task=task, seq_len=length, encoder_len=data.encoder_len, packing=data.packing, stride=None,
        truncate=data.truncate, mask_documents=data.mask_documents, vocab_size=size, bos_id=bos, eos_id=eos,
        encoder_tokenizer=setup.run.encoder_tokenizer, score_once=True)
  return stack([examples.make(int(row) % len(examples), rng) for row in rows])


def data_size(setup: Setup, size: int) -> int:
  """The number of ids that both tokenizers have."""
  other = setup.run.encoder_tokenizer
  return size if other is None else len(other.token_bytes)


# Decoding.

def check_decoding(setup: Setup) -> float | str:
  """The largest difference between logits by prefill and decode and those of the full forward pass."""
  model, config = setup.model, setup.config
  if not config.writes or not model.prompt_in_row:
    return 'the model has an encoder' if config.writes else 'the model does not write text'
  length = min(setup.length, config.model.max_len)
  prompt, rng = length // 2, np.random.default_rng(1)
  tokens = rng.integers(0, config.model.vocab_size, (2, length)).astype(np.int32)
  blank = np.zeros_like(tokens)
  inside = blank + (np.arange(length) < prompt) if config.model.prefix_attention else None
  batch = as_batch({'tokens': tokens, 'targets': blank, 'loss_mask': blank.astype(np.float32), 'prefix_mask': inside})
  params = setup.run.params
  full = np.asarray(jax.jit(lambda params, batch: model.apply({'params': params}, batch))(params, batch))
  own = getattr(model, 'decode_variables', None)
  variables = {'params': params} if own is None else jax.jit(own)(params)
  read = jax.jit(partial(model.apply, method='prefill'))
  decode = jax.jit(partial(model.apply, method='decode'))
  logits, cache = read(variables, tokens[:, :prompt], np.full(2, prompt, np.int32),
                       model.init_cache(2, config.model.max_len))
  found = [np.asarray(logits)]
  for t in range(prompt, length):
    logits, cache = decode(variables, tokens[:, t], cache)
    found.append(np.asarray(logits))
  return relative(full[:, prompt - 1:], np.stack(found, axis=1))


# Attention.

def check_kernels(setup: Setup) -> Iterator[Finding]:
  """Each implementation of attention that supports this device, with its gradients, against xla."""
  model = setup.run.config.model
  dtype = str(model.operand_dtype)
  head_dim, heads = int(getattr(model, 'H', 0) or 64), int(getattr(model, 'num_heads', 0) or 4)
  kv_heads = int(getattr(model, 'K', 0) or heads)
  length = LENGTH
  cases = [(window, segments) for window in sorted({0, *getattr(model, 'windows', (0,))}) for segments in (False, True)]
  for name in ATTENTION:
    if name == 'xla':
      continue
    limit = LOGITS if dtype == 'float32' else ROUNDED
    reason = why_not(name, AttentionCase(*local_device(), dtype, head_dim, length, segments=True))
    if reason:
      yield Finding(f'attention {name} and xla', None, limit, reason)
      continue

    def compare(name: str = name) -> float:
      return max(kernel_difference(name, dtype, (2, length, heads, kv_heads, head_dim), window, segments)
                 for window, segments in cases)

    yield guarded(f'attention {name} and xla, {dtype}', limit, compare)


def kernel_difference(name: str, dtype: str, sizes: tuple[int, ...], window: int, segments: bool) -> float:
  """The largest difference of outputs and gradients, relative to the largest value of each."""
  B, T, N, K, H = sizes
  rng = np.random.default_rng(2)
  q, k, v, out = (jnp.asarray(rng.normal(size=(B, T, heads, H)), dtype) for heads in (N, K, K, N))
  segment_ids = jnp.asarray(np.sort(rng.integers(1, 4, (B, T)), axis=1), jnp.int32) if segments else None

  def run(kernel: str) -> list[np.ndarray]:
    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
      return ATTENTION[kernel](q, k, v, window if window < T else 0, segment_ids, None)

    y, pull = jax.vjp(jax.jit(attend), q, k, v)
    return [np.asarray(x, np.float32) for x in (y, *pull(out.astype(y.dtype)))]

  return max(relative(a, b) for a, b in zip(run('xla'), run(name), strict=True))


def relative(a: Any, b: Any) -> float:
  """The largest difference, relative to the largest magnitude; NaN if either has one."""
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  return float(np.max(np.abs(a - b)) / max(np.max(np.abs(a)), 1e-30))
