"""The parser of every command, and the flags that commands share. Imports nothing heavy, so that help is fast."""

from __future__ import annotations

import argparse
import inspect
import pkgutil
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from llm_jax.base import plugins, runtime
from llm_jax.base.builder import SYNONYMS, nearest_fields
from llm_jax.base.errors import ConfigError
from llm_jax.base.files import check_checkpoint, check_run, latest_step, list_runs
from llm_jax.base.nearest import nearest
from llm_jax.base.process import join_processes, waiting
from llm_jax.base.storage import read_workdir
from llm_jax.base.terminal import wrap, wrap_paragraphs

METAVARS = {int: 'N', float: 'X', Path: 'PATH'}
IN_TOKENS = ('batch_tokens', 'tokens_per_device')  # a value in rows, as others give it, would mean something else


class Help(argparse.HelpFormatter):
  """Wraps usage, description and flags at words, in the width of the terminal."""

  def __init__(self, prog: str):
    super().__init__(prog, max_help_position=30)

  def _format_usage(self, *args: Any) -> str:
    return f'{wrap(super()._format_usage(*args).strip(), 4, self._width)}\n\n'

  def _fill_text(self, text: str, width: int, indent: str) -> str:
    return wrap_paragraphs(text, width)


def is_value(word: str) -> bool:
  """Whether a word may be the value of the flag before it."""
  return word[:1] != '-' or re.match(r'-\.?\d', word) is not None


