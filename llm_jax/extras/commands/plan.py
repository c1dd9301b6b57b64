"""Plans a run for devices that are not here: compiles its step for them, and reports memory, work and money.

It prints the parameters with their shards, the memory of a device against what it has, FLOPs, tokens, time and money,
and the collectives and kernels of the compiled step. Where a step does not fit it names settings that do. The compilers
of TPUs and GPUs are packages of their own: pip install 'llm_jax[plan-tpu]' or 'llm_jax[plan-gpu]'. Without them, and
with --estimate, the plan is one of arithmetic alone.

  llm-jax plan --config=gpt_small --on=v5e:2x4
  llm-jax plan --config=llama_8b --on=h100:64 --search --json=plan.json
  llm-jax plan --config=gpt_small --on=cpu:8 --full_size --estimate
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from llm_jax.base import flags, plugins, runtime
from llm_jax.base.errors import ConfigError
from llm_jax.base.files import write_file, writing
from llm_jax.base.process import run_as_program
from llm_jax.extras.plan.targets import EXAMPLES, missing_compiler, open_target, parse_place, prepare, stand_in_target


def parser() -> flags.Parser:
  parser = flags.Parser('plan', __doc__, fields='llm_jax.config:Config')
  flags.add_config(parser, required=True)
  parser.add_argument('--on', metavar='KIND:SHAPE', required=True, help=f'the devices: {EXAMPLES}')
  parser.add_argument('--slices', type=int, default=1, help='of TPUs, connected by the network of their data centre')
  parser.add_argument('--search', action='store_true', help='compile the fastest settings by estimate, of '
                      'microbatches, remat and mesh, until some fit')
  parser.add_argument('--estimate', action='store_true', help='do not compile')
  parser.add_argument('--mfu', type=float, default=0.4, help='share of the peak FLOP/s, for time and money')
  parser.add_argument('--price', type=float, metavar='DOLLARS', help="for an hour of one device (default: a list "
                      "price of the kind)")
  parser.add_argument('--data', action='store_true', help='prepare the data as a run does, to count their tokens')
  parser.add_argument('--data_tokens', type=float, metavar='NUMBER', help='tokens of the training data, as 15e12, for '
                      'epochs (default: those of --data)')
  parser.add_argument('--json', type=Path, metavar='FILE', help='write the plan as JSON too')
  plugins.add_flags(parser, trust=False)
  return parser


def main(argv: list[str]) -> None:
  args = parser().parse(argv)
  place = parse_place(args.on, args.slices)
  if not 0 < args.mfu <= 1:
    raise ConfigError(f'--mfu: must be above 0 and at most 1; got {args.mfu:g}')
  if args.json is not None and not args.json.parent.is_dir():  # before minutes of compiling
    raise ConfigError(f'--json: {args.json.parent} is not a folder; make it, or set another path')
  missing = missing_compiler(place)
  if 'jax' not in sys.modules:
    runtime.prepare(tuning=False)
    prepare(place, os.environ)
  plugins.load_all(args.plugin)
  plan = planned(args, place, missing)
  from llm_jax.extras.plan import report
  if missing:
    print(f'{missing}; without it this is an estimate')
  for line in report.lines(plan):
    print(line)
  if args.json is not None:
    with writing(str(args.json)):
      write_file(args.json, json.dumps(plan, indent=2) + '\n')
    print(f'wrote {args.json}', file=sys.stderr)


def planned(args: Any, place: Any, missing: str) -> dict[str, Any]:
  """The plan that the flags ask for. Raises UserErrors."""
  from llm_jax import config_file
  from llm_jax.extras.plan.planning import Options, make_plan
  config = config_file.open_config(args.config).resolve(
      args.overrides, cpu_only=place.kind.platform == 'cpu' and not args.full_size)
  target = stand_in_target(place) if missing else open_target(place)
  options = Options(not (args.estimate or missing), args.search, args.data, args.mfu, args.price,
                    int(args.data_tokens) if args.data_tokens else None)
  return make_plan(config, place, target, options, lambda line: print(line, file=sys.stderr, flush=True))


if __name__ == '__main__':
  run_as_program(main)
