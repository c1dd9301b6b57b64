"""Imports go down only: the house stands on its floors."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / 'llm_jax'
FLOORS = [
    {'errors', 'types', 'builder', 'sharding', 'progress', 'stopping', 'runtime', 'devices', 'profiling',
     'validators', 'conditions'},
    {'layers', 'losses', 'optim', 'data', 'checkpoint', 'metrics'},
    {'models'},
    {'step', 'evaluation', 'sampling', 'packed'},
    {'config', 'answers'},
    {'plan'},
    {'assemble'},
    {'completion', 'memory', 'record', 'report', 'status'},
    {'parts'},
    {'start'},
    {'loop'},
    {'api'},
    {'main', 'evaluate', 'generate', 'predict', 'plot', 'inspect', 'export', 'check', 'schedules',
     'sweep',
     'data.prepare', 'data.inspect', 'data.convert'},
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
SAME_FLOOR = {('builder', 'errors'), ('data.prepare', 'main'), ('data.inspect', 'main'), ('data.convert', 'main'),
              ('losses', 'layers'), ('optim', 'layers'), ('sharding', 'types'), ('sharding', 'errors'),
              ('stopping', 'errors'), ('evaluate', 'main'), ('generate', 'main'),
              ('predict', 'main'), ('plot', 'main'), ('inspect', 'main'), ('export', 'main'),
              ('check', 'main'), ('schedules', 'main'), ('sweep', 'main'), ('sweep', 'plot'),
              ('validators', 'errors')}


def modules_imported(path: Path) -> set[str]:
  """First names below llm_jax that a file imports, at its top or inside a function."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module and node.module.split('.')[0] == 'llm_jax':
      below = node.module.split('.')[1:]
      found |= {below[0]} if below else {alias.name for alias in node.names}
    elif isinstance(node, ast.Import):
      found |= {a.name.split('.')[1] for a in node.names if a.name.startswith('llm_jax.')}
  return {name for name in found if not name.startswith('__')}


@pytest.mark.parametrize('path', sorted(PACKAGE.rglob('*.py')), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
  parts = path.relative_to(PACKAGE).with_suffix('').parts
  own = '.'.join(parts) if '.'.join(parts) in FLOOR else parts[0]  # a command may lie in a folder of a lower floor
  if own == '__init__':
    return
  assert own in FLOOR, f'{own} has no floor yet: give it one in FLOORS'
  for name in modules_imported(path):
    allowed = name == own or FLOOR[name] < FLOOR[own] or (own, name) in SAME_FLOOR
    assert allowed, f'{path.name} (floor {FLOOR[own]}) imports {name} (floor {FLOOR[name]})'


def test_flax_stays_below():
  """Only layers and models know Flax modules; step may build and unbox parameters."""
  for path in PACKAGE.rglob('*.py'):
    own = path.relative_to(PACKAGE).with_suffix('').parts[0]
    if 'flax.linen' in path.read_text():
      assert own in {'layers', 'models', 'step', 'sampling', 'inspect'}, f'{path} imports flax.linen'


def test_files_stay_small():
  sizes = {path.name: len(path.read_text().splitlines()) for path in PACKAGE.rglob('*.py')}
  assert not {name: size for name, size in sizes.items() if size > 400}
