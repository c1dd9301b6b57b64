"""Writes chats.jsonl and chats_val.jsonl: conversations on the functions and classes of Python's standard library.

  python configs/data/make_chats.py

A user asks what a function does, what its parameters are or where it is, and the answer is from its docstring and
signature. Each name is in several conversations of one to three questions. chats_val.jsonl is on a twentieth of the
names, none of which is in chats.jsonl. Both are made from what is installed here, and not kept.
"""

import ast
import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path

from llm_jax.data.sources.files import stdlib

COPIES = 3  # conversations about a name
DOES = ('What does {name} do?', 'What is {name} for?', 'Explain {name}.', 'Tell me about {name}.', 'describe {name}')
TAKES = ('What are its parameters?', 'Which arguments does it take?', 'How do I call it?')
WHERE = ('Which module is it in?', 'Where is it?', 'What do I import?')
FIRST = ('How do I call {name}?', 'Which arguments does {name} take?', 'What are the parameters of {name}?')


def described() -> Iterator[dict]:
  """Public functions and classes at the top of a module, with a docstring of one short paragraph at least."""
  seen = set()
  for file in stdlib():
    module = file.name.removesuffix('.py').replace('/', '.').removesuffix('.__init__')
    if any(part.startswith(('_', 'test', 'idlelib')) for part in module.split('.')):
      continue
    try:
      tree = ast.parse(file.path.read_text())
    except (SyntaxError, UnicodeDecodeError):
      continue
    for node in tree.body:
      if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith('_'):
        text = ' '.join((ast.get_docstring(node) or '').split('\n\n')[0].split())
        if 20 <= len(text) <= 240 and f'{module}.{node.name}' not in seen:
          seen.add(f'{module}.{node.name}')
          yield {'module': module, 'name': f'{module}.{node.name}', 'text': text, 'call': call_of(node)}


def call_of(node: ast.AST) -> str:
  """The call of a function, or of a class by its __init__: name(a, b)."""
  init = next((n for n in getattr(node, 'body', ()) if getattr(n, 'name', '') == '__init__'), None)
  function = init if isinstance(node, ast.ClassDef) else node
  arguments = '' if function is None else ast.unparse(function.args).removeprefix('self').removeprefix(', ')
  return f'{node.name}({arguments})'


def conversation(entry: dict, rng: random.Random) -> list[dict]:
  takes, where = f'`{entry["call"]}`', f'It is in `{entry["module"]}`.'
  answers = [(rng.choice(DOES), entry['text']), (rng.choice(TAKES), takes), (rng.choice(WHERE), where)]
  if rng.random() < 0.25:
    answers = [(rng.choice(FIRST), takes), *answers[2:]]
  messages = []
  for question, answer in answers[:rng.randint(1, len(answers))]:
    messages.append({'role': 'user', 'content': question.format(name=entry['name'])})
    messages.append({'role': 'assistant', 'content': answer})
  return messages


def main():
  rng, entries = random.Random(0), list(described())
  held_out = [e for e in entries if hashlib.sha256(e['name'].encode()).digest()[0] < 13]
  parts = [[{'messages': conversation(entry, rng)} for entry in part for _ in range(COPIES)]
           for part in ([e for e in entries if e not in held_out], held_out)]
  rng.shuffle(parts[0])
  for file, part in zip(('chats.jsonl', 'chats_val.jsonl'), parts, strict=True):
    path = Path(__file__).with_name(file)
    path.write_text(''.join(json.dumps(record, ensure_ascii=False) + '\n' for record in part))
    print(f'{path}: {len(part)} conversations on {len(part) // COPIES} names')


if __name__ == '__main__':
  main()
