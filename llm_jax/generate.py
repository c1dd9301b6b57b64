"""Writes text with a trained run: python -m llm_jax.generate --workdir=runs/gpt_small --prompt='def main('"""

from __future__ import annotations

import argparse
import codecs
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from llm_jax import runtime
from llm_jax.errors import ConfigError
from llm_jax.main import run_as_program


def main(argv: list[str]) -> None:
  parser = argparse.ArgumentParser(prog='python -m llm_jax.generate', allow_abbrev=False, description=__doc__)
  parser.add_argument('--workdir', type=Path, required=True)
  parser.add_argument('--prompt', default='', help='the text to go on from; without one a new document begins')
  parser.add_argument('--num_samples', type=int, default=1)
  parser.add_argument('--num_tokens', type=int, default=256, help='at most; a sample also ends with its document')
  parser.add_argument('--temperature', type=float, default=0.8, help='0: always the likeliest token')
  parser.add_argument('--top_k', type=int, default=0, help='only among the k likeliest; 0: all')
  parser.add_argument('--top_p', type=float, default=1.0, help='only among the likeliest that hold this probability')
  parser.add_argument('--num_beams', type=int, default=0, help='search for a likely text with so many hypotheses, '
                      'instead of sampling')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--checkpoint', default='latest', help='latest, best, or a step')
  runtime.add_flag(parser)
  args = parser.parse_args(argv)
  for bad, message in ((args.num_samples < 1, '--num_samples must be at least 1'),
                       (args.num_tokens < 1, '--num_tokens must be at least 1'),
                       (args.temperature < 0, '--temperature must not be negative'),
                       (args.num_beams < 0, '--num_beams must not be negative'),
                       (args.num_beams and args.num_samples > 1, '--num_beams finds one text; leave out --num_samples'),
                       (args.top_k < 0, '--top_k must not be negative'),
                       (not 0 < args.top_p <= 1, '--top_p must lie in (0, 1]')):
    if bad:
      raise ConfigError(message)

  runtime.prepare(args.tuning == 'on')
  import jax

  from llm_jax.assemble import load_run, prompt_ids
  from llm_jax.sampling import beam_search, generate
  from llm_jax.sharding import MeshConfig, make_mesh

  mesh = make_mesh(MeshConfig())
  with jax.set_mesh(mesh):
    run = load_run(args.workdir, mesh, args.checkpoint)
    if run.tokenizer is None or run.prompt_tokenizer is None:
      raise ConfigError(f'--workdir: {args.workdir} was trained on ids without a tokenizer, so there is no text to '
                        'read or write')
    if not run.config.writes:
      raise ConfigError(f'--workdir: {args.workdir} has not learnt to write (config.data.task={run.config.data.task}, '
                        f'config.loss.terms={", ".join(run.config.loss.terms)}); see python -m llm_jax.predict')
    [prompt] = prompt_ids(run.config, run.prompt_tokenizer, [args.prompt])
    longest = run.config.model.longest_prompt
    if len(prompt) > longest:
      raise ConfigError(f'--prompt: {len(prompt)} tokens, and {longest} are the most that the model was made for; '
                        'shorten it')
    options = {'max_len': run.config.model.max_len, 'num_tokens': args.num_tokens,
               'num_ids': len(run.tokenizer.token_bytes)}
    columns: Iterable[np.ndarray]
    if args.num_beams:
      columns = beam_search(run.model, run.params, [prompt], eos_id=run.tokenizer.eos_id, num_beams=args.num_beams,
                            **options).T
    else:
      columns = generate(run.model, run.params, [prompt] * args.num_samples, seed=args.seed,
                         temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, **options)
    print_samples(args.prompt if run.model.prompt_in_row else '', columns, run.tokenizer,
                  1 if args.num_beams else args.num_samples)


def print_samples(prompt: str, columns, tokenizer, num_samples: int) -> None:
  """Shows the first sample while it grows, then the others."""
  rows: list[list[int]] = [[] for _ in range(num_samples)]
  ended = [False] * num_samples
  decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')  # holds back half a character
  show(prompt)
  for column in columns:
    for i, token in enumerate(column.tolist()):
      ended[i] = ended[i] or token == tokenizer.eos_id
      if not ended[i]:
        rows[i].append(token)
        if i == 0:
          show(decoder.decode(tokenizer.token_bytes[token]))
    if all(ended):
      break
  show(decoder.decode(b'', final=True) + '\n')
  for i, row in enumerate(rows[1:], start=2):
    text = b''.join(tokenizer.token_bytes[token] for token in row).decode(errors='replace')
    show(f'\n--- sample {i} of {num_samples} ---\n{prompt}{text}\n')


def show(text: str) -> None:
  sys.stdout.write(text)
  sys.stdout.flush()


if __name__ == '__main__':
  run_as_program(main)
