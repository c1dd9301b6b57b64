"""Evaluates a trained run on a part of its data, or on other data, and prints the results as JSON.

For a run trained on answers to prompts it also reports the shares of exact and of valid answers; for a classification
the confusion counts, as numbers and as a figure.

  llm-jax evaluate runs/gpt_small
  llm-jax evaluate runs/gpt_small --data=other.txt --checkpoint=best
"""

from __future__ import annotations

import json
from pathlib import Path

from llm_jax.base import flags
from llm_jax.base.files import write_file, writing
from llm_jax.base.process import run_as_program, waiting


def parser() -> flags.Parser:
  parser = flags.Parser('evaluate', __doc__)
  flags.add_run(parser)
  parser.add_argument('--data', help="a file, folder, glob or .bin to evaluate on (default: a part of the run's data)")
  parser.add_argument('--split', choices=('val', 'test'), default='val', help="the part of the run's data")
  parser.add_argument('--answers', type=int, help='number of prompts to answer (default: all)')
  parser.add_argument('--num_beams', type=int, help='beams for answers (default: config.eval.num_beams)')
  parser.add_argument('--validator', help='validator of answers (default: config.eval.validator)')
  parser.add_argument('--out', type=Path, help='JSON file to write (default: evaluation.json in the workdir)')
  flags.add(parser)
  return parser


def main(argv: list[str]) -> None:
  args = parser().parse(argv)
  flags.apply(args)
  from llm_jax import api
  trained = api.load(args.workdir, args.checkpoint, trust=args.trust)
  waiting('reading data, compiling and evaluating')
  results, tables, answers = trained.evaluate(args.split, args.data, num_answers=args.answers, num_beams=args.num_beams,
                                              validator=args.validator)
  report = {'workdir': str(args.workdir), 'step': trained.run.meta['step'],
            'data': args.data or {'val': 'validation part', 'test': 'test part'}[args.split], **results}
  print(json.dumps(report, indent=2))
  out = args.out or args.workdir / 'evaluation.json'
  for name, confusion in tables.items():
    report |= trained.config.loss.sections[name].report(confusion)
  files = {out: json.dumps(report, indent=2) + '\n'}
  if answers:
    files[out.with_name('answers.jsonl')] = ''.join(json.dumps(a._asdict(), ensure_ascii=False) + '\n' for a in answers)
  for path, content in files.items():
    with writing(f'--out: {path}'):
      write_file(path, content)
  for name, confusion in tables.items():
    trained.config.loss.sections[name].draw(confusion, out.parent)


if __name__ == '__main__':
  run_as_program(main)
