"""Checks on this machine what must not depend on the machine, with a run's own model, and prints a table.

The same loss on one device and on all of them (or on --mesh), with any number of microbatches; the same bits after a
save; decoding with a cache and the full forward pass; each attention kernel of this device and plain attention. It uses
rows of random tokens, so it needs no data, and writes nothing into the folder. The exit code is 70 if a check fails.

  llm-jax selfcheck runs/gpt_small
  llm-jax selfcheck runs/gpt_small --mesh=data=2,tensor=2
"""

from __future__ import annotations

import os

from llm_jax.base import flags
from llm_jax.base.errors import UserError
from llm_jax.base.process import run_as_program


class CheckFailed(UserError):
  """Results that differ by more than rounding."""

  exit_code = os.EX_SOFTWARE  # 70


def parser() -> flags.Parser:
  parser = flags.Parser('selfcheck', __doc__)
  flags.add_run(parser)
  parser.add_argument('--mesh', default='', help='devices by axis, as data=2,fsdp=2 (default: all that this process '
                      'has, along data)')
  flags.add(parser)
  return parser


def main(argv: list[str]) -> None:
  args = parser().parse(argv)
  flags.apply(args)
  import jax

  from llm_jax.base.sharding import MeshConfig, make_mesh
  from llm_jax.extras.selfcheck import check_run_on, parse_mesh
  from llm_jax.infer.load import load_run
  mesh_config = parse_mesh(args.mesh) if args.mesh else None
  single = make_mesh(MeshConfig(1, 1, 1), jax.local_devices()[:1])
  with jax.set_mesh(single):
    run = load_run(args.workdir, single, args.checkpoint, trust=args.trust)
  print(f'{"check":46} {"result":10} {"difference":>10} {"limit":>8}', flush=True)
  failed = []
  for found in check_run_on(run, mesh_config):
    numbers = '' if found.difference is None else f'{found.difference:10.1e} {found.limit:8.0e}'
    print(f'{found.name:46} {found.result:10} {numbers or found.note}'.rstrip(), flush=True)
    if not found.passed:
      failed.append(found.name)
  if failed:
    raise CheckFailed(f'{args.workdir}: {len(failed)} of the checks failed: {"; ".join(failed)}. Results on these '
                      'devices differ by more than rounding: do not train on them before the cause is known; report '
                      'it with the output of llm-jax check')


if __name__ == '__main__':
  run_as_program(main)
