"""Checks files with a validator: one by name (python, json, wgsl, a plug-in's), or a command that reads stdin.

A command accepts a file by exit code 0, within a minute. Prints a line for each invalid file; the exit code is 1 if
there is one.

  llm-jax validate shaders/a.wgsl shaders/b.wgsl --validator=wgsl
  llm-jax validate answers/*.json --validator='jq empty'
"""

from __future__ import annotations

from pathlib import Path

from llm_jax.base import flags, plugins
from llm_jax.base.errors import ConfigError, DataError, UserError
from llm_jax.base.process import run_as_program


def parser() -> flags.Parser:
  parser = flags.Parser('validate', __doc__)
  parser.add_argument('files', type=Path, nargs='+', help='the files to check')
  parser.add_argument('--validator', required=True, help='a name, or a command')
  plugins.add_flags(parser, trust=False)
  return parser


def main(argv: list[str]) -> None:
  args = parser().parse(argv)
  plugins.load_all(args.plugin)
  from llm_jax.infer.validators import TimedOut, make_validator
  try:
    accepts = make_validator(args.validator)
  except ConfigError as e:
    raise ConfigError(str(e).replace('config.eval.validator', '--validator')) from None
  if accepts is None:
    raise ConfigError('--validator: is empty; set it to a name or a command')
  contents = {path: read(path) for path in args.files}
  invalid = 0
  for path, content in contents.items():
    try:
      problem = '' if accepts(content.decode()) else f'not accepted by {args.validator}'
    except UnicodeDecodeError as e:
      problem = f'not UTF-8 text at byte {e.start}'
    except TimedOut as e:
      problem = str(e)
    invalid += bool(problem)
    if problem:
      print(f'{path}: invalid: {problem}', flush=True)
  if invalid:
    raise UserError(f'{invalid} of {len(contents)} file(s) are invalid')


def read(path: Path) -> bytes:
  """Raises DataError for a file that cannot be read."""
  try:
    return path.read_bytes()
  except OSError as e:
    raise DataError(f'{path}: cannot be read: {e.strerror or e}') from None


if __name__ == '__main__':
  run_as_program(main)
