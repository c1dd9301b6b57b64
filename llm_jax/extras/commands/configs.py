"""Lists the presets, or prints one.

  llm-jax configs
  llm-jax configs gpt_small > mine.py  # writes a preset to a file of your own
"""

from __future__ import annotations

import ast

from llm_jax.base import flags
from llm_jax.base.terminal import columns, wrap


def parser() -> flags.Parser:
  parser = flags.Parser('configs', __doc__)
  parser.add_argument('name', nargs='?', help='a preset, to print its file (default: list all)')
  return parser


def main(argv: list[str]) -> None:
  args = parser().parse(argv)
  from llm_jax import config_file
  if args.name is not None:
    print(config_file.find_config(args.name, 'llm-jax configs').read_text(), end='')
    return
  known = config_file.presets()
  width = max(map(len, known), default=0)
  for name, path in known.items():
    summary = (ast.get_docstring(ast.parse(path.read_text())) or '').splitlines()[:1]
    print(wrap(f'{name:{width}}  {"".join(summary)}', width + 2, columns()))
