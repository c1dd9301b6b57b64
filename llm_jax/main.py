"""Trains a model from a config. The same command resumes a run that was stopped.

  llm-jax train --config=gpt_small
  llm-jax train --config=my_data --config.data.path=notes.txt --config.num_steps=500 --workdir=runs/notes

Any field can be set; `llm-jax config --config=NAME` lists all fields with their values and comments.
"""

from __future__ import annotations

from llm_jax.base import flags
from llm_jax.base.process import out_of_memory_as_config_error, run_as_program, start_processes
from llm_jax.base.stopping import stop_after, stopping_at_once


def parser() -> flags.Parser:
  parser = flags.Parser('train', __doc__, fields='llm_jax.config:Config')
  flags.add_config(parser, required=True)
  parser.add_argument('--workdir', metavar='FOLDER', help='folder of the run, or its URL in object storage; if it '
                      'contains a run, that is resumed (default: runs/<name of the config>)')
  parser.add_argument('--start_over', action='store_true', help='move what the run has trained to before-TIME in '
                      'its folder, and begin at step 0')
  flags.add_distributed(parser)
  parser.add_argument('--stop_after', metavar='TIME', help='stop as SIGTERM does after 3h50m, 90m or 45s, and exit '
                      'with 75')
  flags.add(parser)
  return parser


@stopping_at_once(lambda: 'interrupted before the first step; nothing was trained')
def main(argv: list[str]) -> None:
  args = parser().parse(argv)
  was_set, overrides = flags.apply(args), args.overrides
  stop_after(args.stop_after)

  from llm_jax import config_file
  source = config_file.open_config(args.config, trust=args.trust)
  source.check(overrides)  # reports a config that is invalid on any machine before starting JAX
  from llm_jax.base.progress import Progress
  with Progress('starting JAX'):
    import jax

    from llm_jax import api
    from llm_jax.base.devices import only_cpus
    from llm_jax.training.custom import Custom
    from llm_jax.training.ending import ending, workdir_line
    from llm_jax.training.lost import start_over
    start_processes(args.distributed)
  if jax.process_index() == 0:
    print(f'runtime: {was_set}', flush=True)
  cpu_only = only_cpus() and not args.full_size
  config = source.resolve(overrides, cpu_only=cpu_only)
  name = source.path.stem if source.path.suffix == '.py' else f'{source.path.absolute().parent.name}_again'
  workdir = args.workdir or f'runs/{name}'
  summary = (*(source.cpu_note(args.config, overrides) if cpu_only else ()), workdir_line(workdir))
  if args.start_over:
    start_over(workdir)
  with out_of_memory_as_config_error(config.tokens_per_device):
    training = api.Training(config, workdir, Custom(summary=summary))
    for _ in training:
      pass
  for line in ending(config, training.workdir, argv, workdir) if jax.process_index() == 0 else ():
    print(line)


if __name__ == '__main__':
  run_as_program(main)
