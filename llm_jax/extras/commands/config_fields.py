"""Prints all fields of a config, or of some of its sections: value, type, origin and comment.

A value comes from the defaults, the config file, its on_cpu (without an accelerator), or the command line. --diff
between a file and a run leaves out the fields that the file leaves open and the run has filled in from data and device.

  llm-jax config --config=gpt_small optim  # the section optim
  llm-jax config --config=gpt_small --format=json --config.num_steps=50
  llm-jax config --diff gpt_small shakespeare_char  # what differs between two presets, files or runs
  llm-jax config --from=hf:org/name > configs/tune.py  # a config file that trains a published model further
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from llm_jax.base import flags
from llm_jax.base.builder import SYNONYMS, nearest_fields, to_dict
from llm_jax.base.errors import ConfigError
from llm_jax.base.fields import DTYPES, Field, fields_of
from llm_jax.base.nearest import nearest
from llm_jax.base.redaction import public
from llm_jax.base.terminal import columns

# Fields besides those of losses that training fills in (training/resolve.py, memory.py) where they are None or 'auto'.
OPEN = ('tokens_per_device', *(f'model.{name}' for name in (
    'vocab_size', 'max_len', 'encoder_len', 'start_id', 'encoder_vocab_size', *DTYPES)))

MIN_COMMENT = 40  # columns for the comments beside the fields


def parser() -> flags.Parser:
  parser = flags.Parser('config', __doc__, fields='llm_jax.config:Config')
  flags.add_config(parser)
  parser.add_argument('--diff', nargs=2, metavar=('A', 'B'), help='print only the fields in which two configs differ '
                      '(default: print one config)')
  parser.add_argument('--from', dest='published', metavar='FOLDER', help='print a config file that trains the '
                      'published model in this folder, or hf:org/name, further (default: print a config)')
  parser.add_argument('--format', choices=('text', 'json'), default='text', help='of the output')
  flags.add(parser)
  return parser


def main(argv: list[str]) -> None:
  args = parser().parse(argv, words=True)
  flags.apply(args)
  from llm_jax import config as config_lib
  from llm_jax import config_file
  from llm_jax.base.devices import only_cpus
  overrides, sections = args.overrides, [word.removeprefix('config.') for word in args.words]

  def chosen(path: str) -> bool:
    return not sections or any(f'{path}.'.startswith(f'{section}.') for section in sections)

  cpu_only = only_cpus() and not args.full_size
  if args.published:
    if args.diff or args.config or overrides:
      raise ConfigError('--from prints a new config file: leave out --config, --diff and --config.FIELD')
    print(tuning_file(args.published))
    return
  if args.diff and args.config:
    raise ConfigError('--diff compares the two configs after it: leave out --config')
  if args.diff:
    sources = [config_file.open_config(path, trust=args.trust, flag='--diff') for path in args.diff]
    old, new = (public(to_dict(source.resolve(overrides, cpu_only=cpu_only))) for source in sources)
    check_sections(sections, old | new, args.diff[0])
    found = {path: pair for path, pair in config_lib.differences(old, new).items() if chosen(path)}
    filled = filled_in(found) if {source.path.suffix for source in sources} == {'.py', '.json'} else []
    compared = {path: pair for path, pair in found.items() if path not in filled}
    if args.format == 'json':
      print(json.dumps(compared, indent=2))
      return
    for name, source in zip(args.diff, sources, strict=True):
      if source.on_cpu is not None:
        print(f'{name}: ' + ('with its on_cpu, as there is no accelerator (--full_size: without)' if cpu_only else
                             'in full size, without its on_cpu'))
    print('\n'.join(f'{path}: {as_typed(a)} -> {as_typed(b)}' for path, (a, b) in compared.items()) or 'no difference')
    if filled:
      print(f'left open by the file and filled in by the run: {", ".join(filled)}')
    return
  if args.config is None and sections:
    args.config = sections.pop(0)  # llm-jax config gpt_small optim
  if args.config is None:
    raise ConfigError(f'--config is missing: set it to a file or to one of: {", ".join(config_file.presets())}')
  source = config_file.open_config(args.config, trust=args.trust)
  config = source.resolve(overrides, cpu_only=cpu_only)
  fields = list(fields_of(config))
  entries = [field for field in fields if chosen(field.path)]
  check_sections(sections, to_dict(config), args.config)
  on_cpu = source.on_cpu if cpu_only else None
  origins = [origin(field, source.full, on_cpu, overrides) for field in entries]
  if args.format == 'json':
    print(json.dumps({field.path: {'value': public(to_dict(field.value), field.path), 'type': field.kind, 'from': found,
                                   'comment': field.comment}
                      for field, found in zip(entries, origins, strict=True)}, indent=2))
  else:
    print('\n'.join(tree(entries, origins, columns())))


def check_sections(sections: list[str], values: Mapping[str, Any], name: str) -> None:
  """Raises ConfigError for a section or field that the config does not have."""
  from llm_jax.config import Config
  paths = list(paths_in(values))
  for section in sections:
    if section not in paths:
      usual = section.rpartition('.')[2] in SYNONYMS
      near = next(iter(nearest_fields(section, Config)), None) if usual else None
      near = near or nearest(section, paths) or next(iter(nearest_fields(section, Config)), None)
      known = [path for path in paths if '.' not in path and isinstance(values[path], Mapping) and values[path]]
      raise ConfigError(f'{name} has no section or field {section}; '
                        + (f'did you mean {near}?' if near else f'sections: {", ".join(known)}'))


def paths_in(values: Mapping[str, Any], above: str = '') -> Iterator[str]:
  """The paths of all sections and fields in nested dicts."""
  for name, value in values.items():
    yield f'{above}{name}'
    if isinstance(value, Mapping):
      yield from paths_in(value, f'{above}{name}.')


def tuning_file(folder: str) -> str:
  """A config file that trains the model in a folder further. Raises ConfigError, StorageError."""
  from llm_jax.config import base_from
  config = base_from(folder)
  fields = ', '.join(f'{name}={value}' for name, value in config.model.to_dict().items()
                     if name in ('num_layers', 'embed_dim', 'num_heads', 'vocab_size', 'max_len'))
  seq_len = min(1024, config.model.max_len)
  return textwrap.dedent(f"""\
      \"\"\"Trains the model in {folder} on other data: {fields}.

        llm-jax train --config=THIS_FILE --workdir=runs/tune --config.data.path=YOUR_DATA
      \"\"\"

      from llm_jax.config import base_from


      def get_config():
        config = base_from({folder!r})  # model, tokenizer and weights
        config.data.seq_len = {seq_len}
        config.batch_tokens = {16 * seq_len}
        config.tokens_per_device = {seq_len}
        config.num_steps = 1000
        config.optim.learning_rate = 1e-5
        return config""")


def filled_in(found: Mapping[str, tuple[Any, Any]]) -> list[str]:
  """The differences between a file and a run in fields that the file leaves open and data and device determine."""
  computed = ('num_steps', 'num_epochs') if 'num_epochs' in found else ()  # a run has steps, from the file's epochs
  return [path for path, pair in found.items() if path in computed
          or ((path in OPEN or path.startswith('loss.')) and (None in pair or 'auto' in pair))]


def origin(field: Field, full: Mapping[str, Any], on_cpu: Mapping[str, Any] | None,
           overrides: Mapping[str, Any]) -> str:
  """Where the value of a field comes from: 'default', 'file', 'on_cpu' or 'command line'."""
  value = to_dict(field.value)
  if field.path in overrides:
    return 'command line'
  if on_cpu is not None and at(on_cpu, field.path) == value != at(full, field.path):
    return 'on_cpu'
  return 'default' if value == to_dict(field.default) else 'file'


def at(values: Any, path: str) -> Any:
  """The value at a path of nested dicts; None if there is none."""
  for name in path.split('.'):
    values = values.get(name) if isinstance(values, Mapping) else None
  return to_dict(values)


def as_typed(value: Any) -> str:
  """A value as it is given on the command line."""
  value = to_dict(value)
  if isinstance(value, list):
    plain = value and all(str(item) == str(item).strip(' \'"([') != '' and ',' not in str(item) for item in value)
    return ','.join(map(str, value)) if plain else str(tuple(value))
  return repr(value) if value == '' else str(value)


def tree(entries: list[Field], origins: list[str], width: int | None = None) -> list[str]:
  """Lines of fields under the names of their sections: value, type, origin, comment.

  They are columns, of which the last may be long. Where less than MIN_COMMENT of `width` is left for it, the comment
  is below the field.
  """
  rows, above = [], list[str]()
  for field, found in zip(entries, origins, strict=True):
    *parents, name = field.path.split('.')
    shared = next((i for i, (a, b) in enumerate(zip(above, parents, strict=False)) if a != b),
                  min(len(above), len(parents)))
    rows += [('  ' * depth + parents[depth], '', '', '') for depth in range(shared, len(parents))]
    value = as_typed(public(to_dict(field.value), field.path))
    rows.append((f'{"  " * len(parents)}{name} = {value}', field.kind, found, field.comment))
    above = parents
  widths = [min(max(len(row[column]) for row in rows), limit) for column, limit in ((0, 48), (1, 24), (2, 12))]
  start = sum(widths) + 2 * len(widths)
  beside = width is None or width - start >= MIN_COMMENT
  lines = []
  for *cells, comment in rows:
    head = '  '.join(f'{text:{size}}' for text, size in zip(cells, widths if beside else (0, 0, 0), strict=True)) + '  '
    indent = start if beside else len(cells[0]) - len(cells[0].lstrip()) + 4
    if width is None:
      lines.append(head + comment)
      continue
    below = textwrap.wrap(comment, width, initial_indent=' ' * indent, subsequent_indent=' ' * indent)
    fits = beside and len(head) == start and below
    lines += [head + below[0].lstrip(), *below[1:]] if fits else [head, *below]
  return [line.rstrip() for line in lines]
