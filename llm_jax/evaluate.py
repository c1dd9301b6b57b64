"""Evaluates a trained run: python -m llm_jax.evaluate --workdir=runs/gpt_small [--data=FILE, FOLDER, GLOB or .bin]

Of a run that learnt answers to prompts it also gives the answers that are right to the token, and those that are valid;
of one that learnt classes what was taken for what, as numbers and as a picture.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np

from llm_jax import runtime
from llm_jax.errors import ConfigError, StorageError
from llm_jax.main import run_as_program
from llm_jax.validators import make_validator


def main(argv: list[str]) -> None:
  parser = argparse.ArgumentParser(prog='python -m llm_jax.evaluate', allow_abbrev=False, description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--workdir', type=Path, required=True)
  parser.add_argument('--data', help='what to evaluate on, all of it; without it, a part of the run\'s data')
  parser.add_argument('--split', choices=('val', 'test'), default='val', help='which part of the run\'s data')
  parser.add_argument('--checkpoint', default='latest', help='latest, best, or a step')
  parser.add_argument('--answers', type=int, help='how many pairs to answer (default: all)')
  parser.add_argument('--num_beams', type=int, help='of an answer (default: config.eval.num_beams)')
  parser.add_argument('--validator', help='of answers (default: config.eval.validator)')
  parser.add_argument('--out', type=Path, help='the JSON file (default: evaluation.json in the workdir)')
  runtime.add_flag(parser)
  args = parser.parse_args(argv)

  if (args.answers or 0) < 0 or (1 if args.num_beams is None else args.num_beams) < 1:
    raise ConfigError(f'--answers must not be negative, --num_beams at least 1; got {args.answers}, {args.num_beams}')
  make_validator(args.validator or '')  # told now, not after the whole loss

  runtime.prepare(args.tuning == 'on')
  import jax

  from llm_jax.answers import summarize_answers
  from llm_jax.assemble import answer_stores, load_run, make_evaluator, own_data, renamed_labels
  from llm_jax.completion import check_classes
  from llm_jax.data import tokenize
  from llm_jax.sharding import MeshConfig, make_mesh

  mesh = make_mesh(MeshConfig())
  with jax.set_mesh(mesh):
    run = load_run(args.workdir, mesh, args.checkpoint)
    if args.data is not None:
      data = tokenize(args.data, run.config.data, run.tokenizer, run.encoder_tokenizer)
      data = renamed_labels(data, run.config.loss.classification.classes)
      check_classes(run.config, data)
    else:
      data = own_data(run)
    if data.vocab_size > run.config.model.vocab_size:
      raise ConfigError(f'--data: token {data.vocab_size - 1} is outside the model\'s vocabulary of '
                        f'{run.config.model.vocab_size}')
    stores = data.splits[args.split if args.data is None else 'val']
    if not stores:
      raise ConfigError(f'--split: the run has no {args.split} part; it is set by config.data.{args.split}_fraction, '
                        f'{args.split}_documents or {args.split}_path')
    own = run.config.eval
    config = dataclasses.replace(run.config, eval=dataclasses.replace(
        own, answers=0, validator=own.validator if args.validator is None else args.validator,
        num_beams=own.num_beams if args.num_beams is None else args.num_beams))
    (results, tables), answers = make_evaluator(config, data, run.model, mesh)(run.params, stores, None), []
    if config.answers and data.tokenizer is not None and args.answers != 0:
      answers = answer_stores(config, data, run.model, run.params, stores, args.answers)
      results |= summarize_answers(answers)
  report = {'workdir': str(args.workdir), 'step': run.meta['step'],
            'data': args.data or {'val': 'validation part', 'test': 'test part'}[args.split], **results}
  print(json.dumps(report, indent=2))
  out = args.out or args.workdir / 'evaluation.json'
  for counts in tables.values():
    classes = run.config.loss.classification.classes or tuple(map(str, range(len(counts))))
    report |= {'confusion': counts.astype(int).tolist(), 'classes': classes}
  files = {out: json.dumps(report, indent=2) + '\n'}
  if answers:
    files[out.with_name('answers.jsonl')] = ''.join(json.dumps(a._asdict(), ensure_ascii=False) + '\n' for a in answers)
  for path, content in files.items():
    try:
      path.write_text(content)
    except OSError as e:
      raise StorageError(f'--out: {path} cannot be written: {e.strerror}') from None

  for counts in tables.values():
    draw_confusion(counts, classes, out.with_name('confusion.png'))


def draw_confusion(counts: np.ndarray, classes: tuple[str, ...], out: Path) -> None:
  """A picture of what (down) was taken for what, each row in shares of itself; nothing where matplotlib is not."""
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
  axis.set(xlabel='taken for', ylabel='is')
  try:
    figure.savefig(out, dpi=120)
  except (OSError, ValueError) as e:
    raise StorageError(f'--out: {out} cannot be written: {e}') from None


if __name__ == '__main__':
  run_as_program(main)