class Once(argparse.Action):
  """Sets a value that a flag or a positional argument gives, but not both."""

  def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
               option_string: str | None = None) -> None:
    given = getattr(namespace, self.dest)
    if values and given and values != given and not isinstance(values, str):  # text: it is not a run, as reported
      raise argparse.ArgumentError(self, f'{values} is not the run that is named too, {given}; name one')
    if values:  # else there is no positional argument
      setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
  """The flags of one command. All mistakes are reported by one ConfigError; the help shows the default of each flag.

  `text` is the docstring of the command's module: what it does, and examples as lines that begin with '  llm-jax '.
  With `fields`, the place of a config class such as 'llm_jax.config:Config', its fields are flags too.
  """

  def __init__(self, command: str, text: str | None, *, fields: str = ''):
    self.command, self.fields = command, fields
    text = inspect.cleandoc(text or '')  # as Python 3.13 does
    if re.search(r'^llm-jax ', text, re.MULTILINE):  # every line but the first was indented
      first, *rest = text.splitlines()
      text = '\n'.join([first, *(f'  {line}' if line else '' for line in rest)])
    self.examples = re.findall(r'^  (llm-jax .*)$', text, re.MULTILINE)
    self._required: list[str] = []
    self._problems: list[str] = []
    super().__init__(prog=f'llm-jax {command}', usage='', description=text, allow_abbrev=False, formatter_class=Help)

  def add_argument(self, *names: str, **options: Any) -> argparse.Action:
    """As argparse's. A value that does not fit its type or choices is reported together with other mistakes."""
    name, required = names[0], options.pop('required', False) or names[0][0] != '-'
    has_value = options.get('action', 'store') in ('store', 'append', Once)
    if has_value:
      choices, kind = options.pop('choices', None), options.pop('type', str)
      options['type'] = partial(self._convert, name, kind, choices)
      if name[0] == '-':
        options.setdefault('metavar', f'{{{",".join(choices)}}}' if choices else METAVARS.get(kind, 'TEXT'))
    if name[0] == '-' and required:
      self._required.append(name)
      options['help'] += '' if options.get('action') is Once else ' (required)'
    elif name[0] == '-' and options.get('action') != 'help' and 'default' not in options['help']:
      default = options.get('default')
      shown = 'off' if not has_value else 'none' if default == [] else ' '.join(map(str, default)) if isinstance(
          default, (list, tuple)) else default
      options['help'] = f'{options["help"]} (default: {shown})'
    action = super().add_argument(*names, **options)
    self.usage = self._usage()
    return action

  def _usage(self) -> str:
    """The positional arguments, the required flags that are none of them, and a word on the others."""
    words, named = [], set()
    for action in self._actions:
      name, flag = str(action.metavar or action.dest), f'--{action.dest}'
      if not action.option_strings:
        optional = action.nargs == '?' and flag not in self._required
        words.append(f'{name} ...' if action.nargs in ('+', '*') else f'[{name}]' if optional else name)
        named.add(flag)
      elif flag in self._required and flag not in named:
        words.append(f'{flag}={name}')
    fields = ' [--config.FIELD=VALUE ...]' if self.fields else ''
    return ' '.join([self.prog, *words]) + f' [--FLAG=VALUE ...]{fields}'

  def parse(self, argv: Sequence[str], prefix: str = '--config.', *, words: bool = False) -> argparse.Namespace:
    """The flags; with fields, also `overrides`: {'model.num_layers': '4'} from PREFIXmodel.num_layers=4.

    With `words`, arguments that are not flags become the list `words`. Raises ConfigError with all mistakes.
    """
    unknown, known = self._split(argv)
    args, rest = self.parse_known_args(known)
    rest = unknown + rest
    words_left = [word for word in rest if word[:1] != '-' and '=' not in word and Path(word).exists()]
    if not words and len(words_left) > 2 and not any(action.nargs == '*' for action in self._actions):
      raise ConfigError(f'{words_left[0]} and {len(words_left) - 1} further files: the shell has expanded a pattern; '
                        "quote it, such as --path='notes/*.md'")
    args.overrides, args.words = {}, []
    while rest:
      argument = rest.pop(0)
      name, equals, value = argument.partition('=')
      is_field = bool(self.fields) and name.startswith(prefix)
      if words and argument[:1] != '-':
        args.words.append(argument)
        continue
      if argument[:1] != '-' and self._take(args, argument):
        continue
      if name[:1] == '-' and not equals and rest and is_value(rest[0]):
        value = rest.pop(0)
      elif is_field and not equals:
        self._problems.append(f'{argument}: has no value')
      if is_field:
        args.overrides[name.removeprefix(prefix)] = value
      else:
        self._problems.append(f'{argument}: {self._nearest(argument, prefix)}')
    self._problems += [self._missing(flag) for flag in self._required
                       if getattr(args, flag[2:]) in (None, [])
                       and not any(re.search(f'did you mean {flag}\\b(?!\\.)', line) for line in self._problems)]
    if self._problems:
      raise ConfigError('\n'.join(self._problems))
    return args

  def _split(self, argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(unknown flags with their values, which argparse would take for positional arguments; all other words)."""
    flags = {name for action in self._actions for name in action.option_strings}
    unknown, others, after = list[str](), list[str](), False
    for word in argv:
      is_unknown = re.match(r'--\w', word) is not None and word.partition('=')[0] not in flags
      (unknown if is_unknown or (after and is_value(word)) else others).append(word)
      after = is_unknown and '=' not in word
    return unknown, others

  def _take(self, args: argparse.Namespace, argument: str) -> bool:
    """Whether a positional argument takes a word behind flags, which argparse leaves over."""
    for action in self._actions:
      given = getattr(args, action.dest, None)
      if not action.option_strings and (action.nargs == '*' or (action.nargs == '?' and given == action.default)):
        value = action.type(argument)  # type: ignore[operator, misc]
        setattr(args, action.dest, [*(given or []), value] if action.nargs == '*' else value)
        return True
    return False

  def error(self, message: str) -> NoReturn:
    """Raises ConfigError instead of argparse's usage message and exit code 2."""
    message = re.sub(r'^argument ([^:]+): ', r'\1: ', message).replace('expected one argument', 'has no value')
    message = message.replace('ignored explicit argument', 'takes no value; got')
    raise ConfigError('\n'.join([*self._problems, message]) + self._example())

  def _convert(self, flag: str, kind: Callable[[str], Any], choices: Sequence[str] | None, text: str) -> Any:
    try:
      value = kind(text)
    except ConfigError as e:
      self._problems.append(str(e))
    except ValueError:
      expected = {int: 'a whole number', float: 'a number'}.get(kind, 'another value')  # type: ignore[call-overload]
      self._problems.append(f'{flag}: expects {expected}, got {text!r}')
    else:
      if choices is None or value in choices:
        return value
      near = nearest(text, choices)
      self._problems.append(f'{flag}: {text!r} is not one of {", ".join(choices)}'
                            + (f'; did you mean {near}?' if near else ''))
    return text

  def _missing(self, flag: str) -> str:
    if flag == '--config':
      return f'--config is missing: set it to a file or a preset, which llm-jax configs lists{self._example()}'
    runs = list_runs(Path('runs')) if flag == '--workdir' else []
    return f'{flag} is missing' + (f'; runs here: {", ".join(runs[:8])}' if runs else self._example())

  def _example(self) -> str:
    return f'; for example: {self.examples[0].partition("  #")[0]}' if self.examples else ''

  def _nearest(self, argument: str, prefix: str) -> str:
    """What an unknown flag, or a word without a flag, may mean."""
    name, equals, value = argument.partition('=')
    known = [a.option_strings[-1] for a in self._actions if a.option_strings]
    taker = '--path' if prefix == '--' else next((flag for flag in ('--prompt', '--config') if flag in known), None)
    if not name.startswith('-') and not equals:
      return (f'values need the name of their flag; did you mean {taker}={argument}?' if taker is not None else
              f'one argument too many; usage: {self.usage}')
    name = name.lstrip('-').removeprefix('config.')
    flag = nearest(SYNONYMS.get(name, name), [flag[2:] for flag in known], cutoff=0.65)
    near = [f'--{flag}'] if flag else []
    if self.fields and not near:
      near = [prefix + path for path in nearest_fields(name, pkgutil.resolve_name(self.fields))]
    if any(flag.endswith(IN_TOKENS) for flag in near) and name in SYNONYMS:
      return f'no such flag; did you mean {" or ".join(near)}, which counts tokens, not rows?'
    if near:
      return f'no such flag; did you mean {" or ".join(flag + equals + value for flag in near)}?'
    return f'no such flag; known: {", ".join([*known, *([prefix + "FIELD"] if self.fields else [])])}'


def add(parser: argparse.ArgumentParser, *, trust: bool = True) -> None:
  """Adds --tuning, --plugin, and --trust for commands with a --workdir."""
  parser.add_argument('--tuning', choices=('on', 'off'), default='on', help='off: do not change the C allocator and '
                      'the XLA flags (llm_jax/base/runtime.py lists the changes and their reasons)')
  plugins.add_flags(parser, trust=trust)


def add_distributed(parser: Parser) -> None:
  parser.add_argument('--distributed', nargs='?', const='on', default='auto', choices=('auto', 'on', 'off'),
                      help='join the processes that SLURM, a JobSet, Open MPI, Cloud TPU or launch/local.py has '
                      'started; auto: if there are several (default: auto)')


def add_mesh(parser: Parser, *, distributed: bool = True) -> None:
  """Adds --mesh and, for commands that run on several hosts, --distributed; see infer/mesh.py."""
  parser.add_argument('--mesh', default='', metavar='SIZES', help='the devices along each axis of config.mesh, such as '
                      "fsdp=4,tensor=2 (default: the run's if that fits here, else data=-1 or, for large weights, "
                      'fsdp=-1)')
  if distributed:
    add_distributed(parser)


def add_run(parser: Parser) -> None:
  """Adds --workdir, also without its name, which must be a run, and --checkpoint."""
  add_workdir(parser, 'folder of a trained run or of an exported model', run_folder)
  parser.add_argument('--checkpoint', metavar='STEP', default='latest', help='latest, best, or a step')


def add_workdir(parser: Parser, text: str, kind: Callable[[str], Path], *, several: bool = False) -> None:
  """Adds the folder of a run, or of several, as a positional argument and as --workdir."""
  parser.add_argument('workdir', type=kind, action=Once, metavar='RUN', nargs='*' if several else '?',
                      help=f'{text} (required)')
  parser.add_argument('--workdir', type=kind, action=Once, metavar='FOLDER', required=True,
                      nargs='+' if several else None, help='the same as RUN')


def add_config(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
  """Adds --config and --full_size."""
  parser.add_argument('--config', metavar='FILE', required=required, help='a config file, a preset (llm-jax configs '
                      'lists them), or the folder of a run' + ('' if required else ' (default: none)'))
  parser.add_argument('--full_size', action='store_true', help="without an accelerator, ignore the config's on_cpu")


def run_folder(text: str) -> Path:
  """The type of --workdir. Raises ConfigError, with the nearest runs, if there is none."""
  return check_run(read_workdir(text))


def apply(args: argparse.Namespace) -> str:
  """Prepares the process, announces loading of a run, and runs plug-ins; returns a line on what was set.

  It must be called before anything imports JAX.
  """
  was_set = runtime.prepare(args.tuning == 'on')
  if hasattr(args, 'checkpoint'):
    if hasattr(args, 'distributed'):
      join_processes(args.distributed)
    args.workdir = read_workdir(args.workdir, args.checkpoint)
    check_checkpoint(args.workdir, args.checkpoint)
    waiting(f'loading {args.workdir}' + (f' at step {latest_step(args.workdir)}' if args.checkpoint == 'latest' and
                                          latest_step(args.workdir) >= 0 else ''))
  plugins.load_all(args.plugin)
  if getattr(args, 'trust', False) and getattr(args, 'workdir', None) is not None:
    plugins.check_notes(Path(args.workdir), trust=True)
  return was_set
