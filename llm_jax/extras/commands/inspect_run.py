"""Prints and plots a run's parameters, and its weights and activations by layer.

For a model with thinking steps it also reports the effect of each step.

  llm-jax inspect runs/gpt_small --out=layers.png
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from llm_jax.base import flags
from llm_jax.base.errors import ConfigError
from llm_jax.base.files import write_file, writing
from llm_jax.base.process import run_as_program, waiting
from llm_jax.extras.figures import load_pyplot, write_picture

DORMANT = 0.01  # thinking is dormant if no step moves the latent by this share of its norm
UNSTABLE = 1.0  # and unstable if a step moves it by more than this


def parser() -> flags.Parser:
  parser = flags.Parser('inspect', __doc__)
  flags.add_run(parser)
  flags.add_mesh(parser)
  parser.add_argument('--tokens', type=int, default=16_384, help='number of validation tokens for the losses by '
                      'thinking steps')
  parser.add_argument('--out', type=Path, help='figure to write; a .json file beside it has its numbers (default: '
                      'inspect.png in the workdir)')
  flags.add(parser)
  return parser


def main(argv: list[str]) -> None:
  args = parser().parse(argv)
  if args.tokens < 1:
    raise ConfigError(f'--tokens must be at least 1; got {args.tokens}')
  load_pyplot('llm-jax inspect')

  flags.apply(args)
  import jax
  import numpy as np

  from llm_jax.base.batch import Batch
  from llm_jax.base.multihost import in_turn, is_first
  from llm_jax.data import pipeline
  from llm_jax.data.open import open_data
  from llm_jax.infer.mesh import loaded_on_mesh
  from llm_jax.infer.score import make_evaluator
  from llm_jax.losses.config import make_objective
  from llm_jax.models.registry import make_model

  with loaded_on_mesh(args.workdir, args.checkpoint, args.mesh, trust=args.trust) as run:
    waiting('reading data and computing activations')
    data, objective = in_turn(lambda: open_data(run.config.data)), make_objective(run.config.loss)
    store = next(iter(data.val.values()))
    examples = pipeline.open_examples(run.config.data, data, store, train=False)
    features = next(pipeline.eval_batches(examples, 2, np.arange(2), None))
    report: dict[str, Any] = {'workdir': str(args.workdir), 'step': run.meta['step'], 'weights': weights(run.params)}
    batch = Batch(**{name: jax.numpy.asarray(x) for name, x in features.items()})
    def remade(**changes: Any) -> Any:
      return make_model(dataclasses.replace(run.config.model, **changes), objective.heads, objective.num_weights)
    # With remat, intermediate values could not be intercepted.
    whole = remade(remat='none') if hasattr(run.config.model, 'remat') else run.model
    report['activations'], sown = activations(whole, run.params, batch)
    if 'think' in sown:
      def losses(num_steps: int) -> float:
        model = remade(thinking_steps=num_steps, halting=run.config.model.halting and num_steps > 0)
        evaluate = make_evaluator(run.config, data, model, objective, run.mesh)
        return evaluate(run.params, data.val, args.tokens)[0]['loss']
      report['thinking'] = thinking(sown['think']['steps'][0], losses, run.config.model.thinking_steps)
  if not is_first():
    return
  print('\n'.join(lines(report)))
  out = args.out or args.workdir / 'inspect.png'
  with writing(f'--out: {out}'):
    write_file(out.with_suffix('.json'), json.dumps(report, indent=1) + '\n')
  draw_report(report, out)
  print(f'\nwritten: {out}, {out.with_suffix(".json")}')


def weights(params: Any) -> dict[str, dict]:
  """By path: shape, number of parameters, and rms and largest value of each layer (or of an unstacked parameter)."""
  import jax
  import numpy as np

  from llm_jax.base.multihost import on_host
  found = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = '/'.join(str(key.key) for key in path)
    stacked = name.startswith(('blocks/', 'encoder/', 'local/blocks/'))
    x = on_host(leaf).astype(np.float32).reshape(leaf.shape[0] if stacked else 1, -1)
    found[name] = {'shape': list(leaf.shape), 'parameters': int(leaf.size),
                   'rms': np.sqrt((x**2).mean(1)).tolist(), 'largest': np.abs(x).max(1).tolist()}
  return found


def activations(model: Any, params: Any, batch: Any) -> tuple[dict[str, dict], dict]:
  """(rms and largest output value of each module, per call; values that the model sowed into `intermediates`)."""
  import flax.linen as nn
  import jax
  import numpy as np

  from llm_jax.base.multihost import on_host
  found: dict[str, dict] = {}
  stack: list[str] = []

  def watch(next_fn: Any, args: Any, kwargs: Any, context: Any) -> Any:
    # The blocks of a stack are separate root modules, so their class is used as the path.
    is_block = context.method_name == '__call__' and not context.module.path
    stack.extend([type(context.module).__name__] * is_block)
    result = next_fn(*args, **kwargs)
    if is_block:
      stack.pop()
    first = result[0] if isinstance(result, tuple) else result
    path = context.module.path
    traced = isinstance(first, jax.core.Tracer)  # Flax also evaluates the shapes of parameters, abstractly
    if context.method_name == '__call__' and path and 'Dropout' not in path[-1] and not traced:
      x = on_host(first).astype(np.float32)
      entry = found.setdefault('/'.join((*stack[-1:], *path)), {'rms': [], 'largest': []})
      entry['rms'].append(float(np.sqrt((x**2).mean())))
      entry['largest'].append(float(np.abs(x).max()))
    return result

  # Without jit, the scan over layers is a Python loop, so that each layer's values can be intercepted.
  with jax.disable_jit(), nn.intercept_methods(watch):
    _, sown = model.apply({'params': params}, batch, method='readout', mutable=['intermediates', 'losses', 'metrics'])
  return found, jax.tree.map(on_host, sown.get('intermediates', {}))


def thinking(steps: dict, losses: Any, num_steps: int) -> dict:
  """How far each step moves the latent, the loss by number of steps, and a verdict."""
  import numpy as np
  moves = steps['move'].reshape(len(steps['move']), -1)
  gates = steps['gate'].reshape(len(steps['gate']), -1)
  by_steps = {n: losses(n) for n in range(num_steps + 3)}
  mean = moves.mean(1)
  finite = np.isfinite(moves).all() and np.isfinite(list(by_steps.values())).all()
  verdict = 'active'
  if not finite or mean.max() > UNSTABLE:
    verdict = 'unstable'
  elif mean.max() < DORMANT:
    verdict = 'dormant'
  return {'verdict': verdict, 'trained_with': num_steps, 'move': mean.tolist(), 'move_std': moves.std(1).tolist(),
          'gate': gates.mean(1).tolist(), 'gate_std': gates.std(1).tolist(),
          'loss': {str(n): loss for n, loss in by_steps.items()}}


def lines(report: dict) -> list[str]:
  """The report as text."""
  import numpy as np
  total = sum(w['parameters'] for w in report['weights'].values())
  text = [f'{report["workdir"]}, step {report["step"]}: {total:,} parameters', '',
          f'{"parameter":<32} {"shape":<22} {"number":>12} {"rms":>9} {"largest":>9}']
  text += [f'{name:<32} {" x ".join(map(str, w["shape"])):<22} {w["parameters"]:>12,} '
           f'{np.sqrt(np.square(w["rms"]).mean()):>9.4f} {max(w["largest"]):>9.4f}'
           for name, w in report['weights'].items()]
  text += ['', f'{"activation":<32} rms, call by call (layer by layer)']
  text += [f'{name:<32} ' + ' '.join(f'{rms:.3g}' for rms in a['rms'][:16]) + (' ...' if len(a['rms']) > 16 else '')
           for name, a in report['activations'].items()]
  if think := report.get('thinking'):
    text += ['', f'thinking: {think["verdict"]}; trained with {think["trained_with"]} step(s)',
             'step  moves the latent by  gate']
    columns = zip(think['move'], think['move_std'], think['gate'], think['gate_std'], strict=True)
    text += [f'{n:>4}  {move:>12.1%} ± {move_std:.1%}  {gate:.3f} ± {gate_std:.3f}'
             for n, (move, move_std, gate, gate_std) in enumerate(columns, 1)]
    text += ['', 'steps  val/loss'] + [f'{n:>5}  {loss:.4f}' for n, loss in think['loss'].items()]
  return text


def draw_report(report: dict, out: Path) -> None:
  think = report.get('thinking')
  figure, axes = load_pyplot('llm-jax inspect').subplots(
      2 if think else 1, 2, figsize=(12, 8 if think else 4), layout='constrained', squeeze=False)
  for axis, kind in zip(axes[0], ('weights', 'activations'), strict=True):
    for name, values in report[kind].items():
      if len(values['rms']) > 1:
        axis.plot(range(1, len(values['rms']) + 1), values['rms'], marker='.', label=name)
    axis.set(title=f'rms of {kind}', xlabel='layer', yscale='log')
    if axis.lines:
      axis.legend(fontsize=6, ncols=2)
  if think:
    steps = range(1, len(think['move']) + 1)
    axes[1, 0].errorbar(steps, think['move'], think['move_std'], marker='.', label='moves the latent by')
    axes[1, 0].errorbar(steps, think['gate'], think['gate_std'], marker='.', label='gate')
    axes[1, 0].set(title=f'thinking: {think["verdict"]}', xlabel='step', ylim=(0, None))
    axes[1, 0].legend()
    axes[1, 1].plot([int(n) for n in think['loss']], think['loss'].values(), marker='.')
    axes[1, 1].axvline(think['trained_with'], color='gray', linestyle=':', label='trained with')
    axes[1, 1].set(title='val/loss by number of steps', xlabel='steps', ylabel='nats a token')
    axes[1, 1].legend()
  figure.suptitle(f'{report["workdir"]}, step {report["step"]}')
  write_picture(out, figure)


if __name__ == '__main__':
  run_as_program(main)
