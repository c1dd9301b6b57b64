"""Talks with one loaded model in a loop.

For a run of task chat each line is a message, which the model answers with the conversation so far. For other runs each
line is a prompt, which the model continues without the lines before; /more goes on with the text so far. Lines that
begin with a slash set an option or ask for something:

  /temperature 0.5   /top_k 40   /top_p 0.9   /num_tokens 200   /seed 3
  /new               starts a new conversation
  /system TEXT       starts a new conversation with this system message; without TEXT with none
  /more TEXT         continues the last text, with TEXT added to it; /more alone adds nothing
  /options           prints the options
  /help              prints the commands
  /quit              ends, as Ctrl-D does; Ctrl-C stops a text that is being written

  llm-jax chat runs/gpt_small --temperature=0.6
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from llm_jax.base import flags
from llm_jax.base.errors import ConfigError, UserError
from llm_jax.infer.options import check_options

OPTIONS: dict[str, Any] = {'temperature': 0.8, 'top_k': 0, 'top_p': 1.0, 'num_tokens': 256, 'seed': 0}
HELP = {'temperature': '0: always take the most likely token', 'top_k': 'sample only from the k most likely tokens; 0: '
        'all', 'top_p': 'sample only from the most likely tokens with this total probability',
        'num_tokens': 'maximum of a continuation', 'seed': 'of the random numbers of the first continuation'}


def parser() -> flags.Parser:
  parser = flags.Parser('chat', __doc__)
  flags.add_run(parser)
  flags.add_mesh(parser, distributed=False)
  for name, value in OPTIONS.items():
    parser.add_argument(f'--{name}', type=type(value), default=value, help=HELP[name])
  flags.add(parser)
  return parser


def main(argv: list[str]) -> None:
  args = parser().parse(argv)
  options = {name: getattr(args, name) for name in OPTIONS}
  check_options(options)
  flags.apply(args)
  from llm_jax.data.chat.tokenizer import ChatTokenizer
  from llm_jax.infer.trained import load_writer
  with contextlib.suppress(ImportError):
    import readline  # noqa: F401  (line editing and history)
  trained = load_writer(args.workdir, args.checkpoint, args.mesh, trust=args.trust)
  print(f'{args.workdir}, step {trained.run.meta["step"]}; /help, /quit', file=sys.stderr, flush=True)
  signal.signal(signal.SIGINT, signal.default_int_handler)  # a KeyboardInterrupt, which from now on ends a text only
  talk: Talk = Conversation() if isinstance(trained.run.tokenizer, ChatTokenizer) else Continuation()
  while (line := read_line()) is not None and line.strip() != '/quit':
    name, _, added = line.partition(' ')
    if line.startswith('/') and name not in talk.commands:
      command(line, options, talk.commands)
      continue
    if name == '/more' and not trained.run.model.prompt_in_row:
      print('/more: this model writes a new text for each prompt')
      continue
    prompt = talk.prompt(name, added) if name in talk.commands else talk.prompt('', line)
    if prompt is not None:
      shown = prompt if isinstance(prompt, str) and trained.run.model.prompt_in_row else ''
      talk.wrote(prompt, answer(trained, prompt, options, shown))


class Talk(Protocol):
  """What the lines of a user are to the model."""

  commands: tuple[str, ...]  # that it carries out itself

  def prompt(self, name: str, text: str) -> Any:
    """The model's prompt after a line, or after a command and its text; None: the model need not write."""

  def wrote(self, prompt: Any, text: str | None) -> None:
    """Takes what the model wrote; None after an error."""


class Continuation:
  """Each line is a text to continue."""

  commands: tuple[str, ...] = ('/more',)
  text = ''

  def prompt(self, name: str, text: str) -> str:
    return self.text + text if name else text

  def wrote(self, prompt: str, text: str | None) -> None:
    self.text = self.text if text is None else prompt + text


class Conversation:
  """Each line is a message of the user, answered with the conversation so far."""

  commands: tuple[str, ...] = ('/new', '/system')
  messages: tuple[tuple[str, str], ...] = ()

  def prompt(self, name: str, text: str) -> tuple[tuple[str, str], ...] | None:
    if name == '/new':
      self.messages = tuple(turn for turn in self.messages if turn[0] == 'system')
    elif name == '/system':
      self.messages = (('system', text),) if text else ()
    return None if name else (*self.messages, ('user', text))

  def wrote(self, prompt: tuple[tuple[str, str], ...], text: str | None) -> None:
    self.messages = self.messages if text is None else (*prompt, ('assistant', text))


def read_line() -> str | None:
  """The next line of stdin; None at its end."""
  try:
    return input('> ' if sys.stdin.isatty() else '')
  except EOFError:
    return None
  except KeyboardInterrupt:
    print()
    return '/options'


def command(line: str, options: dict[str, Any], more: tuple[str, ...]) -> None:
  """Carries out a line such as /top_k 40."""
  name, _, text = line[1:].strip().partition(' ')
  if name == 'help':
    print('\n'.join(line for line in __doc__.splitlines() if line.startswith('  /')))
    return
  if name in options:
    try:
      value = type(OPTIONS[name])(text)
      check_options({name: value})
      options[name] = value
    except ConfigError as e:
      print(str(e).replace('--', '/'))
    except ValueError:
      print(f'/{name} needs a {"whole " * isinstance(OPTIONS[name], int)}number; got {text!r}')
  elif name != 'options':
    known = ', '.join((*(f'/{name}' for name in options), *more, '/options', '/help', '/quit'))
    print(f'/{name} is unknown; known: {known}')
  print('  '.join(f'{option}={value}' for option, value in options.items()))


def answer(trained: Any, prompt: Any, options: dict[str, Any], shown: str) -> str | None:
  """Prints `shown` and what the model writes, while it is generated; returns what it wrote, None after an error."""
  from llm_jax.commands.generate import begun, print_samples
  from llm_jax.data.tokenizers.tokenizer import before_eos, decode
  row: list[int] = []

  def kept(columns: Iterable[Any]) -> Iterator[Any]:
    for column in columns:
      row.append(int(column[0]))
      yield column

  try:
    columns = begun(lambda: trained.tokens(prompt, **options))  # raises an error before the prompt is printed
    options['seed'] = (options['seed'] + 1) % (1 << 32)  # other random numbers for the next line
    print_samples(shown, kept(columns), trained.run.tokenizer, 1)
  except UserError as e:
    print(f'error: {e}' + ('' if isinstance(prompt, str) else '; /new starts a new conversation'))
    return None
  except KeyboardInterrupt:
    print()
  except ValueError as e:  # JAX turns an interrupt in a comparison of pytrees into one
    if not isinstance(e.__cause__, KeyboardInterrupt):
      raise
    print()
  return decode(trained.run.tokenizer, before_eos(trained.run.tokenizer, row))
