"""Continues prompts in a loop, with one loaded model.

Each line is a prompt, which the model continues. Lines that begin with a slash set an option or ask for something:

  /temperature 0.5   /top_k 40   /top_p 0.9   /num_tokens 200   /seed 3
  /options           prints the options
  /quit              ends, as Ctrl-D does; Ctrl-C stops a text that is being written

  llm-jax chat --workdir=runs/gpt_small --temperature=0.6
"""

from __future__ import annotations

import contextlib
import signal
import sys
from typing import Any

from llm_jax.base import flags
from llm_jax.base.errors import UserError
from llm_jax.base.process import waiting

OPTIONS: dict[str, Any] = {'temperature': 0.8, 'top_k': 0, 'top_p': 1.0, 'num_tokens': 256, 'seed': 0}
HELP = {'temperature': '0: always take the most likely token', 'top_k': 'sample only from the k most likely tokens; 0: '
        'all', 'top_p': 'sample only from the most likely tokens with this total probability',
        'num_tokens': 'maximum of a continuation', 'seed': 'of the random numbers of the first continuation'}


def parser() -> flags.Parser:
  parser = flags.Parser('chat', __doc__)
  flags.add_run(parser)
  for name, value in OPTIONS.items():
    parser.add_argument(f'--{name}', type=type(value), default=value, help=HELP[name])
  flags.add(parser)
  return parser


def main(argv: list[str]) -> None:
  args = parser().parse(argv)
  flags.apply(args)
  import jax

  from llm_jax import api
  from llm_jax.base.sharding import MeshConfig, make_mesh
  with contextlib.suppress(ImportError):
    import readline  # noqa: F401  (line editing and history)
  options = {name: getattr(args, name) for name in OPTIONS}
  signal.signal(signal.SIGINT, signal.default_int_handler)  # a KeyboardInterrupt, which ends a text only
  with jax.set_mesh(make_mesh(MeshConfig())):
    trained = api.load(args.workdir, args.checkpoint, trust=args.trust)
    print(f'{args.workdir}, step {trained.run.meta["step"]}; /options, /quit')
    compiled = False
    while (line := read_line()) is not None:
      if line.startswith('/'):
        if not command(line, options):
          return
      else:
        if not compiled:
          waiting('compiling')
          compiled = True
        answer(trained, line, options)
        options['seed'] += 1  # other random numbers for the next line


def read_line() -> str | None:
  """The next line of stdin; None at its end."""
  try:
    return input('> ' if sys.stdin.isatty() else '')
  except EOFError:
    return None
  except KeyboardInterrupt:
    print()
    return '/options'


def command(line: str, options: dict[str, Any]) -> bool:
  """Carries out a line such as /top_k 40; returns False for /quit."""
  name, _, text = line[1:].strip().partition(' ')
  if name == 'quit':
    return False
  if name in options:
    try:
      options[name] = type(OPTIONS[name])(text)
    except ValueError:
      print(f'/{name} needs a number; got {text!r}')
  elif name != 'options':
    print(f'/{name} is unknown; known: {", ".join(f"/{option}" for option in options)}, /options, /quit')
  print('  '.join(f'{option}={value}' for option, value in options.items()))
  return True


def answer(trained: Any, prompt: str, options: dict[str, Any]) -> None:
  """Prints the continuation of a prompt while it is generated."""
  from llm_jax.commands.generate import print_samples
  try:
    columns = trained.tokens(prompt, **options)
    print_samples(prompt if trained.run.model.prompt_in_row else '', columns, trained.run.tokenizer, 1)
  except UserError as e:
    print(f'error: {e}')
  except KeyboardInterrupt:
    print()
