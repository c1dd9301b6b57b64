"""Evaluates a trained run on a part of its data, on other data, or on tasks of a harness, and prints the results.

For a run trained on answers to prompts it also reports the shares of exact and of valid answers; for a classification
the confusion counts, as numbers and as a figure. With --tasks the results are a table, and JSON in a file; these tasks
are those of the package lm_eval (pip install 'llm_jax[lm-eval]').

  llm-jax evaluate runs/gpt_small
  llm-jax evaluate runs/gpt_small --data=other.txt --checkpoint=best
  llm-jax evaluate runs/gpt_small --tasks=arc_easy,hellaswag --limit=200
  llm-jax evaluate runs/gpt_small --mesh=fsdp=8
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from llm_jax.base import flags
from llm_jax.base.builder import known_names
from llm_jax.base.errors import ConfigError
from llm_jax.base.files import write_file, writing
from llm_jax.base.process import run_as_program, waiting
from llm_jax.infer.harness import HARNESSES, TaskOptions


def parser() -> flags.Parser:
  parser = flags.Parser('evaluate', __doc__)
  flags.add_run(parser)
  flags.add_mesh(parser)
  parser.add_argument('--data', help="a file, folder, glob or .bin to evaluate on (default: a part of the run's data)")
  parser.add_argument('--split', choices=('val', 'test'), default='val', help="the part of the run's data")
  parser.add_argument('--answers', type=int, help='number of prompts to answer (default: all)')
  parser.add_argument('--num_beams', type=int, help='beams for answers (default: config.eval.num_beams)')
  parser.add_argument('--validator', help='validator of answers (default: config.eval.validator)')
  parser.add_argument('--tasks', default='', help='tasks of the harness instead, separated by commas')
  parser.add_argument('--include_path', default='', metavar='FOLDER', help='with --tasks: a folder of further tasks')
  parser.add_argument('--num_fewshot', type=int, help="with --tasks: examples before a question (default: the task's)")
  parser.add_argument('--limit', type=int, help='with --tasks: documents of each task (default: all)')
  parser.add_argument('--harness', default='lm_eval', help='with --tasks: what runs them')
  parser.add_argument('--out', type=Path, help='JSON file to write (default: evaluation.json in the workdir, with '
                      '--tasks evaluation_tasks.json)')
  flags.add(parser)
  return parser


def main(argv: list[str]) -> None:
  args = parser().parse(argv)
  check_flags(args)
  flags.apply(args)
  from llm_jax import api
  from llm_jax.base.multihost import is_first
  if args.tasks and args.harness not in HARNESSES:
    raise ConfigError(f'--harness: {args.harness!r} is not known here; {known_names(args.harness, HARNESSES)}')
  trained = api.load(args.workdir, args.checkpoint, trust=args.trust, mesh=args.mesh)
  if args.tasks:
    evaluate_on_tasks(trained, args)
    return
  waiting('reading data, compiling and evaluating')
  results, tables, answers = trained.evaluate(args.split, args.data, num_answers=args.answers, num_beams=args.num_beams,
                                              validator=args.validator)
  report = {'workdir': str(args.workdir), 'step': trained.run.meta['step'],
            'data': args.data or {'val': 'validation part', 'test': 'test part'}[args.split], **results}
  print(json.dumps(report, indent=2))
  out = args.out or args.workdir / 'evaluation.json'
  for name, confusion in tables.items():
    report |= trained.config.loss.sections[name].report(confusion)
  if not is_first():
    return
  files = {out: json.dumps(report, indent=2) + '\n'}
  if answers:
    files[out.with_name('answers.jsonl')] = ''.join(json.dumps(a._asdict(), ensure_ascii=False) + '\n' for a in answers)
  for path, content in files.items():
    with writing(f'--out: {path}'):
      write_file(path, content)
  for name, confusion in tables.items():
    trained.config.loss.sections[name].draw(confusion, out.parent)


def check_flags(args: argparse.Namespace) -> None:
  """Raises ConfigError for flags that have no effect together, or have no possible value."""
  without, others = ('include_path', 'num_fewshot', 'limit'), ('data', 'answers', 'num_beams', 'validator')
  if args.tasks and (given := [f'--{name}' for name in others if getattr(args, name) is not None]):
    raise ConfigError(f'--tasks: has data of its own; leave out {", ".join(given)}')
  if not args.tasks and (given := [f'--{name}' for name in without if getattr(args, name) not in (None, '')]):
    raise ConfigError(f'{", ".join(given)}: has an effect only with --tasks; set --tasks=arc_easy, for example')
  if (args.limit is not None and args.limit < 1) or (args.num_fewshot is not None and args.num_fewshot < 0):
    raise ConfigError(f'--limit must be at least 1, and --num_fewshot not negative; got {args.limit} and '
                      f'{args.num_fewshot}')


def evaluate_on_tasks(trained: Any, args: argparse.Namespace) -> None:
  """Prints the results of a harness as a table and writes them as JSON. Raises UserErrors."""
  from llm_jax.base.multihost import is_first
  waiting('reading tasks, compiling and evaluating')
  tasks = tuple(dict.fromkeys(name.strip() for name in args.tasks.split(',') if name.strip()))
  report = HARNESSES[args.harness](trained, TaskOptions(tasks, args.include_path, args.num_fewshot, args.limit))
  print(report.table)
  out = args.out or args.workdir / 'evaluation_tasks.json'
  values = {'workdir': str(args.workdir), 'step': trained.run.meta['step'], 'results': report.results,
            'limit': args.limit, **report.details}
  if is_first():
    with writing(f'--out: {out}'):
      write_file(out, json.dumps(values, indent=2) + '\n')


if __name__ == '__main__':
  run_as_program(main)
