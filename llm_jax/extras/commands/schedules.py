"""Plots a config's learning rate over the steps, or that of several configs.

Marks stages, and phases of Grokfast that begin at given steps. --config.FIELD=VALUE sets fields as in training.

  llm-jax schedules --config=gpt_small --out=rate.png
  llm-jax schedules --config=gpt_small --config=bitnet --config.num_steps=1000
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_jax.base import flags, plugins
from llm_jax.base.errors import ConfigError
from llm_jax.base.process import run_as_program
from llm_jax.extras.figures import load_pyplot, write_picture

if TYPE_CHECKING:
  import numpy as np

POINTS = 2000  # maximum number of points of a curve


def parser() -> flags.Parser:
  parser = flags.Parser('schedules', __doc__, fields='llm_jax.config:Config')
  parser.add_argument('--config', type=Path, metavar='FILE', action='append', required=True,
                      help='may be repeated to compare configs')
  parser.add_argument('--out', type=Path, default=Path('schedules.png'), help='PNG file to write')
  parser.add_argument('--full_size', action='store_true', help="without an accelerator, ignore the config's on_cpu")
  plugins.add_flags(parser, trust=False)
  return parser


def main(argv: list[str]) -> None:
  args = parser().parse(argv)
  plugins.load_all(args.plugin)
  plt = load_pyplot('llm-jax schedules')
  from llm_jax import api
  figure, axes = plt.subplots(figsize=(7, 4), layout='constrained')
  for path in args.config:
    config = api.load_config(path, full_size=args.full_size, **args.overrides)
    if config.num_epochs:
      raise ConfigError(f'config.num_epochs: the number of steps in {config.num_epochs:g} epochs depends on the data; '
                        'set --config.num_epochs=0 --config.num_steps=...')
    steps, rates = curve(config)
    [line] = axes.plot(steps, rates, label=f'{path.stem}: {config.optim.schedule}')
    for step, name in marks(config):
      axes.axvline(step, color=line.get_color(), linestyle=':', linewidth=1)
      axes.annotate(name, (step, max(rates)), rotation=90, va='top', ha='right', fontsize=7)
    print(f'{path}: {config.optim.schedule}, {config.num_steps} steps, first {rates[0]:.3g}, maximum '
          f'{max(rates):.3g}, last {rates[-1]:.3g}')
  axes.set(xlabel='step', ylabel='learning rate')
  axes.grid(alpha=0.3)
  axes.legend()
  write_picture(args.out, figure)
  print(f'wrote {args.out}', file=sys.stderr)


def curve(config: Any) -> tuple[np.ndarray, np.ndarray]:
  """(steps, learning rates) at evenly spaced steps, including the first and the last."""
  import jax
  import numpy as np
  steps = np.unique(np.linspace(0, config.num_steps - 1, POINTS).astype(int))
  schedule = config.optim.make_schedule(config.num_steps)
  return steps, np.asarray(jax.jit(jax.vmap(schedule))(steps))


def marks(config: Any) -> list[tuple[int, str]]:
  """(step, name) of each stage and phase that begins at a given step."""
  found = [(stage.begin, name) for name, stage in config.stages.items()]
  for name in {'grokfast_ema', 'grokfast_ma'} & set(config.optim.chain):
    link = config.optim.sections[name]
    found += [(end, f'{name} x {link.lamb * factor:g}') for end, factor in zip(link.ends, link.phases[1:], strict=False)
              if isinstance(end, int)]
  return found


if __name__ == '__main__':
  run_as_program(main)
