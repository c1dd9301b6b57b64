"""Finds where a step first has a number that is not finite: which parameter, module, layer or gradient.

The steps from the checkpoint before it are trained again, in memory, with the same bits; then forward and backward
pass of its batch run operation by operation, and every module's output and gradient is checked.

  llm-jax debug-nan runs/gpt_small --step=1234
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llm_jax.base import flags
from llm_jax.base.errors import ConfigError
from llm_jax.base.process import run_as_program, waiting


def parser() -> flags.Parser:
  parser = flags.Parser('debug-nan', __doc__)
  flags.add_workdir(parser, 'folder of a run', flags.run_folder)
  parser.add_argument('--step', type=int, required=True, help='the step to examine, as in the warning of the run')
  flags.add(parser)
  return parser


def main(argv: list[str]) -> None:
  args = parser().parse(argv)
  flags.apply(args)

  from llm_jax.base.sharding import make_mesh, use_mesh
  from llm_jax.infer.load import read_config
  config = read_config(args.workdir, args.trust)
  if not 1 <= args.step <= config.num_steps:
    raise ConfigError(f'--step: must be from 1 to num_steps, {config.num_steps}; got {args.step}')
  mesh = make_mesh(config.mesh)
  with use_mesh(mesh, config.mesh):
    program, state, batch = replay(config, args.workdir, args.step, mesh)
    waiting(f'step {args.step}: running forward and backward pass operation by operation')
    for line in findings(program, state, batch):
      print(line, flush=True)


def replay(config: Any, workdir: Path, step: int, mesh: Any) -> tuple[Any, Any, Any]:
  """(program, state before `step`, batch of `step`). Raises UserErrors."""
  from llm_jax.base.batch import as_batch
  from llm_jax.training import loop
  from llm_jax.training.checkpoint import Checkpoints
  from llm_jax.training.custom import Custom, with_custom
  from llm_jax.training.program import build_program
  from llm_jax.training.resume import first_state, restore
  from llm_jax.training.rewind import gaps_of
  from llm_jax.training.stages import make_stages
  custom = Custom()
  config, state, meta = with_custom(config, custom), None, dict[str, Any]()
  with Checkpoints(workdir / 'checkpoints', config.checkpoint, read_only=True) as checkpoints:
    saved = max((n for n in checkpoints.steps() if n < step), default=0)
    for stage in make_stages(config, gaps_of(workdir)):
      if stage.end <= saved:
        continue
      program = build_program(stage, workdir, mesh, custom)
      if state is None and saved:
        state, meta = restore(program, checkpoints, lambda meta: None, saved)
      elif state is None:
        with Checkpoints(workdir / 'none', config.checkpoint, read_only=True) as none:
          state, meta = first_state(program, none, mesh)
      begin, end = int(state.step), min(step, stage.end)
      waiting(f'training steps {begin + 1} to {end} again, from ' + (f'checkpoint {saved}' if saved else 'the start'))
      batches = loop.open_own_batches(program, custom, begin, meta.pop('stream_states', None))
      for n in range(begin + 1, end + 1):
        batch = as_batch(next(batches))
        if n == step:
          return program, state, batch
        state, _ = program.step(state, batch, program.constants)
  raise ConfigError(f'--step: the run has no step {step}')


class Found(NamedTuple):
  """A tensor that was checked."""

  name: str
  what: str  # 'output' or 'gradient of the output'
  shape: tuple[int, ...]
  bad: int  # numbers that are not finite

  def __str__(self) -> str:
    return f'{self.what} of {self.name} {list(self.shape)}: {self.bad} of {count(self.shape)} numbers are not finite'


def findings(program: Any, state: Any, batch: Any) -> Iterator[str]:
  """Lines on what is not finite, the cause first; at the end loss and gradient norm."""
  import jax.numpy as jnp

  from llm_jax.base.trees import by_name
  features = {name: x for name, x in vars(batch).items() if x is not None}
  for what, arrays in (('parameter', by_name(state.params)), ('batch', features)):
    for name, x in arrays.items():
      if (bad := not_finite(x)):
        yield f'{what} {name} {list(jnp.shape(x))}: {bad} of {count(jnp.shape(x))} numbers are not finite'
  grads, metrics, checked = checked_gradients(program, state, batch)
  for what, cause in (('forward', 'inside this module, or in its parameters above'),
                      ('backward', 'in the backward pass of what uses this output')):
    of_pass = [found for found in checked if (found.what == 'output') == (what == 'forward')]
    if first := next((found for found in of_pass if found.bad), None):
      before = [found.name for found in of_pass[:of_pass.index(first)]][-1:]
      yield f'first in the {what} pass: {first}; cause: {cause}' + (f'; finite before: {before[0]}' if before else '')
  wrong = {name: bad for name, x in by_name(grads).items() if (bad := not_finite(x))}
  for name, bad in list(wrong.items())[:8]:
    yield f'gradient of parameter {name}: {bad} numbers are not finite'
  if len(wrong) > 8:
    yield f'gradients of {len(wrong) - 8} more parameters are not finite'
  norms = {name: float(jnp.linalg.norm(x.astype(jnp.float32))) for name, x in by_name(grads).items()}
  largest = max(norms, key=lambda name: float('inf') if norms[name] != norms[name] else norms[name])
  yield (f'loss {float(metrics["loss"]):.4g}, extra loss {float(metrics["extra_loss"]):.4g}, gradient norm '
         f'{sum(norm**2 for norm in norms.values())**0.5:.4g}, largest in {largest} ({norms[largest]:.4g})')
  if not wrong and not any(found.bad for found in checked):
    yield 'all outputs and gradients of this step are finite'


def checked_gradients(program: Any, state: Any, batch: Any) -> tuple[Any, Mapping[str, Any], list[Found]]:
  """(gradients, metrics, all module outputs and their gradients in the order of computation)."""
  import dataclasses

  import flax.linen as nn
  import jax

  from llm_jax.models.registry import make_model
  from llm_jax.training.state import gradients
  config, checked, roots = program.config, list[Found](), list[str]()
  model, calls = program.model, dict[str, int]()
  if hasattr(config.model, 'remat'):  # with which values could not be seen
    model = make_model(dataclasses.replace(config.model, remat='none'), program.objective.heads,
                       program.objective.num_weights)
  num_layers = getattr(config.model, 'num_layers', 1)

  def watch(next_fn: Any, args: Any, kwargs: Any, context: Any) -> Any:
    module, path = context.module, context.module.path
    if context.method_name != '__call__':
      return next_fn(*args, **kwargs)
    if not path:  # a block of a stack, which is a root of its own
      roots.append(type(module).__name__ + '[{}]')
    name = '/'.join((*roots[-1:], *path)) + f' ({type(module).__name__})'
    result = next_fn(*args, **kwargs)
    if not path:
      roots.pop()
    leaves, tree = jax.tree.flatten(result)
    return jax.tree.unflatten(tree, [probe(f'{name}, output {i}' if i else name, checked, calls, num_layers, x)
                                     for i, x in enumerate(leaves)])

  # Without jit, a scan over layers or microbatches is a Python loop, and all values are known at once.
  with jax.disable_jit(), nn.intercept_methods(watch):
    grads, metrics = gradients(state, batch, model=model, seed=config.seed, objective=program.objective,
                               num_microbatches=program.num_microbatches, constants=program.constants)
  return grads, metrics, checked


def probe(name: str, checked: list[Found], calls: dict[str, int], num_layers: int, x: Any) -> Any:
  """x; notes whether it is finite, and its gradient in the backward pass. `calls`: the calls of each name so far."""
  import jax
  import jax.numpy as jnp
  if not isinstance(x, jax.Array) or not jnp.issubdtype(x.dtype, jnp.floating):
    return x

  @jax.custom_vjp
  def identity(x: Any) -> Any:
    return forward(x)[0]

  def forward(x: Any) -> tuple[Any, jax.Array]:
    if not isinstance(x, jax.core.Tracer):  # Flax also evaluates shapes, abstractly
      calls[name] = calls.get(name, -1) + 1
      checked.append(Found(name.format(calls[name] % num_layers), 'output', x.shape, not_finite(x)))
    return x, jnp.asarray(calls.get(name, 0))

  def backward(call: jax.Array, gradient: Any) -> tuple[Any]:
    if not isinstance(gradient, jax.core.Tracer):
      found = name.format(int(call) % num_layers)
      checked.append(Found(found, 'gradient of the output', gradient.shape, not_finite(gradient)))
    return (gradient,)

  identity.defvjp(forward, backward)
  return identity(x)


def not_finite(x: Any) -> int:
  """How many numbers are NaN or infinite."""
  import jax.numpy as jnp
  x = jnp.asarray(x)
  return int(jnp.sum(~jnp.isfinite(x))) if jnp.issubdtype(x.dtype, jnp.floating) else 0


def count(shape: tuple[int, ...]) -> int:
  import math
  return math.prod(shape)


if __name__ == '__main__':
  run_as_program(main)
