"""Evaluates a trained run: python -m llm_jax.evaluate --workdir=runs/gpt_small [--data=FILE, FOLDER, GLOB or .bin]"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from llm_jax import runtime
from llm_jax.errors import ConfigError, DataError, StorageError
from llm_jax.main import run_as_program


def main(argv: list[str]) -> None:
  parser = argparse.ArgumentParser(prog='python -m llm_jax.evaluate', allow_abbrev=False, description=__doc__)
  parser.add_argument('--workdir', type=Path, required=True)
  parser.add_argument('--data', help='what to evaluate on, all of it; without it, the validation part of the run')
  parser.add_argument('--checkpoint', default='latest', help='latest, best, or a step')
  parser.add_argument('--out', type=Path, help='the JSON file (default: evaluation.json in the workdir)')
  runtime.add_flag(parser)
  args = parser.parse_args(argv)

  runtime.prepare(args.tuning == 'on')
  import jax

  from llm_jax.assemble import load_run, make_evaluator
  from llm_jax.data import data_fingerprint, open_data, tokenize
  from llm_jax.sharding import MeshConfig, make_mesh

  mesh = make_mesh(MeshConfig())
  with jax.set_mesh(mesh):
    run = load_run(args.workdir, mesh, args.checkpoint)
    if args.data is not None:
      data = tokenize(args.data, run.config.data, run.tokenizer)
    else:
      data = open_data(run.config.data)
      if data_fingerprint(run.config.data, data, 0, 0)['train_tokens'] != run.meta['data']['train_tokens']:
        raise DataError(f'config.data.path: {run.config.data.path} is no longer what the run was trained on, so its '
                        'validation part cannot be told; name a file: --data=FILE')
    if data.vocab_size > run.config.model.vocab_size:
      raise ConfigError(f'--data: token {data.vocab_size - 1} is outside the model\'s vocabulary of '
                        f'{run.config.model.vocab_size}')
    results = make_evaluator(run.config, data, run.model, mesh)(run.params, data.val, None)
  report = {'workdir': str(args.workdir), 'step': run.meta['step'], 'data': args.data or 'validation part',
            **results}
  text = json.dumps(report, indent=2)
  print(text)
  out = args.out or args.workdir / 'evaluation.json'
  try:
    out.write_text(text + '\n')
  except OSError as e:
    raise StorageError(f'--out: {out} cannot be written: {e.strerror}') from None


if __name__ == '__main__':
  run_as_program(main)
