"""Evaluates a trained run: llm-jax evaluate --workdir=runs/gpt_small [--data=FILE, FOLDER, GLOB or .bin]

For a run trained on answers to prompts it also reports the shares of exact and of valid answers; for a classification
the confusion counts, as numbers and as a figure.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from llm_jax.base import flags
from llm_jax.base.errors import StorageError
from llm_jax.base.files import write_file, write_picture
from llm_jax.base.process import run_as_program


def main(argv: list[str]) -> None:
  parser = argparse.ArgumentParser(prog='llm-jax evaluate', allow_abbrev=False, description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--workdir', type=Path, required=True)
  parser.add_argument('--data', help='other data to evaluate on (default: a part of the run\'s data)')
  parser.add_argument('--split', choices=('val', 'test'), default='val', help='the part of the run\'s data')
  parser.add_argument('--checkpoint', default='latest', help='latest, best, or a step')
  parser.add_argument('--answers', type=int, help='number of prompts to answer (default: all)')
  parser.add_argument('--num_beams', type=int, help='beams for answers (default: config.eval.num_beams)')
  parser.add_argument('--validator', help='validator of answers (default: config.eval.validator)')
  parser.add_argument('--out', type=Path, help='JSON file to write (default: evaluation.json in the workdir)')
  flags.add(parser)
  args = parser.parse_args(argv)

  flags.apply(args)
  from llm_jax import api
  trained = api.load(args.workdir, args.checkpoint, trust=args.trust)
  results, tables, answers = trained.evaluate(args.split, args.data, num_answers=args.answers, num_beams=args.num_beams,
                                              validator=args.validator)
  report = {'workdir': str(args.workdir), 'step': trained.run.meta['step'],
            'data': args.data or {'val': 'validation part', 'test': 'test part'}[args.split], **results}
  print(json.dumps(report, indent=2))
  out = args.out or args.workdir / 'evaluation.json'
  for name, counts in tables.items():
    classes = getattr(trained.config.loss.sections[name], 'classes', None) or tuple(map(str, range(len(counts))))
    report |= {'confusion': counts.astype(int).tolist(), 'classes': classes}
  files = {out: json.dumps(report, indent=2) + '\n'}
  if answers:
    files[out.with_name('answers.jsonl')] = ''.join(json.dumps(a._asdict(), ensure_ascii=False) + '\n' for a in answers)
  for path, content in files.items():
    try:
      write_file(path, content)
    except OSError as e:
      raise StorageError(f'--out: {path} cannot be written: {e.strerror}') from None

  for counts in tables.values():
    draw_confusion(counts, classes, out.with_name('confusion.png'))


def draw_confusion(counts: np.ndarray, classes: tuple[str, ...], out: Path) -> None:
  """Draws the confusion matrix: true classes in rows, normalized per row. Does nothing without matplotlib."""
  try:
    import matplotlib
  except ImportError:
    return
  matplotlib.use('agg')
  from matplotlib import pyplot
  few = len(classes) <= 40
  size = 3 + 0.3 * len(classes) if few else 15
  figure, axis = pyplot.subplots(figsize=(size, size), layout='constrained')
  axis.imshow(counts / np.maximum(counts.sum(1, keepdims=True), 1), cmap='Blues', vmin=0, vmax=1)
  if few:
    for (row, column), count in np.ndenumerate(counts):
      if count:
        axis.text(column, row, f'{count:.0f}', ha='center', va='center', fontsize=6)
    axis.set_xticks(range(len(classes)), classes, rotation=90)
    axis.set_yticks(range(len(classes)), classes)
  axis.set(xlabel='predicted class', ylabel='true class')
  try:
    write_picture(out, figure)
  except (OSError, ValueError) as e:
    raise StorageError(f'--out: {out} cannot be written: {e}') from None


if __name__ == '__main__':
  run_as_program(main)
