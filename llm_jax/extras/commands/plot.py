"""Plots metrics of one run, or of several to compare.

Trials of a sweep that differ only in their seed have the same colour.

  llm-jax plot runs/gpt_small --out=loss.png
  llm-jax plot runs/gpt_small runs/other --metric val/loss --log_x
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from llm_jax.base import flags
from llm_jax.base.errors import ConfigError
from llm_jax.base.files import check_run
from llm_jax.base.process import run_as_program
from llm_jax.extras.figures import load_pyplot, write_picture


def parser() -> flags.Parser:
  parser = flags.Parser('plot', __doc__)
  flags.add_workdir(parser, 'one run, or several to compare',
                    lambda text: check_run(Path(text), file='metrics.jsonl'), several=True)
  parser.add_argument('--metric', nargs='+', metavar='NAME', default=['train/loss', 'val/loss'],
                      help='names of metrics in metrics.jsonl')
  parser.add_argument('--log_x', action='store_true', help='logarithmic axis for steps')
  parser.add_argument('--out', type=Path, default=Path('loss.png'), help='PNG file to write')
  return parser


def main(argv: list[str]) -> None:
  args = parser().parse(argv)
  plt = load_pyplot('llm-jax plot')
  from llm_jax.training.log import read_metrics

  figure, axes = plt.subplots(figsize=(7, 4), layout='constrained')
  known: set[str] = set()
  colours: dict[str, Any] = {}
  for workdir in args.workdir:
    lines = read_metrics(workdir / 'metrics.jsonl')
    known = known.union(*lines)
    for name in args.metric:
      points = [(line['step'], line[name]) for line in lines if name in line]
      if points:
        kind = re.sub(r'^\d{3}_|,seed=\d+$', '', workdir.name)  # see sweep.name_of
        label = name if len(args.workdir) == 1 else kind if len(args.metric) == 1 else f'{kind}: {name}'
        [line] = axes.plot(*zip(*points, strict=True), label='' if label in colours else label,
                           color=colours.get(label), marker='o' if len(points) < 30 else None, markersize=4)
        colours.setdefault(label, line.get_color())
  if not axes.lines:
    raise ConfigError(f'--metric: no values of {", ".join(args.metric)}; known: {", ".join(sorted(known))}')
  axes.set(xlabel='step', ylabel=args.metric[0] if len(args.metric) == 1 else 'nats per token'
           if all(name.endswith('/loss') for name in args.metric) else '')
  if args.log_x:
    axes.set_xscale('log')
  axes.grid(alpha=0.3)
  if len(args.workdir) == 1:
    axes.legend()
  else:
    figure.legend(loc='outside upper center')
  write_picture(args.out, figure)
  print(f'wrote {args.out}')


if __name__ == '__main__':
  run_as_program(main)
