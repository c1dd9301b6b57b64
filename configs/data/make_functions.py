"""Writes functions.jsonl and documented.jsonl: functions of the running Python's standard library, and what to tell.

  python configs/data/make_functions.py

functions.jsonl has each function's `code` without its docstring, the `package` or module of the library that it is
from (those of 100 functions or more) and its `complexity`: log2 of McCabe's number, 1 and one more for every branch
(McCabe 1976). documented.jsonl has `code` and `summary`, the docstring's first paragraph, of those that have one. Both
are made from what is installed here, and not kept.
"""

import ast
import json
import math
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from llm_jax.data.sources import stdlib

LEAST = 100  # functions of a package
BRANCHES = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.IfExp, ast.Assert, ast.comprehension,
            ast.match_case)
HERE = Path(__file__).parent


def complexity(function: ast.AST) -> int:
  """McCabe's number: and/or count for each further operand."""
  nodes = list(ast.walk(function))
  return (1 + sum(isinstance(node, BRANCHES) for node in nodes)
          + sum(len(node.values) - 1 for node in nodes if isinstance(node, ast.BoolOp)))


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
      doc = ast.get_docstring(node) or ''
      kept = lines[node.lineno - 1:node.end_lineno]
      if doc:
        first = node.body[0]
        kept = lines[node.lineno - 1:first.lineno - 1] + lines[first.end_lineno:node.end_lineno]
      code = textwrap.dedent('\n'.join(kept))
      if code not in seen and code.count('\n') >= 2:
        seen.add(code)
        summary = ' '.join(doc.split('\n\n')[0].split())
        yield {'code': code, 'summary': summary, 'package': file.name.split('/')[0].removesuffix('.py'),
               'complexity': round(math.log2(complexity(node)), 4)}


def write(name: str, records: list[dict], fields: list[str]) -> None:
  path = HERE / name
  path.write_text(''.join(json.dumps({field: record[field] for field in fields}) + '\n' for record in records))
  print(f'{path}: {len(records)} functions')


def main():
  records = list(functions())
  sizes = Counter(record['package'] for record in records)
  write('functions.jsonl', [r for r in records if sizes[r['package']] >= LEAST], ['code', 'package', 'complexity'])
  write('documented.jsonl', [r for r in records if r['summary']], ['code', 'summary'])
  print(', '.join(f'{name} {n}' for name, n in sizes.most_common() if n >= LEAST))


if __name__ == '__main__':
  main()
