"""Writes functions.jsonl: functions of the running Python's standard library, and where they are from.

  python configs/data/make_functions.py

Each line has a function's `code`, without its docstring, and the `package` or module of the library that it is from
(those of 100 functions or more). The file is made from what is installed here, and not kept.
"""

import ast
import json
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from llm_jax.data.sources.files import stdlib

LEAST = 100  # functions of a package


def functions() -> Iterator[dict]:
  """Every function of three lines or more, once."""
  seen = set()
  for file in stdlib():
    try:
      text = file.path.read_text()
      tree = ast.parse(text)
    except (SyntaxError, UnicodeDecodeError):
      continue
    lines = text.splitlines()
    for node in ast.walk(tree):
      if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
        continue
      kept, first = lines[node.lineno - 1:node.end_lineno], node.body[0]
      if ast.get_docstring(node):
        kept = lines[node.lineno - 1:first.lineno - 1] + lines[first.end_lineno:node.end_lineno]
      code = textwrap.dedent('\n'.join(kept))
      if code not in seen and code.count('\n') >= 2:
        seen.add(code)
        yield {'code': code, 'package': file.name.split('/')[0].removesuffix('.py')}


def main():
  records = list(functions())
  sizes = Counter(record['package'] for record in records)
  records = [record for record in records if sizes[record['package']] >= LEAST]
  path = Path(__file__).with_name('functions.jsonl')
  path.write_text(''.join(json.dumps(record) + '\n' for record in records))
  print(f'{path}: {len(records)} functions: '
        + ', '.join(f'{name} {n}' for name, n in sizes.most_common() if n >= LEAST))


if __name__ == '__main__':
  main()
