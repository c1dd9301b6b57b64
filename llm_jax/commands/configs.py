"""Lists the presets, or prints one: llm-jax configs [NAME]

  llm-jax configs gpt_small > mine.py    writes a preset to a file of your own
"""

from __future__ import annotations

import argparse
import ast

from llm_jax import config_file


def main(argv: list[str]) -> None:
  parser = argparse.ArgumentParser(prog='llm-jax configs', allow_abbrev=False, description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('name', nargs='?', help='a preset, to print its file')
  args = parser.parse_args(argv)
  if args.name is not None:
    print(config_file.find_config(args.name).read_text(), end='')
    return
  known = config_file.presets()
  width = max(map(len, known), default=0)
  for name, path in known.items():
    summary = (ast.get_docstring(ast.parse(path.read_text())) or '').splitlines()[:1]
    print(f'{name:{width}}  {"".join(summary)}')
